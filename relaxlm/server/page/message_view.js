// Messages on the page: the reader's own, and replies, which grow while they are written.

import { shownVersion } from "./conversation.js";
import { copyButton, h, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown_view.js";
import { seconds, statsViews } from "./stats.js";

const SHORTEST_THOUGHT_S = 0.1; // that is told
const NOTES = {
  length: "The reply ended at the limit of tokens.",
  stopped: "Stopped.",
  content_filter: "The server held the rest back.",
};

export class UserView {
  /** `actions`: {edit(message, text)}. */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.bubble = h("div", { class: "bubble", dir: "auto" }, message.content);
    this.buttons = h("div", { class: "actions" });
    this.node = h(
      "article",
      { class: "message user" },
      h("h2", { class: "visually-hidden" }, "You"),
      this.bubble,
      this.buttons,
    );
  }

  /** `last`: whether it is the last one of the reader, and can be edited now. */
  refresh({ last, busy }) {
    const edit = last && !busy;
    this.buttons.replaceChildren(
      copyButton("Copy message", () => this.message.content),
      ...(edit ? [iconButton("pencil", "Edit message", () => this.edit())] : []),
    );
  }

  edit() {
    if (this.node.querySelector(".edit")) return;
    const area = h("textarea", { "aria-label": "Message", rows: "2", dir: "auto" });
    area.value = this.message.content;
    const leave = () => {
      form.replaceWith(this.bubble, this.buttons);
      this.buttons.querySelector("button:last-child")?.focus();
    };
    const send = (event) => {
      event.preventDefault();
      if (area.value.trim()) this.actions.edit(this.message, area.value.trim());
    };
    const keydown = (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        leave();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        send(event);
      }
    };
    const form = h(
      "form",
      { class: "edit", onsubmit: send, onkeydown: keydown },
      area,
      h(
        "div",
        { class: "edit-foot" },
        h("span", {}, "The reply is written anew."),
        h("button", { type: "button", class: "button", onclick: leave }, "Cancel"),
        h("button", { type: "submit", class: "button primary" }, "Send"),
      ),
    );
    this.buttons.remove();
    this.bubble.replaceWith(form);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

export class ReplyView {
  /** `actions`: {regenerate(message), retry(message), switchVersion(message, shown)}. */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.heading = h("h2", { class: "visually-hidden" }, "Reply");
    this.node = h("article", { class: "message reply" });
    this.shown = null; // the version that the elements below belong to
    this.state = { last: false, busy: false };
    this.live = false;
  }

  /** Everything but the text: what the reader can do, and how the reply ended. */
  refresh(state) {
    this.state = state;
    this.live = state.running;
    this.node.classList.toggle("live", this.live);
    this.node.setAttribute("aria-busy", String(this.live));
    this.update();
    const { error, finish } = shownVersion(this.message);
    const note = this.live || error ? null : NOTES[finish];
    this.ending.replaceChildren(
      ...[
        note ? h("p", { class: "note" }, note) : null,
        this.live || !error ? null : this.errorBox(error),
        this.live ? null : this.buttons(),
      ].filter(Boolean),
    );
  }

  /** The text of the version that is shown. */
  update() {
    const version = shownVersion(this.message);
    if (this.shown !== version) this.build(version);
    const { content, reasoning } = version;
    const empty = !content && !reasoning;
    this.waiting.hidden = !(this.live && empty);
    this.content.update(content);
    this.reasoning.hidden = !reasoning;
    if (reasoning) this.updateReasoning(version);
  }

  updateReasoning({ content, reasoning, timing }) {
    const thinking = this.live && !content;
    this.reasoning.classList.toggle("thinking", thinking);
    const known = timing.thinking >= SHORTEST_THOUGHT_S ? ` for ${seconds(timing.thinking)}` : "";
    this.reasoningLabel.textContent = thinking ? "Thinking" : `Thought${known}`;
    // Open while it is all there is; whoever opens or closes it has the last word.
    if (!this.touched && this.reasoning.open !== thinking) this.reasoning.open = thinking;
    if (this.reasoning.open) this.reasoningText.update(reasoning);
  }

  build(version) {
    this.shown = version;
    this.touched = false;
    this.content = new MarkdownView();
    this.content.node.setAttribute("dir", "auto");
    this.reasoningText = new MarkdownView();
    this.reasoningLabel = h("span");
    const touch = () => {
      this.touched = true;
    };
    this.reasoning = h(
      "details",
      { class: "reasoning", ontoggle: () => this.reasoning.open && this.updateReasoning(version) },
      h("summary", { onclick: touch }, icon("chevron"), this.reasoningLabel),
      this.reasoningText.node,
    );
    this.waitingLabel = h("span", {}, "");
    const dots = h("span", { class: "dots" }, h("i"), h("i"), h("i"));
    this.waiting = h("div", { class: "waiting" }, dots, this.waitingLabel);
    this.ending = h("div", { class: "ending" });
    this.node.replaceChildren(
      ...[this.heading, this.waiting, this.reasoning, this.content.node, this.ending],
    );
  }

  /** Called every second or so while nothing has come. */
  wait(elapsed) {
    this.waitingLabel.textContent = elapsed < 2 ? "" : `Waiting, ${Math.floor(elapsed)} s`;
  }

  errorBox({ kind, message, retryAfter }) {
    const hint = retryAfter ? `\nThe server suggests to wait ${Math.ceil(retryAfter)} s.` : "";
    const retry = kind === "key" ? "Enter a key" : "Try again";
    return h(
      "div",
      { class: "error", role: "alert" },
      icon("alert"),
      h("p", {}, message + hint),
      this.state.last
        ? h(
            "button",
            { type: "button", class: "button", onclick: () => this.actions.retry(this.message) },
            retry,
          )
        : null,
    );
  }

  buttons() {
    const version = shownVersion(this.message);
    const { last, busy } = this.state;
    const again = () => this.actions.regenerate(this.message);
    return h(
      "div",
      { class: "actions" },
      version.content ? copyButton("Copy reply", () => version.content) : null,
      last && !busy && !version.error ? iconButton("refresh", "Regenerate", again) : null,
      this.versions(),
      ...statsViews(version),
    );
  }

  versions() {
    const { versions, shown } = this.message;
    if (versions.length < 2) return null;
    const go = (to) => () => this.actions.switchVersion(this.message, to);
    const at = (to) => ({ disabled: this.state.busy || to < 0 || to >= versions.length });
    return h(
      "span",
      { class: "versions", role: "group", "aria-label": "Versions of this reply" },
      iconButton("left", "Earlier version", go(shown - 1), at(shown - 1)),
      h("span", {}, `${shown + 1}/${versions.length}`),
      iconButton("right", "Later version", go(shown + 1), at(shown + 1)),
    );
  }
}
