// Conversations out to a file and back in.

import { byId, h } from "./dom.js";
import { exportText, importText } from "./conversation.js";

const RELEASE_MS = 10_000; // the browser has begun to save by then

export function download(conversations, name) {
  const url = URL.createObjectURL(
    new Blob([exportText(conversations)], { type: "application/json" }),
  );
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), RELEASE_MS);
}

/** Lets the reader choose a file, and calls `add(conversations)` or `fail(message)`. */
export function startImport(add, fail) {
  const field = byId("import-file");
  byId("import").addEventListener("click", () => field.click());
  field.addEventListener("change", async () => {
    const [file] = field.files;
    if (!file) return;
    try {
      add(importText(await file.text()));
    } catch (error) {
      fail(error.message);
    }
    field.value = "";
  });
}
