// The list of conversations, by day, with its search.

import { byId, h, iconButton } from "./dom.js";

const DAY_MS = 24 * 60 * 60 * 1000;
const SEARCH_PAUSE_MS = 150;

export class Sidebar {
  /** `actions`: {open(id), rename(id, title), remove(id), search(text) -> promise of ids}. */
  constructor(actions) {
    this.actions = actions;
    this.node = byId("conversations");
    this.field = byId("search");
    this.summaries = [];
    this.found = null; // ids that the search found, or null without one
    this.field.addEventListener("input", () => this.searchSoon());
    this.field.addEventListener("keydown", (event) => this.searchKey(event));
    this.node.addEventListener("keydown", (event) => this.listKey(event));
  }

  /** `current`: the id of the open conversation. `running`: ids with a reply in the making. */
  show(summaries, current, running) {
    Object.assign(this, { summaries, current, running });
    this.render();
  }

  render() {
    if (this.node.querySelector("input")) return; // a name is being typed
    const focused = document.activeElement?.closest?.(".conversation")?.dataset.id;
    const shown = this.summaries.filter(({ id }) => !this.found || this.found.has(id));
    const lists = [...byDay(shown)].flatMap(([name, members]) => [
      h("h2", {}, name),
      h("ul", {}, ...members.map((one) => this.item(one))),
    ]);
    if (!lists.length && this.found) lists.push(h("p", { class: "none" }, "Nothing found."));
    if (!lists.length) lists.push(h("p", { class: "none" }, "No conversations yet."));
    this.node.replaceChildren(...lists);
    if (focused) this.button(focused)?.focus();
  }

  item({ id, title }) {
    const running = this.running.has(id);
    const open = h(
      "button",
      {
        type: "button",
        class: "conversation-open",
        title,
        "aria-current": id === this.current ? "page" : null,
        onclick: () => this.actions.open(id),
        ondblclick: () => this.rename(id),
      },
      title,
    );
    return h(
      "li",
      { class: "conversation", "data-id": id },
      open,
      running ? h("span", { class: "running-mark", role: "img", "aria-label": "writing" }) : null,
      h(
        "span",
        { class: "conversation-tools" },
        iconButton("pencil", `Rename “${title}”`, () => this.rename(id)),
        iconButton("trash", `Delete “${title}”`, () => this.remove(id)),
      ),
    );
  }

  button(id) {
    return this.node.querySelector(`[data-id="${id}"] .conversation-open`);
  }

  rename(id) {
    const place = this.node.querySelector(`[data-id="${id}"]`);
    const { title } = this.summaries.find((one) => one.id === id);
    let finished = false;
    const finish = (keep) => {
      if (finished) return; // removing a field takes its focus away, which would end it again
      finished = true;
      const name = field.value.trim();
      field.remove();
      if (keep && name && name !== title) this.actions.rename(id, name);
      this.render();
      this.button(id)?.focus();
    };
    const keydown = (event) => {
      event.stopPropagation();
      if (event.key === "Enter" && !event.isComposing) {
        event.preventDefault(); // it would press the button that gets the focus
        finish(true);
      }
      if (event.key === "Escape") finish(false);
    };
    const field = h("input", {
      type: "text",
      "aria-label": "Name of the conversation",
      maxlength: "120",
      onkeydown: keydown,
      onblur: () => finish(true),
    });
    field.value = title;
    place.replaceChildren(field);
    field.focus();
    field.select();
  }

  remove(id) {
    const buttons = [...this.node.querySelectorAll(".conversation-open")];
    const index = buttons.indexOf(this.button(id));
    const next = buttons[index + 1] ?? buttons[index - 1];
    (next ?? byId("new-conversation")).focus();
    this.actions.remove(id);
  }

  listKey(event) {
    const button = event.target.closest(".conversation-open");
    if (!button) return;
    const { id } = button.parentElement.dataset;
    const buttons = [...this.node.querySelectorAll(".conversation-open")];
    const at = buttons.indexOf(button);
    const targets = {
      ArrowDown: buttons[at + 1],
      ArrowUp: buttons[at - 1] ?? this.field,
      Home: buttons[0],
      End: buttons[buttons.length - 1],
    };
    if (event.key in targets) targets[event.key]?.focus();
    else if (event.key === "F2") this.rename(id);
    else if (event.key === "Delete") this.remove(id);
    else return;
    event.preventDefault();
  }

  searchKey(event) {
    if (event.key === "ArrowDown") {
      event.preventDefault();
      this.node.querySelector(".conversation-open")?.focus();
    } else if (event.key === "Escape" && this.field.value) {
      event.stopPropagation();
      this.field.value = "";
      this.searchSoon();
    }
  }

  searchSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.searchNow(), SEARCH_PAUSE_MS);
  }

  async searchNow() {
    const text = this.field.value.trim();
    const found = text ? await this.actions.search(text) : null;
    if (text !== this.field.value.trim()) return; // typed on meanwhile
    this.found = found;
    this.render();
  }
}

function dayName(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY_MS) return "Yesterday";
  if (time >= midnight - 7 * DAY_MS) return "Last seven days";
  return new Date(time).toLocaleDateString(undefined, { month: "long", year: "numeric" });
}

function byDay(summaries) {
  const days = new Map();
  for (const one of summaries) {
    const name = dayName(one.updated);
    if (!days.has(name)) days.set(name, []);
    days.get(name).push(one);
  }
  return days;
}
