// Inline Markdown: text -> nodes {type, text | children, href}. Time is linear in the text, which
// may be hostile: what is open is kept on a stack, and searches ahead are bounded.
//
// Types: text, code, math (text that is shown as written), break, em, strong, del, link.

const MAX_NESTING = 12;
const MAX_LINK_LENGTH = 2000;
const MAX_MATH_LENGTH = 1000;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const SPACE = /\s/u;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const BARE_LINK = /https?:\/\/[^\s<>"`]+/y;
const ANGLE_LINK = /<(https?:\/\/[^\s<>]+|mailto:[^\s<>]+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+)>/y;
const PLAIN = /[^\\`*_~[\]!<$\nh]+/y;

/** The address if a link may lead there, else null: no javascript:, no data:, nothing relative. */
export function safeAddress(address) {
  try {
    const url = new URL(address); // throws for a relative one
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

export function parseInline(text) {
  return new InlineParser(text).parse();
}

class InlineParser {
  constructor(text) {
    this.text = text;
    this.at = 0;
    // Frames: the root, and above it what has been opened and not closed yet.
    this.frames = [{ mark: "", length: 0, children: [] }];
    this.brackets = 0; // frames that are brackets
    this.missingFences = new Set(); // lengths of backtick runs that nothing closes
  }

  parse() {
    const { text } = this;
    while (this.at < text.length) {
      PLAIN.lastIndex = this.at;
      const plain = PLAIN.exec(text);
      if (plain) {
        this.add(plain[0]);
        this.at += plain[0].length;
        continue;
      }
      const handled = this.special(text[this.at]);
      if (!handled) this.add(text[this.at++]);
    }
    this.flatten(1);
    return this.frames[0].children;
  }

  special(char) {
    switch (char) {
      case "\\":
        return this.escape();
      case "`":
        return this.code();
      case "$":
        return this.math("$");
      case "\n":
        this.push({ type: "break" });
        this.at += 1;
        return true;
      case "*":
      case "_":
      case "~":
        return this.emphasis(char);
      case "!":
        return this.image();
      case "[":
        return this.open("[");
      case "]":
        return this.closeBracket();
      case "<":
        return this.angleLink();
      case "h":
        return this.bareLink();
      default:
        return false;
    }
  }

  push(node) {
    this.frames[this.frames.length - 1].children.push(node);
  }

  add(text) {
    const { children } = this.frames[this.frames.length - 1];
    const last = children[children.length - 1];
    if (last?.type === "text") last.text += text;
    else children.push({ type: "text", text });
  }

  escape() {
    const next = this.text[this.at + 1];
    if (next === "(" || next === "[") return this.math(`\\${next}`);
    if (next === undefined || !ESCAPABLE.test(next)) return false;
    this.add(next);
    this.at += 2;
    return true;
  }

  code() {
    const { text, at } = this;
    const length = runLength(text, at);
    const end = this.missingFences.has(length) ? -1 : findRun(text, at + length, length);
    if (end < 0) {
      this.missingFences.add(length);
      this.add("`".repeat(length));
      this.at += length;
      return true;
    }
    let code = text.slice(at + length, end).replaceAll("\n", " ");
    if (code.startsWith(" ") && code.endsWith(" ") && code.trim()) code = code.slice(1, -1);
    this.push({ type: "code", text: code });
    this.at = end + length;
    return true;
  }

  /** `$x_1$`, `$$x$$`, `\(x\)`, `\[x\]`: nothing inside is Markdown. */
  math(opening) {
    const { text, at } = this;
    const double = text.startsWith("$$", at);
    const mark = double ? "$$" : opening;
    const closing = { $: "$", $$: "$$", "\\(": "\\)", "\\[": "\\]" }[mark];
    const from = at + mark.length;
    const near = text.slice(from, from + MAX_MATH_LENGTH);
    const length = near.indexOf(closing);
    if (length > 0 && (mark !== "$" || isDollarMath(near, length))) {
      const end = from + length + closing.length;
      this.push({ type: "math", text: text.slice(at, end) });
      this.at = end;
      return true;
    }
    this.add(mark);
    this.at += mark.length;
    return true;
  }

  open(mark) {
    this.brackets += 1;
    this.frames.push({ mark, length: 1, children: [] });
    this.at += mark.length;
    return true;
  }

  image() {
    // A picture would be a request to wherever the model says: it is shown as a link instead.
    return this.text[this.at + 1] === "[" ? this.open("![") : false;
  }

  closeBracket() {
    if (this.brackets === 0) return false;
    const index = this.frames.findLastIndex((frame) => frame.mark.endsWith("["));
    const destination = readDestination(this.text, this.at + 1);
    const href = destination && safeAddress(destination.address);
    this.flatten(index + 1);
    const frame = this.frames[index];
    if (href && frame.children.length && depth(frame.children) < MAX_NESTING) {
      this.frames.pop();
      this.brackets -= 1;
      this.push({ type: "link", href, children: withoutLinks(frame.children) });
      this.at = destination.end;
      return true;
    }
    this.flatten(index);
    return false;
  }

  angleLink() {
    ANGLE_LINK.lastIndex = this.at;
    const match = ANGLE_LINK.exec(this.text);
    if (!match) return false;
    const [whole, shown] = match;
    const href = safeAddress(/^(https?|mailto):/.test(shown) ? shown : `mailto:${shown}`);
    if (!href) return false;
    this.push({ type: "link", href, children: [{ type: "text", text: shown }] });
    this.at += whole.length;
    return true;
  }

  bareLink() {
    BARE_LINK.lastIndex = this.at;
    const match = BARE_LINK.exec(this.text);
    if (!match || /\w/.test(this.text[this.at - 1] ?? "")) return false;
    const shown = withoutTail(match[0].slice(0, MAX_LINK_LENGTH));
    const href = safeAddress(shown);
    if (!href) return false;
    this.push({ type: "link", href, children: [{ type: "text", text: shown }] });
    this.at += shown.length;
    return true;
  }

  emphasis(mark) {
    const { text, at } = this;
    let length = runLength(text, at);
    const { canOpen, canClose } = flanks(text, at, length);
    this.at += length;
    while (canClose && length > 0) {
      const index = this.opener(mark);
      if (index < 0) break;
      const frame = this.frames[index];
      const used = frame.length >= 2 && length >= 2 ? 2 : 1;
      if (mark === "~" && used < 2) break;
      this.flatten(index + 1);
      if (depth(frame.children) >= MAX_NESTING) break;
      const type = mark === "~" ? "del" : used === 2 ? "strong" : "em";
      const wrapped = { type, children: frame.children };
      length -= used;
      frame.length -= used;
      if (frame.length === 0) {
        this.frames.pop();
        this.push(wrapped);
      } else {
        frame.children = [wrapped];
      }
    }
    if (length > 0) {
      if (canOpen) this.frames.push({ mark, length, children: [] });
      else this.add(mark.repeat(length));
    }
    return true;
  }

  /** The nearest open frame of that mark that no bracket is in front of; -1 if none. */
  opener(mark) {
    const lowest = Math.max(1, this.frames.length - MAX_NESTING);
    for (let index = this.frames.length - 1; index >= lowest; index -= 1) {
      const open = this.frames[index].mark;
      if (open === mark) return index;
      if (open.endsWith("[")) return -1;
    }
    return -1;
  }

  /** Frames from `index` on were never closed: their marks are text. */
  flatten(index) {
    if (index >= this.frames.length) return;
    const target = this.frames[index - 1].children;
    for (const frame of this.frames.splice(index)) {
      if (frame.mark.endsWith("[")) this.brackets -= 1;
      target.push({ type: "text", text: frame.mark.repeat(frame.length) });
      for (const child of frame.children) target.push(child);
    }
  }
}

function runLength(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

/** Where the next run of exactly `length` backticks begins; -1 if none does. */
function findRun(text, from, length) {
  for (let at = text.indexOf("`", from); at >= 0; at = text.indexOf("`", at)) {
    const found = runLength(text, at);
    if (found === length) return at;
    at += found;
  }
  return -1;
}

/** Money is not math: "$5 and $6" has a space before the second sign or a digit behind it. */
function isDollarMath(near, length) {
  const inside = near.slice(0, length);
  return !/^\s|\s$|\n/.test(inside) && !/\d/.test(near[length + 1] ?? "");
}

function flanks(text, at, length) {
  const before = text[at - 1] ?? " ";
  const after = text[at + length] ?? " ";
  const spaceBefore = SPACE.test(before);
  const spaceAfter = SPACE.test(after);
  const markBefore = PUNCTUATION.test(before);
  const markAfter = PUNCTUATION.test(after);
  const left = !spaceAfter && (!markAfter || spaceBefore || markBefore);
  const right = !spaceBefore && (!markBefore || spaceAfter || markAfter);
  if (text[at] !== "_") return { canOpen: left, canClose: right };
  return { canOpen: left && (!right || markBefore), canClose: right && (!left || markAfter) };
}

/** `(address "title")` at that place: the address and where it ends, or null. */
function readDestination(text, at) {
  if (text[at] !== "(") return null;
  const near = text.slice(at, at + MAX_LINK_LENGTH);
  let depth = 0;
  for (let i = 0; i < near.length; i += 1) {
    if (near[i] === "\n") return null;
    if (near[i] === "\\") i += 1;
    else if (near[i] === "(") depth += 1;
    else if (near[i] === ")" && --depth === 0) {
      const [first = ""] = near.slice(1, i).trim().split(/\s+/, 1);
      return { address: first.replace(/^<(.*)>$/, "$1"), end: at + i + 1 };
    }
  }
  return null;
}

/** A bare address without the punctuation of the sentence that it stands in. */
function withoutTail(address) {
  let unopened = 0; // closing brackets that nothing in the address opens
  for (const char of address) unopened += char === ")" ? 1 : char === "(" ? -1 : 0;
  let end = address.length;
  for (; end > 0 && /[.,;:!?*_~'")[\]]/.test(address[end - 1]); end -= 1) {
    if (address[end - 1] === ")" && unopened-- <= 0) break;
  }
  return address.slice(0, end);
}

function depth(nodes) {
  let deepest = 0;
  for (const node of nodes) {
    if (node.children) deepest = Math.max(deepest, 1 + depth(node.children));
  }
  return deepest;
}

function withoutLinks(nodes) {
  return nodes.flatMap((node) => {
    if (node.type === "link") return withoutLinks(node.children);
    return node.children ? [{ ...node, children: withoutLinks(node.children) }] : [node];
  });
}
