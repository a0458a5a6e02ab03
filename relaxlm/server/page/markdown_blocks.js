// Block Markdown: text -> blocks, each with the line it begins at. Nothing is a matter of trust
// here: the result is data, and HTML in the text is text.
//
// Types: heading {level, text}, paragraph {text}, code {language, text}, math {text},
// quote {blocks}, list {ordered, start, loose, items: [{checked, blocks}]},
// table {align, header, rows}, rule.

const MAX_DEPTH = 8;
const MAX_COLUMNS = 64;
const FENCE = /^ {0,3}(`{3,}|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const MARKER = /^( {0,3})([-*+]|\d{1,9}[.)])( +|$)/;
const UNDERLINE = /^ {0,3}(=+|-+)[ \t]*$/;
const DELIMITER = /^:?-+:?$/;
const TASK = /^\[([ xX])\] /;

export function parseBlocks(text) {
  const lines = text.split("\n").map((line) => expandTabs(line.replace(/\r$/, "")));
  return new BlockParser(lines, 0).parse();
}

/** Where each line of the text begins. */
export function lineStarts(text) {
  const starts = [0];
  for (let at = text.indexOf("\n"); at >= 0; at = text.indexOf("\n", at + 1)) starts.push(at + 1);
  return starts;
}

class BlockParser {
  constructor(lines, depth) {
    this.lines = lines;
    this.depth = depth;
    this.at = 0;
  }

  parse() {
    const blocks = [];
    while (this.at < this.lines.length) {
      if (isBlank(this.lines[this.at])) {
        this.at += 1;
        continue;
      }
      const line = this.at;
      blocks.push({ ...this.block(), line });
    }
    return blocks;
  }

  block() {
    const line = this.lines[this.at];
    if (indent(line) >= 4) return this.indented();
    const nested = this.depth < MAX_DEPTH;
    return (
      this.fenced(line) ??
      this.heading(line) ??
      this.rule(line) ??
      this.math(line) ??
      (nested ? (this.quote(line) ?? this.list(line)) : null) ??
      this.table() ??
      this.paragraph()
    );
  }

  nested(lines) {
    return new BlockParser(lines, this.depth + 1).parse();
  }

  fenced(line) {
    const match = readFence(line);
    if (!match) return null;
    const [fence, info] = match;
    const own = indent(line);
    const body = [];
    for (this.at += 1; this.at < this.lines.length; this.at += 1) {
      const next = this.lines[this.at];
      if (closesFence(next, fence)) {
        this.at += 1;
        break;
      }
      body.push(next.slice(Math.min(own, indent(next))));
    }
    return { type: "code", language: info.trim().split(/[\s{,]/)[0], text: body.join("\n") };
  }

  indented() {
    const body = [];
    for (; this.at < this.lines.length; this.at += 1) {
      const line = this.lines[this.at];
      if (!isBlank(line) && indent(line) < 4) break;
      body.push(line.slice(4));
    }
    while (body.length && isBlank(body[body.length - 1])) body.pop();
    return { type: "code", language: "", text: body.join("\n") };
  }

  heading(line) {
    const match = HEADING.exec(line);
    if (!match) return null;
    this.at += 1;
    const text = line.slice(match[0].length).trim();
    let end = text.length;
    while (text[end - 1] === "#") end -= 1;
    const closed = end === 0 || text[end - 1] === " "; // "# Title ##"
    const title = closed ? text.slice(0, end).trim() : text;
    return { type: "heading", level: match[1].length, text: title };
  }

  rule(line) {
    if (!RULE.test(line)) return null;
    this.at += 1;
    return { type: "rule" };
  }

  /** `$$` or `\[` up to its end, or to the next blank line. */
  math(line) {
    const text = line.trimStart();
    const closing = text.startsWith("$$") ? "$$" : text.startsWith("\\[") ? "\\]" : null;
    if (!closing) return null;
    const body = [];
    for (let from = 2; this.at < this.lines.length; from = 0) {
      const next = this.lines[this.at].trim();
      if (!next) break;
      const end = next.indexOf(closing, from);
      if (body.length === 0 && end >= 0 && end + 2 < next.length) return null; // text goes on
      body.push(next);
      this.at += 1;
      if (end >= 0) break;
    }
    return { type: "math", text: body.join("\n") };
  }

  quote(line) {
    if (!QUOTE.test(line)) return null;
    const body = [];
    for (; this.at < this.lines.length; this.at += 1) {
      const next = this.lines[this.at];
      if (QUOTE.test(next)) body.push(next.replace(QUOTE, ""));
      else if (isBlank(next) || isBlank(body[body.length - 1]) || this.interrupts(next)) break;
      else body.push(next);
    }
    return { type: "quote", blocks: this.nested(body) };
  }

  list(line) {
    const first = readMarker(line);
    if (!first) return null;
    const items = [];
    let loose = false;
    let marker = first;
    while (marker) {
      const { body, endsBlank } = this.item(marker);
      const next = this.at < this.lines.length ? readMarker(this.lines[this.at]) : null;
      const sibling = next && next.kind === first.kind && !RULE.test(this.lines[this.at]);
      const task = TASK.exec(body[0]);
      if (task) body[0] = body[0].slice(task[0].length);
      const blocks = this.nested(body);
      const inner = blocks.some((block, i) => i > 0 && isBlank(body[block.line - 1] ?? "x"));
      loose ||= inner || (endsBlank && Boolean(sibling));
      items.push({ checked: task ? task[1] !== " " : null, blocks });
      marker = sibling ? next : null;
    }
    return { type: "list", ordered: first.ordered, start: first.start, loose, items };
  }

  /** The lines of one item without their indentation. Two columns are enough to be inside. */
  item(marker) {
    const body = [this.lines[this.at].slice(marker.content)];
    let blanks = 0;
    for (this.at += 1; this.at < this.lines.length; this.at += 1) {
      const line = this.lines[this.at];
      if (isBlank(line)) {
        blanks += 1;
        continue;
      }
      const own = indent(line);
      const inside = own >= Math.min(marker.content, marker.indent + 2);
      const lazy = blanks === 0 && !this.interrupts(line) && !readMarker(line);
      if (!inside && !lazy) break;
      for (; blanks > 0; blanks -= 1) body.push("");
      body.push(line.slice(Math.min(own, marker.content)));
    }
    return { body, endsBlank: blanks > 0 };
  }

  table() {
    if (!startsTable(this.lines, this.at)) return null;
    const header = cells(this.lines[this.at]);
    const align = cells(this.lines[this.at + 1]).map(alignment);
    const rows = [];
    for (this.at += 2; this.at < this.lines.length; this.at += 1) {
      const line = this.lines[this.at];
      if (isBlank(line) || this.interrupts(line)) break;
      const row = cells(line).slice(0, header.length);
      while (row.length < header.length) row.push("");
      rows.push(row);
    }
    return { type: "table", align, header, rows };
  }

  paragraph() {
    const body = [];
    for (; this.at < this.lines.length; this.at += 1) {
      const line = this.lines[this.at];
      if (isBlank(line)) break;
      if (body.length > 0) {
        const underline = UNDERLINE.exec(line);
        if (underline) {
          this.at += 1;
          const level = underline[1][0] === "=" ? 1 : 2;
          return { type: "heading", level, text: body.join("\n") };
        }
        if (this.interrupts(line) || startsTable(this.lines, this.at)) break;
      }
      body.push(line.trim());
    }
    return { type: "paragraph", text: body.join("\n") };
  }

  /** Whether a line ends the paragraph before it. */
  interrupts(line) {
    if (indent(line) >= 4) return false;
    if (readFence(line) || HEADING.test(line) || RULE.test(line)) return true;
    if (/^ {0,3}(\$\$|\\\[)/.test(line)) return true;
    if (this.depth >= MAX_DEPTH) return false;
    if (QUOTE.test(line)) return true;
    const marker = readMarker(line);
    return Boolean(marker && !marker.empty && (!marker.ordered || marker.start === 1));
  }
}

function expandTabs(line) {
  return line.replace(/^[ \t]+/, (space) => space.replaceAll("\t", "    "));
}

function isBlank(line) {
  return line.trim() === "";
}

function indent(line) {
  let at = 0;
  while (line[at] === " ") at += 1;
  return at;
}

/** [the fence, what follows it], or null. */
function readFence(line) {
  const match = FENCE.exec(line);
  if (!match || (match[1][0] === "`" && match[2].includes("`"))) return null;
  return [match[1], match[2]];
}

function closesFence(line, fence) {
  const text = line.trim();
  return (
    indent(line) < 4 && text.length >= fence.length && text === fence[0].repeat(text.length)
  );
}

function readMarker(line) {
  const match = MARKER.exec(line);
  if (!match) return null;
  const [whole, before, mark, space] = match;
  const ordered = mark.length > 1;
  const empty = whole.length === line.length;
  const gap = empty || space.length > 4 ? 1 : space.length;
  return {
    indent: before.length,
    content: before.length + mark.length + gap,
    kind: mark[mark.length - 1], // lists end where the kind of marker changes
    ordered,
    start: ordered ? Number.parseInt(mark, 10) : 1,
    empty,
  };
}

function startsTable(lines, at) {
  const [header, delimiters] = [lines[at], lines[at + 1]];
  if (!delimiters?.includes("-") || !header.includes("|")) return false;
  const marks = cells(delimiters);
  if (marks.length > MAX_COLUMNS || !marks.every((mark) => DELIMITER.test(mark))) return false;
  return marks.length === cells(header).length;
}

/** The cells of a row: at each bar that no backslash escapes. */
function cells(line) {
  const found = [];
  let cell = "";
  const text = line.trim();
  for (let i = text.startsWith("|") ? 1 : 0; i < text.length; i += 1) {
    if (text[i] === "\\" && text[i + 1] === "|") {
      cell += "|";
      i += 1;
    } else if (text[i] === "|") {
      found.push(cell.trim());
      cell = "";
    } else {
      cell += text[i];
    }
  }
  if (cell.trim() || !text.endsWith("|")) found.push(cell.trim());
  return found;
}

function alignment(delimiter) {
  const left = delimiter.startsWith(":");
  const right = delimiter.endsWith(":");
  return left && right ? "center" : right ? "right" : left ? "left" : "";
}
