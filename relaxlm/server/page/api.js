// The server's OpenAI-shaped API: which models there are, and a reply as a stream of chunks.

const BASE = new URL("v1/", document.baseURI);
const KEY_NAME = "relaxlm.key";

/** Who writes the replies, and where conversations are kept. */
export const PLACE_NOTE =
  "This server writes the replies. Conversations are kept in this browser and nowhere else.";

/** What went wrong: `kind` is "key", "busy", "request", "server", "network" or "stream". */
export class ServerError extends Error {
  constructor(kind, message, { status = null, field = null, retryAfter = null } = {}) {
    super(message);
    this.kind = kind;
    this.status = status;
    this.field = field;
    this.retryAfter = retryAfter; // seconds
  }
}

// The key lives as long as the tab. Where the browser keeps nothing, it lives in this variable.
let key = null;

export function apiKey() {
  try {
    return sessionStorage.getItem(KEY_NAME) ?? key ?? "";
  } catch {
    return key ?? "";
  }
}

export function setApiKey(value) {
  key = value;
  try {
    if (value) sessionStorage.setItem(KEY_NAME, value);
    else sessionStorage.removeItem(KEY_NAME);
  } catch {
    // Storage is switched off: the variable has it.
  }
}

/** [{id, context}]: `context` in tokens, null where the server does not say. */
export async function listModels() {
  const response = await request("models", { method: "GET" });
  const { data } = await readJson(response);
  if (!Array.isArray(data)) throw new ServerError("server", "The list of models is not a list.");
  return data.map((model) => ({
    id: String(model.id),
    context: model.max_model_len ?? model.context_window_size ?? null,
  }));
}

/** The chunks of a streamed chat completion, as they come. */
export async function* streamChat(body, signal) {
  const response = await request("chat/completions", {
    method: "POST",
    body: JSON.stringify(body),
    signal,
  });
  const type = response.headers.get("content-type") ?? "";
  if (!type.startsWith("text/event-stream")) {
    throw new ServerError("server", `Expected a stream of events, the server sent "${type}".`);
  }
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const events = new EventParser();
  try {
    for (;;) {
      const { done, value } = await read(reader, signal);
      if (done) return;
      for (const data of events.push(decoder.decode(value, { stream: true }))) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw fromBody("stream", chunk);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // already closed, or aborted
  }
}

/** Server-sent events: text in any pieces -> the data of each complete event. */
export class EventParser {
  constructor() {
    this.buffer = "";
    this.data = [];
  }

  push(text) {
    this.buffer += text;
    const events = [];
    // A "\r" at the end may be half of "\r\n".
    const end = this.buffer.endsWith("\r") ? this.buffer.length - 1 : this.buffer.length;
    const lines = this.buffer.slice(0, end).split(/\r\n|\n|\r/);
    this.buffer = lines.pop() + this.buffer.slice(end);
    for (const line of lines) {
      if (line.startsWith("data:")) {
        this.data.push(line.slice(line[5] === " " ? 6 : 5));
      } else if (line === "" && this.data.length) {
        events.push(this.data.join("\n"));
        this.data = [];
      } // other fields and comments (": ping") carry nothing that this page uses
    }
    return events;
  }
}

async function request(path, options) {
  const headers = { "Content-Type": "application/json" };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServerError("network", "The server can’t be reached. Is it still running?");
  }
  if (!response.ok) throw await fromResponse(response);
  return response;
}

async function read(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError("network", "The connection to the server broke off.");
  }
}

async function readJson(response) {
  try {
    return await response.json();
  } catch {
    throw new ServerError("server", "The server’s answer is not JSON.");
  }
}

async function fromResponse(response) {
  const text = await response.text().catch(() => "");
  let body = {};
  try {
    body = JSON.parse(text) ?? {};
  } catch {
    // Not ours: a proxy's page, most likely. The status has to do.
  }
  const { status } = response;
  const busy = status === 429 || status === 503;
  const kind = status === 401 ? "key" : busy ? "busy" : status < 500 ? "request" : "server";
  const fallback = `The server answered ${status} ${response.statusText}`.trim() + ".";
  const after = Number.parseFloat(response.headers.get("retry-after") ?? "");
  return fromBody(kind, body, {
    fallback,
    status,
    retryAfter: Number.isFinite(after) ? after : null,
  });
}

function fromBody(kind, body, { fallback = "The server reports an error.", ...facts } = {}) {
  const { error } = body;
  const message = typeof error === "string" ? error : (error?.message ?? fallback);
  return new ServerError(kind, String(message), { ...facts, field: error?.param ?? null });
}
