// One conversation with one model (relaxlm/runtime/chat_module.py).
//
//   const chat = await ChatModule.load({ model: "model/", library: "model/demo-webgpu.wasm" });
//   for await (const text of chat.chat("What is 12 + 30?")) show(text);
//
// The KV cache of earlier turns is reused: of a new prompt only what differs is computed. Recurrent
// layers can go back to few states: that of now, and those behind the messages of the last two
// prompts. When a conversation outgrows the context window, its oldest turns are forgotten.

import { ConfigError, ContextOverflowError, RequestError, TemplateError } from "./errors.js";
import { Executor } from "./executor.js";
import { openModel } from "./model.js";
import { PagedSequences, PagePool, pagesPerSequence } from "./page_tables.js";
import { PromptBuilder } from "./prompt.js";
import { Sampler } from "./sampling.js";
import { generationSettings } from "./settings.js";
import { MOST_KEPT, slotsFor, StateSlots } from "./state_slots.js";
import { StopStrings } from "./stop.js";

const SAMPLING = [
  ...["temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty"],
];
// Tokens; more than any conversation with a sliding window will have.
const ENDLESS = 2 ** 31 - 1;

export class ChatModule {
  /**
   * Loads a model: its library, tokenizer and weights.
   *
   * @param {object} options
   * @param {string | object} options.model address of the folder made by `relaxlm convert_weight` and
   *     `gen_config`, or its files (`WebFiles`, `DiskFiles`)
   * @param {string | Uint8Array} options.library address of the .wasm file, or its bytes
   * @param {number} options.contextWindowSize tokens; the library's if left out
   * @param {(progress: {stage: string, loaded?: number, total?: number}) => void} options.onProgress
   * @throws {RelaxLMError} what is wrong with the folder, the library or the device
   */
  static load(options) {
    return openModel(options, "chat", ({ library, params, config, tokenizer }) => {
      tokenizer.stream(); // refuses tokenizers whose text is not final as it comes
      return new ChatModule(library, params, config, tokenizer, options.contextWindowSize);
    });
  }

  constructor(library, params, config, tokenizer, contextWindowSize) {
    const { limits, kv_cache: cache, state } = library.metadata;
    if (contextWindowSize > limits.context_window_size) {
      throw new ConfigError(
        `contextWindowSize = ${contextWindowSize}, but the library was compiled for ` +
          `${limits.context_window_size}: compile with --overrides "context_window_size=..."`,
      );
    }
    this.window = limits.sliding_window_size;
    this.contextWindowSize = contextWindowSize ?? limits.context_window_size;
    const pages = pagesPerSequence(
      this.window ? ENDLESS : this.contextWindowSize,
      limits.prefill_chunk_size,
      cache.page_size,
      this.window,
      limits.attention_sink_size,
    );
    const slots = state.tensors.length ? slotsFor(1, MOST_KEPT) : 0;
    this.executor = new Executor(library, params, pages, slots);
    this.sequences = new PagedSequences(
      new PagePool(pages),
      cache.page_size,
      this.window,
      limits.attention_sink_size,
      slots ? new StateSlots(new PagePool(slots)) : null,
    );
    this.config = config;
    this.tokenizer = tokenizer;
    this.prompts = new PromptBuilder(config, tokenizer);
    /** Ids from here on are padding of the weight matrix and never chosen. */
    this.vocabSize = Math.min(library.metadata.vocab_size, tokenizer.vocabSize);
    /** The conversation so far. */
    this.messages = [];
    /** How many messages the last prompt left out, the context being full. */
    this.forgottenMessages = 0;
    /** The last reply: its tokens, text and finishReason, and counts and seconds. */
    this.last = null;
    this.cached = null; // the sequence in the KV cache and the tokens it holds
    this.busy = false;
  }

  /** What the library says of itself. */
  get metadata() {
    return this.executor.library.metadata;
  }

  /**
   * Answers a prompt, piece by piece. The conversation goes on with the reply when it has ended,
   * also if the caller stops early; then with what was said until then.
   *
   * @param {string | Array<{role: string, content: string}>} prompt the next message of the user,
   *     or messages that take the place of the conversation so far
   * @param {object} settings temperature, top_p, max_tokens, ..., as in Python
   * @param {{signal?: AbortSignal, variables?: object}} options a signal that ends the reply; names
   *     that the chat template reads ("enable_thinking")
   * @returns {AsyncGenerator<string>} text as it becomes final
   * @throws {ContextOverflowError} the prompt does not fit into the context window
   * @throws {RequestError | TemplateError} the conversation is as it was before
   */
  async *chat(prompt, settings = {}, { signal, variables } = {}) {
    if (this.busy) throw new RequestError("a reply is being made: wait for it, or stop it first");
    this.busy = true;
    try {
      const chosen = this.settings(settings);
      const messages =
        typeof prompt === "string" ? [...this.messages, { role: "user", content: prompt }] : prompt;
      const [kept, ids] = this.fit(messages, chosen, variables);
      const reply = new Reply(this, chosen, ids);
      try {
        const keep = this.sequences.states ? this.sharedLater(kept, ids, variables) : 0;
        yield* this.run(reply, ids, keep, signal);
      } finally {
        this.last = reply.summary();
        if (reply.text || reply.finishReason === "stop" || reply.finishReason === "length") {
          this.messages = [...kept, { role: "assistant", content: reply.text }];
          this.forgottenMessages = messages.length - kept.length;
        }
      }
    } finally {
      this.busy = false;
    }
  }

  /** The whole reply to a prompt; arguments as for `chat`. */
  async generate(prompt, settings = {}, options = {}) {
    let text = "";
    for await (const piece of this.chat(prompt, settings, options)) text += piece;
    return text;
  }

  /** A generation's settings: those given, then the folder's. */
  settings(given) {
    const { relaxlm: section = {} } = this.config;
    const file = Object.fromEntries(SAMPLING.map((name) => [name, this.config[name]]));
    return generationSettings(given, { ...file, top_k: section.top_k, min_p: section.min_p });
  }

  /** Forgets the conversation. */
  reset() {
    if (this.busy) throw new RequestError("a reply is being made: wait for it, or stop it first");
    this.messages = [];
    this.forgottenMessages = 0;
    this.dropCache();
  }

  /** Gives the memory back; nothing can be called afterwards. */
  dispose() {
    this.executor.dispose();
  }

  /** Computes a prompt and the reply; of the first `keep` tokens the state is kept to go back to. */
  async *run(reply, ids, keep, signal) {
    const { executor, sequences } = this;
    const seq = this.reusable(ids);
    const chunk = executor.limits.prefill_chunk_size;
    reply.promptTokens = ids.length;
    reply.reusedTokens = sequences.length(seq);
    let finished = false;
    try {
      let started = now();
      let token;
      for (let at = sequences.length(seq); at < ids.length; at = sequences.length(seq)) {
        signal?.throwIfAborted();
        const piece = ids.slice(at, Math.min(at + chunk, at < keep ? keep : ids.length));
        const tables = sequences.batch([[seq, piece.length]]);
        if (at + piece.length < ids.length) await executor.fill(tables, piece);
        else token = await executor.next(tables, piece, piece.length - 1, reply.sampler);
        if (at + piece.length === keep) sequences.keepState(seq);
      }
      reply.prefillSeconds = (now() - started) / 1000;
      started = now();
      for (;;) {
        let text = reply.push(token);
        reply.decodeSeconds = (now() - started) / 1000;
        if (signal?.aborted && !reply.finishReason) text += reply.cancel();
        if (text) yield text;
        if (reply.finishReason) break;
        await breath(executor.library.onGpu);
        token = await executor.next(sequences.batch([[seq, 1]]), [token], 0, reply.sampler);
      }
      finished = true;
    } catch (error) {
      if (error.name !== "AbortError" || !signal?.aborted) throw error;
      reply.cancel();
      finished = true;
    } finally {
      // A caller that stops early ends the generator here, between two steps.
      if (!reply.finishReason && reply.tokens.length) reply.cancel();
      if (finished || reply.finishReason) {
        const held = sequences.length(seq);
        this.cached = { seq, tokens: [...ids, ...reply.tokens].slice(0, held) };
      } else {
        this.cached = { seq, tokens: [] };
        this.dropCache(); // it holds an unknown part of the prompt and the reply
      }
    }
  }

  /** The cached sequence, cut back to what it has in common with a prompt. */
  reusable(ids) {
    if (this.cached) {
      const { seq, tokens } = this.cached;
      // The last token has to run: its logits choose the first token of the reply.
      const most = Math.min(commonLength(tokens, ids), ids.length - 1);
      const common = this.sequences.longestPrefix(seq, most);
      if (common) {
        this.sequences.truncate(seq, common);
        return seq;
      }
    }
    this.dropCache();
    return this.sequences.add();
  }

  /**
   * How many of a prompt's tokens the next one begins with, at least if it goes on with the
   * conversation or asks for another reply: those before the reply's own beginning.
   */
  sharedLater(messages, ids, variables) {
    try {
      const shared = this.prompts.encode(messages, variables, false);
      return Math.min(commonLength(shared, ids), ids.length - 1);
    } catch (error) {
      if (error instanceof TemplateError) return 0;
      throw error;
    }
  }

  dropCache() {
    if (this.cached) this.sequences.free(this.cached.seq);
    this.cached = null;
  }

  /** Forgets the oldest turns until prompt and reply fit. */
  fit(messages, { max_tokens }, variables) {
    const window = this.contextWindowSize;
    let ids = this.prompts.encode(messages, variables);
    const quarter = Math.floor(window / 4);
    const reserve = Math.min(max_tokens ?? quarter, quarter);
    while (!this.window && ids.length + reserve > window) {
      const shorter = withoutOldestTurn(messages);
      if (!shorter) break;
      messages = shorter;
      ids = this.prompts.encode(messages, variables);
    }
    if (!ids.length) throw new RequestError("the prompt has no tokens, expected at least one");
    if (!this.window && ids.length >= window) {
      throw new ContextOverflowError(
        `the prompt has ${ids.length} tokens, the context window ${window}: shorten the prompt`,
      );
    }
    return [messages, ids];
  }

  /** The most tokens that a reply may have. */
  room(prompt) {
    return this.window ? ENDLESS : Math.max(1, this.contextWindowSize - prompt);
  }
}

/** One reply while it grows. */
class Reply {
  constructor(chat, settings, ids) {
    const { stopTokenIds, stopStrings } = chat.prompts;
    const ends = settings.ignore_eos ? [] : stopTokenIds;
    this.sampler = new Sampler(settings, ids, chat.vocabSize);
    this.decoder = chat.tokenizer.stream();
    this.stops = new StopStrings([...(settings.ignore_eos ? [] : stopStrings), ...settings.stop]);
    this.endTokens = new Set([...ends, ...settings.stop_token_ids]);
    const room = chat.room(ids.length);
    this.maxTokens = Math.min(settings.max_tokens ?? room, room);
    this.tokens = [];
    this.text = "";
    this.finishReason = null; // "stop", "length" or "cancelled"
    Object.assign(this, { promptTokens: 0, reusedTokens: 0, prefillSeconds: 0, decodeSeconds: 0 });
  }

  /** Takes the next token; returns the text that has become final with it. */
  push(token) {
    this.tokens.push(token);
    if (this.endTokens.has(token)) return this.end(this.decoder.finish(), "stop");
    let text = this.passOn(this.decoder.push([token]));
    if (!this.finishReason && this.tokens.length >= this.maxTokens) text += this.end("", "length");
    return text;
  }

  cancel() {
    return this.end("", "cancelled");
  }

  summary() {
    const { tokens, text, finishReason, promptTokens, reusedTokens } = this;
    const { prefillSeconds, decodeSeconds } = this;
    const facts = { tokens, text, finishReason, promptTokens, reusedTokens };
    return { ...facts, prefillSeconds, decodeSeconds };
  }

  passOn(piece) {
    const text = this.stops.push(piece);
    this.text += text;
    if (this.stops.stopped) this.finishReason = "stop";
    return text;
  }

  end(rest, reason) {
    let text = this.passOn(rest);
    if (!this.finishReason) {
      const held = this.stops.flush();
      this.text += held;
      text += held;
      this.finishReason = reason;
    }
    return text;
  }
}

const now = () => performance.now();

/** How many of the first tokens are the same. */
function commonLength(one, other) {
  let common = 0;
  while (common < one.length && one[common] === other[common]) common++;
  return common;
}

/** Lets timers, messages and a page's events in between two steps on the CPU. */
const breath = (onGpu) => (onGpu ? undefined : new Promise((resolve) => setTimeout(resolve)));

/** Without the first message that is no system message, and its answers; null if it is the last. */
function withoutOldestTurn(messages) {
  const start = messages.findIndex(({ role }) => role !== "system");
  const end = messages.findIndex(({ role }, i) => i > start && role === "user");
  return end < 0 ? null : [...messages.slice(0, start), ...messages.slice(end)];
}
