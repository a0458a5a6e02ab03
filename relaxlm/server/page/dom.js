// Building elements. Text always becomes text nodes: nothing in this page parses HTML.

import { ICONS } from "./icons.js";

const SVG = "http://www.w3.org/2000/svg";

export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no element #${id}`);
  return found;
}

/**
 * An element. Properties that are functions are listeners ("onclick"), true and false set or leave
 * out an attribute, null and undefined are left out; children are nodes, strings or null.
 */
export function h(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", "icon");
  for (const data of ICONS[name]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", data);
    svg.append(path);
  }
  return svg;
}

/** A button that shows a picture only; `label` is its name and its tooltip. */
export function iconButton(name, label, onclick, properties = {}) {
  const { class: extra = "", ...others } = properties;
  return h(
    "button",
    {
      type: "button",
      class: `icon-button ${extra}`.trim(),
      "aria-label": label,
      title: label,
      onclick,
      ...others,
    },
    icon(name),
  );
}

/** Gives an icon button another picture and another name. */
export function relabel(button, name, label) {
  button.replaceChildren(icon(name));
  button.setAttribute("aria-label", label);
  button.title = label;
}

/** Puts pictures into the buttons of index.html that name one in data-icon. */
export function fillIcons(root = document) {
  for (const place of root.querySelectorAll("[data-icon]")) place.prepend(icon(place.dataset.icon));
}

/** The text goes to the clipboard; true if it did. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text); // no clipboard object on plain http, except on this machine
  }
}

function copyBySelection(text) {
  const before = document.activeElement;
  const area = h("textarea", { class: "visually-hidden", readonly: true, "aria-hidden": "true" });
  area.value = text;
  (before?.closest("dialog") ?? document.body).append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  before?.focus();
  return copied;
}

const CONFIRMATION_MS = 1600;

/** A button that copies what `text()` returns, and says so for a moment. */
export function copyButton(label, text, properties = {}) {
  let timer = 0;
  const button = iconButton(
    "copy",
    label,
    async () => {
      const copied = await copyText(text());
      relabel(button, copied ? "check" : "alert", copied ? "Copied" : "The browser refused");
      clearTimeout(timer);
      timer = setTimeout(() => relabel(button, "copy", label), CONFIRMATION_MS);
    },
    properties,
  );
  return button;
}

/** Names for stored things. (crypto.randomUUID exists on https and this machine only.) */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
