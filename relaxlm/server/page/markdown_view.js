// Markdown on the page. Elements are made one by one, so text of a model can't become anything
// but text, and only what has changed since the last update is made anew.

import { CodeView } from "./code_view.js";
import { h } from "./dom.js";
import { lineStarts, parseBlocks } from "./markdown_blocks.js";
import { parseInline } from "./markdown_inline.js";

const HEADING_OFFSET = 2; // the page has an h1, each message an h2
const LAST_HEADING = 6;

export class MarkdownView {
  constructor() {
    this.node = h("div", { class: "markdown" });
    this.text = "";
    this.stable = 0; // characters whose blocks can't change any more
    this.kept = 0; // elements that show them
    this.code = null; // the CodeView of the first block after them, if that is one
  }

  /** The text so far, in full. */
  update(text) {
    if (text === this.text) return;
    if (!text.startsWith(this.text)) this.reset();
    this.text = text;
    const tail = text.slice(this.stable);
    const blocks = parseBlocks(tail);
    const first = blocks[0];
    let from = 0;
    if (this.code && first?.type === "code" && first.language === this.code.language) {
      this.code.update(first.text);
      from = 1;
    } else {
      this.code = null;
    }
    while (this.node.children.length > this.kept + from) this.node.lastElementChild.remove();
    const views = blocks.slice(from).map(renderBlock);
    this.node.append(...views.map((view) => view.node));
    if (from === 1) views.unshift(this.code);
    this.settle(tail, blocks, views);
  }

  /** Keep all blocks before the last one that began on a line that is complete. */
  settle(tail, blocks, views) {
    const complete = tail.lastIndexOf("\n") + 1;
    const starts = lineStarts(tail);
    let last = blocks.length - 1;
    while (last > 0 && starts[blocks[last].line] >= complete) last -= 1;
    if (last < 0) return;
    this.stable += starts[blocks[last].line];
    this.kept += last;
    this.code = views[last] instanceof CodeView ? views[last] : null;
  }

  reset() {
    this.node.replaceChildren();
    this.stable = 0;
    this.kept = 0;
    this.code = null;
  }
}

/** A CodeView, or {node}. */
function renderBlock(block) {
  switch (block.type) {
    case "code": {
      const view = new CodeView(block.language);
      view.update(block.text);
      return view;
    }
    case "heading": {
      const level = Math.min(block.level + HEADING_OFFSET, LAST_HEADING);
      const shown = { class: `heading-${block.level}` };
      return { node: h(`h${level}`, shown, ...inline(block.text)) };
    }
    case "math":
      return { node: h("div", { class: "math-block" }, block.text) };
    case "quote":
      return { node: h("blockquote", {}, ...nodes(block.blocks)) };
    case "list":
      return { node: renderList(block) };
    case "table":
      return { node: renderTable(block) };
    case "rule":
      return { node: h("hr") };
    default:
      return { node: h("p", {}, ...inline(block.text)) };
  }
}

function nodes(blocks) {
  return blocks.map((block) => renderBlock(block).node);
}

function renderList({ ordered, start, loose, items }) {
  const tasks = items.some((item) => item.checked !== null);
  const list = h(ordered ? "ol" : "ul", {
    class: [loose ? "loose" : "tight", tasks ? "tasks" : ""].join(" ").trim(),
    start: ordered && start !== 1 ? String(start) : null,
  });
  for (const { checked, blocks } of items) {
    const item = h("li", { class: checked === null ? null : "task" });
    if (checked !== null) {
      const name = checked ? "done" : "to do";
      item.append(h("input", { type: "checkbox", disabled: true, checked, "aria-label": name }));
    }
    for (const block of blocks) {
      if (block.type === "paragraph" && !loose) item.append(...inline(block.text));
      else item.append(renderBlock(block).node);
    }
    list.append(item);
  }
  return list;
}

function renderTable({ align, header, rows }) {
  const row = (tag, cells) =>
    h(
      "tr",
      {},
      ...cells.map((cell, i) =>
        h(
          tag,
          { class: align[i] ? `align-${align[i]}` : null, scope: tag === "th" ? "col" : null },
          ...inline(cell),
        ),
      ),
    );
  return h(
    "div",
    { class: "table-scroll", tabindex: "0", role: "region", "aria-label": "Table" },
    h(
      "table",
      {},
      h("thead", {}, row("th", header)),
      h("tbody", {}, ...rows.map((cells) => row("td", cells))),
    ),
  );
}

function inline(text) {
  return parseInline(text).map(renderInline);
}

function renderInline(node) {
  switch (node.type) {
    case "text":
      return document.createTextNode(node.text);
    case "code":
      return h("code", {}, node.text);
    case "math":
      return h("span", { class: "math" }, node.text);
    case "break":
      return h("br");
    case "link":
      return h(
        "a",
        { href: node.href, target: "_blank", rel: "noopener noreferrer" },
        ...node.children.map(renderInline),
      );
    default:
      return h(node.type, {}, ...node.children.map(renderInline)); // em, strong, del
  }
}
