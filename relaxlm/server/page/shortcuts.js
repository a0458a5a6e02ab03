// Keys that work everywhere on the page; the dialog that lists them is made from the same table.

import { byId, h } from "./dom.js";

const IS_APPLE = /Mac|iPhone|iPad/.test(navigator.platform);
const COMMAND = IS_APPLE ? "⌘" : "Ctrl";

// Keys of single places, which handle them themselves.
const LOCAL = [
  { keys: ["Enter"], does: "Send the message" },
  { keys: ["Shift", "Enter"], does: "New line" },
  { keys: ["↑"], does: "Edit the last message, in the empty field" },
  { keys: ["↑", "↓"], does: "Move in the list of conversations" },
  { keys: ["F2"], does: "Rename the conversation, in the list" },
  { keys: ["Delete"], does: "Delete the conversation, in the list" },
];

/** `actions` by name; `escape()` is called for Esc outside dialogs. */
export function startShortcuts(actions) {
  const global = [
    { keys: [COMMAND, "K"], code: "KeyK", run: actions.search, does: "Search conversations" },
    { keys: [COMMAND, "Shift", "O"], code: "KeyO", run: actions.create, does: "New conversation" },
    { keys: [COMMAND, "B"], code: "KeyB", run: actions.sidebar, does: "Show or hide the list" },
    { keys: [COMMAND, ","], code: "Comma", run: actions.settings, does: "Settings" },
    { keys: [COMMAND, "Shift", "Enter"], code: "Enter", run: actions.regenerate, does: "Regenerate the reply" },
    { keys: [COMMAND, "/"], code: "Slash", run: actions.help, does: "This list" },
  ];
  const escape = { keys: ["Esc"], does: "Stop the reply" };
  byId("shortcuts").append(
    ...[...LOCAL.slice(0, 3), escape, ...global, ...LOCAL.slice(3)].flatMap(({ keys, does }) => [
      h("dt", {}, ...keys.map((key) => h("kbd", {}, key))),
      h("dd", {}, does),
    ]),
  );
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") return actions.escape();
    const found = global.find((shortcut) => fits(shortcut, event));
    if (!found) return undefined;
    event.preventDefault();
    return found.run();
  });
}

/** By the place of the key; for signs also by what the layout makes of it. */
function fits({ keys, code }, event) {
  const command = IS_APPLE ? event.metaKey : event.ctrlKey;
  const sign = keys[keys.length - 1];
  const key = event.code === code || event.key === sign;
  // On many layouts "/" is typed with Shift.
  const shift = event.key === "/" || event.shiftKey === keys.includes("Shift");
  return command && key && shift && !event.altKey;
}
