// What a reply cost, in words: one line, and a table behind it.

import { h, icon } from "./dom.js";
import { tokensPerSecond } from "./reply.js";

/** A button with the measurements of a version and the table that it opens; [] without any. */
export function statsViews(version) {
  const { usage, timing } = version;
  if (timing.first === null) return [];
  // What came all at once has no speed here, but it has one on the server.
  const speed = tokensPerSecond(version) ?? usage?.replySpeed ?? null;
  // Without the server's count: a chunk is mostly one token.
  const tokens = usage?.completion ?? null;
  const line = [
    speed === null ? null : `${decimals(speed)} tokens/s`,
    `first token ${seconds(timing.first)}`,
    tokens === null ? `about ${count(timing.pieces, "token")}` : count(tokens, "token"),
  ];
  const toggle = () => {
    table.hidden = !table.hidden;
    button.setAttribute("aria-expanded", String(!table.hidden));
  };
  const words = line.filter(Boolean).join(" · ");
  const button = h(
    "button",
    { type: "button", class: "stats", "aria-expanded": "false", onclick: toggle },
    words,
    icon("chevron"),
  );
  const cells = rows(version).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]);
  const table = h("dl", { class: "stats-table", hidden: true }, ...cells);
  return [button, table];
}

function rows(version) {
  const { usage, timing } = version;
  const speed = tokensPerSecond(version);
  const server = [usage?.queueSeconds, usage?.promptSpeed, usage?.replySpeed];
  const found = [
    ["Model", version.model || null],
    ["Prompt", usage?.prompt == null ? null : prompt(usage)],
    ["Reply", usage?.completion == null ? null : reply(usage)],
    ["Time to first token", seconds(timing.first)],
    ["Total time", seconds(timing.total)],
    ["Speed, measured here", speed === null ? null : `${decimals(speed)} tokens/s`],
    ["On the server: waiting", server[0] == null ? null : seconds(server[0])],
    ["On the server: prompt", server[1] == null ? null : `${decimals(server[1])} tokens/s`],
    ["On the server: reply", server[2] == null ? null : `${decimals(server[2])} tokens/s`],
    ["Ended by", ENDINGS[version.finish] ?? version.finish],
    ["Written", version.created ? new Date(version.created).toLocaleString() : null],
  ];
  return found.filter(([, value]) => value !== null);
}

const ENDINGS = {
  stop: "the model",
  length: "the limit of tokens",
  stopped: "you",
  null: null,
};

function prompt({ prompt: tokens, cached }) {
  return cached ? `${count(tokens, "token")}, ${cached} of them cached` : count(tokens, "token");
}

function reply({ completion, reasoning }) {
  const all = count(completion, "token");
  return reasoning ? `${all}, ${reasoning} of them thinking` : all;
}

function count(number, what) {
  return `${number.toLocaleString()} ${what}${number === 1 ? "" : "s"}`;
}

function decimals(number) {
  return number >= 100 ? number.toFixed(0) : number.toFixed(1);
}

export function seconds(value) {
  return value < 10 ? `${value.toFixed(2)} s` : `${value.toFixed(1)} s`;
}
