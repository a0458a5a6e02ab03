// Questions to the reader: are you sure, and which key. Each returns a promise of the answer.

import { apiKey, setApiKey } from "./api.js";
import { byId } from "./dom.js";

/** Lets the close buttons of all dialogs close them. */
export function startDialogs() {
  for (const button of document.querySelectorAll("dialog [data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close(""));
  }
}

/** True if the reader agrees. */
export function confirm(title, text, yes) {
  const dialog = byId("confirm-dialog");
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  byId("confirm-yes").textContent = yes;
  return answer(dialog).then((value) => value === "yes");
}

/** Asks for an API key and keeps it; true if one was given. */
export async function askForKey(problem) {
  const dialog = byId("key-dialog");
  if (dialog.open) return false; // asked already
  const field = byId("key");
  field.value = "";
  byId("key-note").textContent = apiKey() ? problem : "";
  const submit = (event) => {
    event.preventDefault();
    dialog.close("given");
  };
  byId("key-form").onsubmit = submit;
  if ((await answer(dialog)) !== "given") return false;
  setApiKey(field.value.trim());
  field.value = "";
  return true;
}

/** Opens a dialog; what it was closed with. */
function answer(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
}
