// Conversations as data. What is read from a file or from storage is checked field by field.
//
// conversation: {id, title, renamed, created, updated, settings, messages}
// message: {role: "user", content} or {role: "assistant", versions: [version], shown}
// version: {content, reasoning, finish, error, model, created, usage, timing}
//   finish: "stop", "length", "stopped" (by the reader), or null while it is being written
//   error: {kind, message, retryAfter} or null
//   usage: what the server counted, by the names in USAGE; null if it said nothing
//   timing: {first, thinking, total} in seconds, and {pieces}: how many chunks had text

import { newId } from "./dom.js";
import { readSettings } from "./settings.js";

export const FORMAT = "relaxlm-conversations";
const FORMAT_VERSION = 1;
// Tokens, then what the server measured: seconds, and tokens per second.
const USAGE = [
  ...["prompt", "cached", "completion", "reasoning"],
  ...["queueSeconds", "promptSpeed", "replySpeed"],
];
const TITLE_LENGTH = 60;
const UNTITLED = "New conversation";

export function newConversation(settings) {
  const now = Date.now();
  return {
    id: newId(),
    title: UNTITLED,
    renamed: false,
    created: now,
    updated: now,
    settings: readSettings(structuredClone(settings)),
    messages: [],
  };
}

export function newVersion(model) {
  return {
    content: "",
    reasoning: "",
    finish: null,
    error: null,
    model,
    created: Date.now(),
    usage: null,
    timing: { first: null, thinking: null, total: null, pieces: 0 },
  };
}

export function shownVersion(message) {
  return message.versions[message.shown];
}

/** What the list of conversations needs to know. */
export function summaryOf({ id, title, created, updated }) {
  return { id, title, created, updated };
}

/** The messages of a request: all before `until`, replies as they are shown. */
export function requestMessages(conversation, until) {
  const messages = [];
  for (const message of conversation.messages) {
    if (message === until) break;
    const content = message.role === "user" ? message.content : shownVersion(message).content;
    if (message.role === "user" || content) messages.push({ role: message.role, content });
  }
  return messages;
}

/** Names a conversation after its first question, unless it was named by hand. */
export function retitle(conversation) {
  if (conversation.renamed) return;
  const first = conversation.messages.find((message) => message.role === "user");
  const line = first?.content.trim().split("\n")[0].replaceAll(/\s+/g, " ") ?? "";
  const short = Array.from(line).slice(0, TITLE_LENGTH).join("");
  conversation.title = short.length < line.length ? `${short.trimEnd()}…` : short || UNTITLED;
}

export function matches(conversation, query) {
  const wanted = query.toLowerCase();
  const texts = [conversation.title, ...conversation.messages.map(textOf)];
  return texts.some((text) => text.toLowerCase().includes(wanted));
}

export function exportText(conversations) {
  const file = { format: FORMAT, version: FORMAT_VERSION, conversations };
  return `${JSON.stringify(file, null, 2)}\n`;
}

/** The conversations of an exported file. Throws an Error that says what is wrong with it. */
export function importText(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON.");
  }
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) {
    throw new Error(`This is not an export of this page: expected "format": "${FORMAT}".`);
  }
  if (file.version !== FORMAT_VERSION) {
    throw new Error(`This export has version ${file.version}, expected ${FORMAT_VERSION}.`);
  }
  return file.conversations.map((stored, i) => {
    const conversation = readConversation(stored);
    if (!conversation) throw new Error(`Conversation ${i + 1} of the file is damaged.`);
    return conversation;
  });
}

/** A conversation as stored, with unknown fields left out; null if it is none. */
export function readConversation(stored) {
  if (typeof stored?.id !== "string" || !/^[\w-]{1,64}$/.test(stored.id)) return null;
  if (!Array.isArray(stored.messages)) return null;
  const messages = stored.messages.map(readMessage);
  if (messages.includes(null)) return null;
  const created = wholeNumber(stored.created) ?? Date.now();
  return {
    id: stored.id,
    title: string(stored.title) || UNTITLED,
    renamed: stored.renamed === true,
    created,
    updated: wholeNumber(stored.updated) ?? created,
    settings: readSettings(stored.settings),
    messages,
  };
}

function readMessage(stored) {
  if (stored?.role === "user" && typeof stored.content === "string") {
    return { role: "user", content: stored.content };
  }
  if (stored?.role !== "assistant" || !Array.isArray(stored.versions)) return null;
  const versions = stored.versions.filter((version) => typeof version?.content === "string");
  if (!versions.length) return null;
  const shown = wholeNumber(stored.shown) ?? 0;
  return {
    role: "assistant",
    versions: versions.map(readVersion),
    shown: Math.min(Math.max(shown, 0), versions.length - 1),
  };
}

function readVersion(stored) {
  const { error, usage, timing } = stored;
  return {
    content: stored.content,
    reasoning: string(stored.reasoning),
    // A reply that was being written when the page was closed has no end.
    finish: string(stored.finish) || (error ? null : "stopped"),
    error: error ? { kind: string(error.kind), message: string(error.message) } : null,
    model: string(stored.model),
    created: wholeNumber(stored.created) ?? 0,
    usage: usage ? Object.fromEntries(USAGE.map((name) => [name, number(usage[name])])) : null,
    timing: {
      first: number(timing?.first),
      thinking: number(timing?.thinking),
      total: number(timing?.total),
      pieces: wholeNumber(timing?.pieces) ?? 0,
    },
  };
}

function textOf(message) {
  return message.role === "user" ? message.content : shownVersion(message).content;
}

function string(value) {
  return typeof value === "string" ? value : "";
}

function number(value) {
  return Number.isFinite(value) ? value : null;
}

function wholeNumber(value) {
  return Number.isSafeInteger(value) ? value : null;
}
