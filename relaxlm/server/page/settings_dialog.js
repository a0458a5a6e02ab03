// The form for a conversation's settings. Nothing changes until it is saved.

import { apiKey, setApiKey } from "./api.js";
import { byId, h } from "./dom.js";
import { NUMBERS, emptySettings, numberProblem, schemaProblem } from "./settings.js";

export class SettingsDialog {
  /** `save(settings)` is called with new settings. */
  constructor(save) {
    this.save = save;
    this.dialog = byId("settings-dialog");
    this.numbers = new Map(NUMBERS.map((field) => [field, numberField(field)]));
    byId("set-numbers").append(...[...this.numbers.values()].map((made) => made.node));
    byId("settings-form").addEventListener("submit", (event) => this.submit(event));
    byId("reset-settings").addEventListener("click", () => this.fill(emptySettings()));
    byId("set-format").addEventListener("change", () => this.showSchema());
  }

  open(settings) {
    this.fill(settings);
    byId("set-key").value = apiKey();
    this.dialog.showModal();
    this.dialog.querySelector(".dialog-body").scrollTop = 0;
  }

  fill(settings) {
    byId("set-system").value = settings.system;
    byId("set-stop").value = settings.stop.map(escapeBreaks).join("\n");
    byId("set-format").value = settings.format;
    byId("set-thinking").value = settings.thinking;
    byId("set-schema").value = settings.schema;
    for (const [field, { input, error }] of this.numbers) {
      input.value = settings.numbers[field.name] ?? "";
      complain(input, error, "");
    }
    this.showSchema();
  }

  showSchema() {
    byId("set-schema-field").hidden = byId("set-format").value !== "json_schema";
    complain(byId("set-schema"), byId("set-schema-error"), "");
  }

  submit(event) {
    event.preventDefault();
    const settings = this.read();
    const wrong = this.dialog.querySelector("[aria-invalid=true]");
    if (wrong) return wrong.focus();
    setApiKey(byId("set-key").value.trim());
    this.dialog.close("saved");
    return this.save(settings);
  }

  /** What the form says; fields that are wrong are marked. */
  read() {
    const numbers = {};
    for (const [field, { input, error }] of this.numbers) {
      const text = input.value.trim().replace(",", ".");
      const problem = text ? numberProblem(field, Number(text)) : "";
      complain(input, error, problem);
      if (text && !problem) numbers[field.name] = Number(text);
    }
    const format = byId("set-format").value;
    const schema = byId("set-schema").value.trim();
    const problem = format === "json_schema" ? schemaProblem(schema) : "";
    complain(byId("set-schema"), byId("set-schema-error"), problem);
    return {
      system: byId("set-system").value,
      stop: byId("set-stop").value.split("\n").filter(Boolean).map(unescapeBreaks),
      format,
      schema,
      thinking: byId("set-thinking").value,
      numbers,
    };
  }
}

function numberField(field) {
  const id = `set-${field.name}`;
  const input = h("input", {
    id,
    type: "text",
    inputmode: field.min < 0 ? null : field.whole ? "numeric" : "decimal",
    autocomplete: "off",
    placeholder: "default",
    "aria-describedby": `${id}-hint ${id}-error`,
  });
  const error = h("p", { id: `${id}-error`, class: "field-error", role: "alert" });
  const hint = h("p", { id: `${id}-hint`, class: "field-hint" }, field.hint);
  const label = h("label", { for: id }, field.label);
  return { input, error, node: h("div", { class: "field" }, label, input, error, hint) };
}

function complain(input, place, problem) {
  if (problem) input.setAttribute("aria-invalid", "true");
  else input.removeAttribute("aria-invalid");
  place.textContent = problem;
}

function escapeBreaks(text) {
  return text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\t", "\\t");
}

function unescapeBreaks(text) {
  const meanings = { n: "\n", t: "\t", "\\": "\\" };
  return text.replaceAll(/\\([nt\\])/g, (_, letter) => meanings[letter]);
}
