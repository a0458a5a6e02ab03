// Short messages at the edge of the page, with one thing to do about them at most.

import { byId, h, iconButton } from "./dom.js";

const SHOWN_MS = 8000;

/** `action`: {label, run}, or nothing. Stays while the pointer or the focus is on it. */
export function toast(text, action = null) {
  let timer = 0;
  const remove = () => {
    clearTimeout(timer);
    node.remove();
  };
  const start = () => {
    timer = setTimeout(remove, SHOWN_MS);
  };
  const run = () => {
    remove();
    action.run();
  };
  const node = h(
    "div",
    {
      class: "toast",
      onpointerenter: () => clearTimeout(timer),
      onpointerleave: start,
      onfocusin: () => clearTimeout(timer),
      onfocusout: start,
    },
    h("span", {}, text),
    action ? h("button", { type: "button", onclick: run }, action.label) : null,
    iconButton("close", "Dismiss", remove),
  );
  byId("toasts").replaceChildren(node);
  start();
}
