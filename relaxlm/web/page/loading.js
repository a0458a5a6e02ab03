// How far the model is loaded, in a line above the conversation; and what only a server has, hidden.

import { load, PLACES, watchLoading } from "./api.js";
import { byId, h } from "./dom.js";

const bar = h("progress", { "aria-label": "Loading the model", max: "1" });
const text = h("span", {});
const button = h("button", { type: "button", class: "button", onclick: () => load().catch(() => {}) });
const line = h("div", { class: "loading", role: "status", hidden: true }, text, bar, button);
byId("scroller").before(line);

watchLoading(({ state, loaded, total, device, error }) => {
  line.hidden = state === "waiting" && !total;
  line.dataset.state = state;
  bar.hidden = state !== "loading";
  button.hidden = state !== "waiting" && state !== "failed";
  button.textContent = state === "failed" ? "Try again" : "Load the model";
  const all = size(total);
  if (state === "waiting") text.textContent = `The model is not loaded yet: ${all}.`;
  if (state === "failed") text.textContent = error;
  if (state === "ready") text.textContent = `Runs on this device’s ${PLACES[device]}.`;
  if (state === "loading") {
    const part = total ? loaded / total : 0;
    text.textContent = loaded ? `Loading the model: ${Math.floor(part * 100)} % of ${all}` : "Starting the model";
    if (loaded) bar.value = part;
    else bar.removeAttribute("value");
  }
});

// Keys belong to servers, and grammars to `relaxlm serve`.
byId("set-key").closest("fieldset").hidden = true;
byId("set-format").closest(".field").hidden = true;

function size(bytes) {
  const units = ["bytes", "kB", "MB", "GB"];
  const step = Math.min(3, Math.max(0, Math.floor(Math.log10(Math.max(bytes, 1)) / 3)));
  const number = bytes / 1000 ** step;
  return `${number < 10 && step ? number.toFixed(1) : Math.round(number)} ${units[step]}`;
}
