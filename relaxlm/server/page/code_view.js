// A code block that can grow: finished lines are coloured once, only the last one is made anew.

import { colorLine, knowsLanguage } from "./code_colors.js";
import { copyButton, h } from "./dom.js";

export class CodeView {
  constructor(language) {
    this.language = language;
    this.colored = knowsLanguage(language);
    this.text = "";
    this.finished = 0; // characters that are in finished lines
    this.state = ""; // of the colouring, after them
    this.lines = h("code", { "data-language": language || null });
    this.open = h("span");
    this.lines.append(this.open);
    const label = `${language || "code"} block`;
    this.node = h(
      "figure",
      { class: "code-block" },
      h(
        "figcaption",
        {},
        h("span", { class: "code-language" }, language || "text"),
        copyButton("Copy code", () => this.text),
      ),
      h("pre", { tabindex: "0", role: "region", "aria-label": label }, this.lines),
    );
  }

  /** The block's text so far. */
  update(text) {
    if (!text.startsWith(this.text)) {
      this.lines.replaceChildren(this.open);
      this.finished = 0;
      this.state = "";
    }
    this.text = text;
    const end = text.lastIndexOf("\n") + 1;
    if (end > this.finished) {
      const fresh = document.createDocumentFragment();
      const lines = text.slice(this.finished, end - 1).split("\n");
      for (const line of lines) this.state = this.render(fresh, line, "\n");
      this.open.before(fresh);
      this.finished = end;
    }
    this.open.replaceChildren();
    this.render(this.open, text.slice(end), "");
  }

  render(target, line, ending) {
    if (!this.colored) {
      target.append(line + ending);
      return "";
    }
    const { parts, state } = colorLine(line, this.language, this.state);
    for (const [kind, text] of parts) {
      target.append(kind ? h("span", { class: `code-${kind}` }, text) : text);
    }
    target.append(ending);
    return state;
  }
}
