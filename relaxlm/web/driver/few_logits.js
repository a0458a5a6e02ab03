// The logits of a row of which a GPU has given some blocks: those with the largest ones, and named
// ones. To read a whole row after each step would take longer than choosing a token.

/** Neighbouring logits that come together (relaxlm/runtime/peaks.py). */
export const BLOCK = 256;

export class FewLogits {
  /**
   * @param {Float32Array} peaks the largest logit of each block of the row; NaN if one is none
   * @param {Map<number, Float32Array>} found the logits of blocks, by their numbers
   * @param {number} vocabSize logits from there on are padding
   */
  constructor(peaks, found, vocabSize) {
    const count = Math.ceil(vocabSize / BLOCK);
    const kept = [...found.keys()].filter((block) => block < count).sort((a, b) => a - b);
    this.blocks = kept;
    const length = kept.reduce((sum, block) => sum + Math.min(BLOCK, vocabSize - block * BLOCK), 0);
    /** Known logits, in the order of ids. */
    this.values = new Float32Array(length);
    this.starts = new Map(); // block -> its first place in `values`
    kept.forEach((block, i) => {
      this.starts.set(block, i * BLOCK);
      this.values.set(found.get(block).subarray(0, vocabSize - block * BLOCK), i * BLOCK);
    });
    /** No other logit is larger. */
    this.bound = -Infinity;
    for (let block = 0; block < count; block++) {
      if (!found.has(block)) this.bound = Math.max(this.bound, peaks[block]);
    }
  }

  /** The id of the logit at a place in `values`. */
  id(place) {
    return this.blocks[Math.floor(place / BLOCK)] * BLOCK + (place % BLOCK);
  }

  /** The place of an id in `values`, whose block is known. */
  place(id) {
    return this.starts.get(Math.floor(id / BLOCK)) + (id % BLOCK);
  }

  /** Whether the `count` largest of some values for the places are the row's `count` largest. */
  haveLargest(values, count) {
    if (count > values.length) return false;
    return Float64Array.from(values).sort()[values.length - count] > this.bound;
  }
}
