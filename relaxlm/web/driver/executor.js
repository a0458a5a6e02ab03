// Runs steps of a compiled model: the only file that knows the order of `forward`'s arguments.

import { ContextOverflowError, RequestError } from "./errors.js";
import { BLOCK, FewLogits } from "./few_logits.js";

/** A library with weights, a KV cache and the states of recurrent layers, ready for steps. */
export class Executor {
  /**
   * @param {import("./library.js").Library} library
   * @param {object[]} params tensors in the library's order; belong to the executor from now on
   * @param {number} pages of the KV cache
   * @param {number} stateSlots of recurrent layers
   */
  constructor(library, params, pages, stateSlots = 0) {
    this.library = library;
    this.forwardFunction = library.function("forward");
    if (library.onGpu) {
      this.findPeaks = library.function("peaks");
      this.findHighest = library.function("highest_blocks");
      this.gather = library.function("gather_logits");
    }
    const { kv_cache: cache, state, limits, vocab_size } = library.metadata;
    this.limits = limits;
    this.vocabSize = vocab_size;
    const made = (rows, tensors) =>
      tensors.map(({ shape, dtype }) => library.empty([rows, ...shape], dtype, library.device));
    const kinds = [made(pages, cache.tensors)];
    if (state.tensors.length) kinds.push(made(stateSlots, state.tensors));
    this.params = library.tuple(params);
    /** Pages, and states if there are any: what a step updates in place. */
    this.cache = kinds.map((tensors) => library.tuple(tensors));
    // The tuples hold them now.
    for (const tensor of [...params, ...kinds.flat()]) tensor.dispose();
  }

  /**
   * Runs one step.
   *
   * @param tables from `PagedSequences.batch`
   * @param {number[]} inputIds the new tokens of all sequences, one after the other
   * @param {number[]} logitPositions rows of the step whose logits are wanted
   * @returns {Promise<Float32Array>} [rows * vocabulary]
   * @throws {RequestError} a token id outside the vocabulary
   * @throws {ContextOverflowError} more tokens than the library was compiled for
   */
  async forward(tables, inputIds, logitPositions) {
    const logits = this.start(tables, inputIds, logitPositions);
    try {
      const [found] = await read(this.library, [logits]);
      return found;
    } finally {
      logits.dispose();
    }
  }

  /**
   * Runs one step and chooses the token that follows one of its rows. Of a GPU's logits only those
   * are read that the choice looks at.
   *
   * @param {number} position of the row
   * @param {import("./sampling.js").Sampler} sampler
   * @returns {Promise<number>}
   * @throws as `forward` does, and {LibraryError} logits that are no finite numbers
   */
  async next(tables, inputIds, position, sampler) {
    const { library } = this;
    const logits = this.start(tables, inputIds, [position]);
    try {
      const wanted = library.onGpu ? sampler.blocksRead(Math.ceil(this.vocabSize / BLOCK)) : null;
      const token = wanted && sampler.choose(await this.few(logits, wanted, sampler.vocabSize));
      if (token !== null) return token;
      const [row] = await read(library, [logits]);
      return sampler.choose(row);
    } finally {
      logits.dispose();
    }
  }

  /** Runs one step of which only the cache is wanted; errors as for `forward`. */
  async fill(tables, inputIds) {
    const logits = this.start(tables, inputIds, [inputIds.length - 1]);
    try {
      if (this.library.onGpu) await this.library.device.sync();
    } finally {
      logits.dispose();
    }
  }

  /** Some blocks of one row of logits, which come from the GPU together. */
  async few(logits, { largest, named }, vocabSize) {
    const { library } = this;
    const made = [];
    const keep = (tensor) => made[made.push(tensor) - 1];
    try {
      const peaks = keep(run(library, this.findPeaks, logits));
      const highest = keep(run(library, this.findHighest, peaks, new Array(largest).fill(0)));
      keep(run(library, this.gather, logits, highest));
      if (named.length) keep(run(library, this.gather, logits, named));
      const [tops, numbers, ...pieces] = await read(library, made);
      const found = new Map();
      [numbers, named].forEach((blocks, i) =>
        blocks.forEach((block, j) => {
          found.set(block, pieces[i].subarray(j * BLOCK, (j + 1) * BLOCK));
        }),
      );
      return new FewLogits(tops, found, vocabSize);
    } finally {
      for (const tensor of made) tensor.dispose();
    }
  }

  /** Starts a step; its logits live until they are disposed of. */
  start(tables, inputIds, logitPositions) {
    const { library, limits } = this;
    if (inputIds.length > limits.prefill_chunk_size) {
      throw new ContextOverflowError(
        `a step with ${inputIds.length} tokens: the library was compiled for ` +
          `${limits.prefill_chunk_size}; compile with --overrides "prefill_chunk_size=..."`,
      );
    }
    const wrong = inputIds.find((id) => !(id >= 0 && id < this.vocabSize));
    if (wrong !== undefined) {
      throw new RequestError(`token id ${wrong} is outside the vocabulary of ${this.vocabSize}`);
    }
    const lists = [
      inputIds,
      tables.positions,
      tables.slots,
      tables.rowOffsets,
      tables.pageOffsets,
      tables.pageIds,
      tables.kvLengths,
      tables.dropped,
      ...(tables.stateSources ? [tables.stateSources, tables.stateTargets] : []),
      logitPositions,
    ];
    return run(library, this.forwardFunction, ...lists, ...this.cache, this.params);
  }

  dispose() {
    for (const tensors of this.cache) tensors.dispose();
    this.params.dispose();
    this.library.dispose();
  }
}

/** An encoder with weights: whole texts, and no cache. */
export class TextExecutor {
  constructor(library, params) {
    this.library = library;
    this.embeddings = library.function("embeddings");
    this.params = library.tuple(params);
    for (const tensor of params) tensor.dispose();
  }

  /**
   * Runs texts that fit into one step.
   *
   * @param {number[][]} texts token ids
   * @param {string} pooling of "cls" and "last" only one state is wanted
   * @returns {Promise<Float32Array[][]>} of each text the states [hidden] that are wanted
   */
  async run(texts, pooling) {
    const { library } = this;
    const positions = texts.flatMap((ids) => ids.map((_, i) => i));
    const offsets = [0];
    for (const ids of texts) offsets.push(offsets.at(-1) + ids.length);
    const wanted = texts.map((ids, i) => {
      if (pooling === "cls") return [offsets[i]];
      if (pooling === "last") return [offsets[i + 1] - 1];
      return ids.map((_, at) => offsets[i] + at);
    });
    const lists = [texts.flat(), positions, offsets, wanted.flat()];
    const tensor = run(library, this.embeddings, ...lists, this.params);
    const [states] = await read(library, [tensor]).finally(() => tensor.dispose());
    const size = library.metadata.hidden_size;
    let row = 0;
    return wanted.map((rows) =>
      rows.map(() => states.subarray(row++ * size, row * size)),
    );
  }

  dispose() {
    this.params.dispose();
    this.library.dispose();
  }
}

/** The result of a function of int32 lists and tensors; it lives until it is disposed of. */
function run(library, compute, ...given) {
  const { tvm } = library;
  tvm.beginScope();
  try {
    const inputs = given.map((value) => {
      if (!Array.isArray(value)) return value;
      const tensor = tvm.empty([value.length], "int32", library.device);
      library.upload(tensor, new Uint8Array(Int32Array.from(value).buffer));
      return tensor;
    });
    return tvm.detachFromCurrentScope(compute(...inputs));
  } finally {
    tvm.endScope();
  }
}

/** What tensors hold, flat, when all that was started before has been computed. */
async function read(library, tensors) {
  if (!library.onGpu) return tensors.map((tensor) => tensor.toArray());
  const copies = [];
  try {
    for (const { shape, dtype } of tensors) copies.push(library.empty(shape, dtype, library.cpu));
    copies.forEach((copy, i) => copy.copyFrom(tensors[i]));
    await library.device.sync();
    return copies.map((copy) => copy.toArray());
  } finally {
    for (const copy of copies) copy.dispose();
  }
}
