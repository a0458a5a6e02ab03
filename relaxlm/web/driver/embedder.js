// Texts to vectors with an encoder (relaxlm/runtime/embedding.py).
//
//   const embedder = await Embedder.load({ model: "model/", library: "model/bge-wasm.wasm" });
//   const [one, other] = await embedder.embed(["a cat", "a dog"]);

import { ContextOverflowError, LibraryError, RequestError } from "./errors.js";
import { TextExecutor } from "./executor.js";
import { openModel } from "./model.js";

export class Embedder {
  /**
   * Loads a model; options are those of `ChatModule.load`, without `contextWindowSize`.
   *
   * @returns {Promise<Embedder>}
   * @throws {RelaxLMError} what is wrong with the folder, the library or the device
   */
  static load(options) {
    return openModel(options, "embedding", (parts) => new Embedder(parts));
  }

  constructor({ library, params, config, tokenizer }) {
    if (!library.metadata.is_encoder) {
      throw new LibraryError(
        `${library.metadata.model_type} is a decoder: this driver embeds with encoders; use Python`,
      );
    }
    this.executor = new TextExecutor(library, params);
    this.tokenizer = tokenizer;
    const { pooling_strategy = "cls", normalize = true } = config.embedding_metadata ?? {};
    Object.assign(this, { pooling: pooling_strategy, normalize });
    this.section = config.relaxlm?.embedding ?? {};
  }

  /** What the library says of itself. */
  get metadata() {
    return this.executor.library.metadata;
  }

  /**
   * One vector per text.
   *
   * @param {string | string[]} texts
   * @param {object} options
   * @param {string} options.promptName which of the model's prompts comes in front of every text;
   *     the model's own choice if left out
   * @param {string} options.prompt its words instead
   * @param {number} options.dimensions how many numbers of each vector to keep
   * @param {boolean} options.truncate cut off the end of a text that is too long
   * @returns {Promise<Float32Array[]>}
   * @throws {RequestError} no text, an empty one, no such prompt, or too many dimensions
   * @throws {ContextOverflowError} a text that is too long
   */
  async embed(texts, { promptName, prompt, dimensions, truncate = false } = {}) {
    if (prompt !== undefined && promptName !== undefined) {
      throw new RequestError("prompt and promptName are both given: give one of them");
    }
    const front = prompt ?? this.prompt(promptName);
    const list = typeof texts === "string" ? [texts] : texts;
    const ids = this.checked(list.map((text) => this.ids(text, front, truncate)));
    const size = this.metadata.hidden_size;
    const whole = Number.isInteger(dimensions) && dimensions >= 1 && dimensions <= size;
    if (dimensions !== undefined && !whole) {
      throw new RequestError(
        `dimensions = ${dimensions}: this model's vectors have ${size} numbers, expected 1 to ${size}`,
      );
    }
    const vectors = [];
    while (vectors.length < ids.length) {
      const together = this.together(ids.slice(vectors.length));
      for (const states of await this.executor.run(together, this.pooling)) {
        vectors.push(finish(pooled(states, this.pooling), this.normalize, dimensions));
      }
    }
    return vectors;
  }

  /** Gives the memory back; nothing can be called afterwards. */
  dispose() {
    this.executor.dispose();
  }

  prompt(given) {
    const { prompts = {}, default_prompt_name: standard } = this.section;
    const name = given ?? standard ?? null;
    if (name === null) return "";
    if (!Object.hasOwn(prompts, name)) {
      const known = Object.keys(prompts).join(", ") || "none";
      throw new RequestError(`promptName = ${name}: this model's prompts are ${known}`);
    }
    return prompts[name];
  }

  ids(text, prompt, truncate) {
    if (typeof text !== "string") throw new RequestError("a text to embed is no string");
    if (!text) return [];
    let whole = prompt + text;
    if (this.section.strip) whole = whole.trim();
    if (this.section.lowercase) whole = whole.toLowerCase();
    return this.tokenizer.encodeFramed(whole, truncate ? this.longest : undefined);
  }

  get longest() {
    return this.metadata.limits.context_window_size;
  }

  checked(texts) {
    if (!texts.length) throw new RequestError("no text to embed: expected at least one");
    texts.forEach((ids, i) => {
      if (!ids.length) throw new RequestError(`text ${i} has no tokens, expected at least one`);
      if (ids.length > this.longest) {
        throw new ContextOverflowError(
          `text ${i} has ${ids.length} tokens, the context window ${this.longest}: shorten it, or ` +
            "let its end be cut off with truncate",
        );
      }
    });
    return texts;
  }

  /** The first texts, as many as fit into one step. */
  together(texts) {
    const { max_batch_size: most, prefill_chunk_size: room } = this.metadata.limits;
    let [count, tokens] = [0, 0];
    while (count < Math.min(most, texts.length) && tokens + texts[count].length <= room) {
      tokens += texts[count++].length;
    }
    return texts.slice(0, Math.max(count, 1));
  }
}

/** One vector of a text's states, which are its first or last one where that is all that is needed. */
function pooled(states, pooling) {
  if (pooling === "cls" || pooling === "last") return Float64Array.from(states[0]);
  const result = Float64Array.from(states[0]);
  for (const state of states.slice(1)) {
    state.forEach((x, i) => {
      result[i] = pooling === "mean" ? result[i] + x : Math.max(result[i], x);
    });
  }
  return pooling === "mean" ? result.map((x) => x / states.length) : result;
}

/** The first `dimensions` numbers, brought to length 1 if wanted. */
function finish(vector, normalize, dimensions) {
  const part = vector.slice(0, dimensions);
  const length = normalize ? Math.hypot(...part) : 1;
  return Float32Array.from(part, (x) => (length ? x / length : x));
}
