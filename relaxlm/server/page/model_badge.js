// Which model answers: its name, or a choice where the server has several.

import { listModels } from "./api.js";
import { byId, h } from "./dom.js";

const RETRY_MS = 3000;

export class ModelBadge {
  /** `needKey(error)` is called if the server wants one; `changed()` when the model is known. */
  constructor({ needKey, changed }) {
    this.place = byId("model-place");
    this.needKey = needKey;
    this.changed = changed;
    this.name = "";
  }

  async load() {
    clearTimeout(this.timer);
    try {
      const models = await listModels();
      this.show(models.map((model) => model.id));
    } catch (error) {
      this.showProblem(error);
    }
  }

  show(names) {
    if (!names.includes(this.name)) this.name = names[0] ?? "";
    if (names.length > 1) {
      const choose = () => {
        this.name = select.value;
        this.changed();
      };
      const options = names.map((name) => h("option", { value: name }, name));
      const select = h("select", { "aria-label": "Model", onchange: choose }, ...options);
      select.value = this.name;
      this.place.replaceChildren(select);
    } else {
      const title = `Model: ${this.name}`;
      this.place.replaceChildren(h("span", { class: "model", title }, h("span", {}, this.name)));
    }
    this.changed();
  }

  showProblem(error) {
    const key = error.kind === "key";
    const badge = h(
      "button",
      { type: "button", class: "model away", title: error.message, onclick: () => this.load() },
      h("span", {}, key ? "Key needed" : "No connection"),
    );
    this.place.replaceChildren(badge);
    if (key) this.needKey(error);
    else this.timer = setTimeout(() => this.load(), RETRY_MS);
  }
}
