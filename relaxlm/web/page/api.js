// The model in this browser, in the shape of the server's API that the page knows (there,
// relaxlm/server/page/api.js): which models there are, and a reply as a stream of chunks.

import { RemoteChat } from "../relaxlm/index.js";

const MANIFEST = new URL("model.json", document.baseURI);
// Models up to this size, in bytes, are loaded when the page opens; others when they are wanted.
const SMALL = 64e6;
// Where a library runs, in the order in which they are tried.
export const PLACES = { webgpu: "GPU", wasm: "CPU" };

export const PLACE_NOTE =
  "The model runs in this browser: what you write stays on this device. Conversations are kept here and nowhere else.";

/** What went wrong: `kind` is "request", "server" or "network". */
export class ServerError extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
    this.status = null;
    this.field = null;
    this.retryAfter = null;
  }
}

export const apiKey = () => "";
export const setApiKey = () => {};

const loading = { state: "waiting", loaded: 0, total: 0, device: "", error: "" };
const watchers = [];
let model = null; // of the manifest
let chat = null; // the promise of a RemoteChat
let queue = Promise.resolve(); // replies are made one after the other

/** Calls back with `loading`, now and whenever it changes. */
export function watchLoading(callback) {
  watchers.push(callback);
  callback(loading);
}

function report(changes) {
  Object.assign(loading, changes);
  for (const callback of watchers) callback(loading);
}

export async function listModels() {
  if (!model) {
    try {
      const response = await fetch(MANIFEST, { cache: "no-cache" });
      model = await response.json();
    } catch (error) {
      throw new ServerError("network", `model.json cannot be read: ${error.message}`);
    }
    report({ total: model.bytes });
    if (model.bytes <= SMALL) load().catch(() => {}); // shown where loading is shown
  }
  return [{ id: model.name, context: model.context_window_size }];
}

/** Starts the model, if that has not been done. */
export function load() {
  chat ??= start().catch((error) => {
    chat = null;
    report({ state: "failed", error: error.message });
    throw error;
  });
  return chat;
}

async function start() {
  await listModels();
  const failures = [];
  for (const device of Object.keys(PLACES)) {
    const library = model.libraries[device];
    if (!library) continue;
    report({ state: "loading", loaded: 0, device, error: "" });
    try {
      const onProgress = ({ loaded = 0, total = model.bytes }) => report({ loaded, total });
      const started = await RemoteChat.load({ model: model.folder, library, onProgress });
      report({ state: "ready" });
      return started;
    } catch (error) {
      failures.push(`On the ${PLACES[device]}: ${error.message}.`);
      if (error.name !== "DeviceError") break;
    }
  }
  throw new ServerError("server", `The model can’t be started here. ${failures.join(" ")}`);
}

/** The chunks of a streamed chat completion, as they come. */
export async function* streamChat(body, signal) {
  if (body.response_format) {
    throw new ServerError("request", "Formats other than text need a server: relaxlm serve.");
  }
  const { messages, stop, chat_template_kwargs: variables, ...numbers } = body;
  for (const name of ["model", "stream", "stream_options"]) delete numbers[name];
  const before = queue;
  let finish;
  queue = new Promise((resolve) => (finish = resolve));
  try {
    await before;
    if (signal.aborted) throw new DOMException("Stopped.", "AbortError");
    const remote = await load();
    const reasoning = new ReasoningSplitter();
    for await (const text of remote.chat(messages, { ...numbers, stop }, { signal, variables })) {
      for (const delta of reasoning.push(text)) yield { choices: [{ delta }] };
    }
    for (const delta of reasoning.finish()) yield { choices: [{ delta }] };
    const { finishReason, tokens, promptTokens, reusedTokens, ...seconds } = remote.last;
    if (signal.aborted) throw new DOMException("Stopped.", "AbortError");
    const usage = {
      prompt_tokens: promptTokens,
      prompt_tokens_details: { cached_tokens: reusedTokens },
      completion_tokens: tokens.length,
      extra: {
        prefill_tokens_per_s: (promptTokens - reusedTokens) / seconds.prefillSeconds || null,
      },
    };
    yield { choices: [{ delta: {}, finish_reason: finishReason }], usage };
  } catch (error) {
    if (signal.aborted || error instanceof ServerError) throw error;
    const ours = /Error$/.test(error.name) && error.name !== "Error";
    throw new ServerError(ours ? "request" : "server", error.message);
  } finally {
    finish();
  }
}

const OPEN = "<think>";
const CLOSE = "</think>";

/** Takes a reply's thoughts, if it begins with them, apart from what it says. */
class ReasoningSplitter {
  constructor() {
    this.state = "start";
    this.held = "";
  }

  push(text) {
    this.held += text;
    if (this.state === "start") {
      const begun = this.held.trimStart();
      if (begun.startsWith(OPEN)) {
        this.state = "thinking";
        this.held = begun.slice(OPEN.length);
      } else if (OPEN.startsWith(begun)) {
        return [];
      } else {
        this.state = "speaking";
      }
    }
    if (this.state === "thinking") {
      const end = this.held.indexOf(CLOSE);
      if (end < 0) {
        const safe = Math.max(0, this.held.length - CLOSE.length);
        return this.passOn("reasoning_content", safe);
      }
      const thoughts = this.passOn("reasoning_content", end);
      this.state = "speaking";
      this.held = this.held.slice(CLOSE.length).trimStart();
      return [...thoughts, ...this.passOn("content", this.held.length)];
    }
    return this.passOn("content", this.held.length);
  }

  finish() {
    return this.passOn(this.state === "thinking" ? "reasoning_content" : "content", this.held.length);
  }

  passOn(name, length) {
    const text = this.held.slice(0, length);
    this.held = this.held.slice(length);
    return text ? [{ [name]: text }] : [];
  }
}
