// The page tables of the sequences in the paged KV cache, and the slots of recurrent layers' states:
// relaxlm/runtime/sequence_table.py without forks, so that every page has one holder.
//
// Sliding window: pages between those of the sinks and the window leave the table, whole, at the
// start of the first step in which no query sees any of their tokens. Positions stay absolute.

import { ContextOverflowError, RequestError } from "./errors.js";
import { noState } from "./state_slots.js";

/** Hands out numbers 0 .. total - 1, of pages or slots, low ones first, and takes them back. */
export class PagePool {
  constructor(total) {
    this.total = total;
    this.available = Array.from({ length: total }, (_, i) => total - 1 - i);
    this.holders = new Int32Array(total);
  }

  get free() {
    return this.available.length;
  }

  take(count) {
    const taken = Array.from({ length: count }, () => this.available.pop());
    for (const page of taken) this.holders[page] = 1;
    return taken;
  }

  /** Adds a holder to what has one. */
  retain(page) {
    this.holders[page]++;
  }

  release(pages) {
    const freed = pages.filter((page) => --this.holders[page] === 0);
    this.available.push(...freed.toReversed());
  }
}

/** Sequences of tokens over a pool of pages, and the tables of a step. Counts are in tokens. */
export class PagedSequences {
  /**
   * @param {PagePool} pool
   * @param {number} pageSize tokens per page
   * @param {number} window tokens that a query sees, itself included; 0 for all of them
   * @param {number} sinks first tokens that stay visible when the window has moved on
   * @param {import("./state_slots.js").StateSlots | null} states of recurrent layers, if there are any
   */
  constructor(pool, pageSize, window = 0, sinks = 0, states = null) {
    this.states = states;
    this.pool = pool;
    this.pageSize = pageSize;
    this.window = window;
    this.sinkPages = Math.ceil(sinks / pageSize);
    this.sequences = new Map();
    this.next = 0;
  }

  /** Starts an empty sequence; returns its number, which is never given out again. */
  add() {
    this.sequences.set(this.next, { length: 0, dropped: 0, pages: [], state: noState() });
    return this.next++;
  }

  /** Ends a sequence and lets go of its pages, and of its states. */
  free(seq) {
    const { pages, state } = this.get(seq);
    this.pool.release(pages);
    this.states?.release(state);
    this.sequences.delete(seq);
  }

  /** Tokens appended so far, including those that have left the window. */
  length(seq) {
    return this.get(seq).length;
  }

  /**
   * Keeps the state of now, so that `truncate` can come back to this length. Without recurrent
   * layers it can anyway, and nothing happens.
   */
  keepState(seq) {
    const { state, length } = this.get(seq);
    this.states?.keep(state, length);
  }

  /** The most of the first `length` tokens that `truncate` can go back to. */
  longestPrefix(seq, length) {
    const kept = this.states ? this.get(seq).state.kept : [];
    const earlier = kept.map(([tokens]) => tokens).filter((tokens) => tokens < length);
    return [length, ...earlier.toReversed(), 0].find((tokens) => this.canTruncate(seq, tokens));
  }

  /**
   * Whether the pages still hold every token that a query at position `length` sees, and recurrent
   * layers the state before it.
   */
  canTruncate(seq, length) {
    const { dropped, state, length: now } = this.get(seq);
    if (this.states && !this.states.canCut(state, now, length)) return false;
    const kept = this.sinkPages * this.pageSize;
    return dropped === 0 || length <= kept || length - this.window + 1 >= kept + dropped;
  }

  /** Forgets all but the first `length` tokens. Throws a RequestError if they are not all there. */
  truncate(seq, length) {
    const sequence = this.get(seq);
    if (!(length >= 0 && length <= sequence.length)) {
      throw new RangeError(`sequence ${seq} has ${sequence.length} tokens: cannot keep ${length}`);
    }
    if (!this.canTruncate(seq, length)) {
      throw new RequestError(
        `sequence ${seq} cannot go back from ${sequence.length} to ${length} tokens: ` +
          `${this.whyNot(sequence, length)}. Prefill it again from the start`,
      );
    }
    this.states?.cut(sequence.state, sequence.length, length);
    if (length <= this.sinkPages * this.pageSize) sequence.dropped = 0;
    const count = Math.ceil((length - sequence.dropped) / this.pageSize);
    this.pool.release(sequence.pages.splice(count));
    sequence.length = length;
  }

  whyNot({ state, length: now }, length) {
    if (this.states && !this.states.canCut(state, now, length)) {
      return "its recurrent state after them was not kept";
    }
    return `some of them have left its window of ${this.window} tokens`;
  }

  /**
   * Appends tokens to sequences.
   *
   * @param {Array<[number, number]>} steps sequence and number of new tokens, at least 1
   * @returns the arguments of `forward` that say where the tokens are (docs/architecture.md)
   * @throws {ContextOverflowError} too few pages, or slots of states, are free; nothing has changed
   */
  batch(steps) {
    const size = this.pageSize;
    const plans = steps.map(([seq, count]) => {
      if (!(count >= 1)) throw new RangeError(`sequence ${seq}: cannot append ${count} tokens`);
      const sequence = this.get(seq);
      const grow = Math.ceil((sequence.length - sequence.dropped + count) / size);
      return { sequence, count, drop: this.toDrop(sequence), grow: grow - sequence.pages.length };
    });
    const sum = (name) => plans.reduce((total, plan) => total + plan[name], 0);
    const [needed, free] = [sum("grow"), this.pool.free + sum("drop")];
    if (needed > free) {
      throw new ContextOverflowError(
        `${needed} more pages are needed for ${sum("count")} tokens, ${free} of ` +
          `${this.pool.total} are free`,
      );
    }
    const states = plans.map(({ sequence }) => sequence.state);
    this.states?.require(states);
    // Pages that leave the window go first: this step may need them.
    const leaving = plans.flatMap(({ sequence, drop }) => {
      sequence.dropped += drop * size;
      return sequence.pages.splice(this.sinkPages, drop);
    });
    this.pool.release(leaving);
    for (const { sequence, count, grow } of plans) {
      sequence.pages.push(...this.pool.take(grow));
      sequence.length += count;
    }
    const tables = this.tables(plans);
    if (!this.states) return tables;
    const [stateSources, stateTargets] = this.states.step(states);
    return { ...tables, stateSources, stateTargets };
  }

  tables(plans) {
    const [positions, slots, pageIds] = [[], [], []];
    const [rowOffsets, pageOffsets] = [[0], [0]];
    for (const { sequence, count } of plans) {
      for (let position = sequence.length - count; position < sequence.length; position++) {
        const cached = position - sequence.dropped;
        const page = sequence.pages[Math.floor(cached / this.pageSize)];
        positions.push(position);
        slots.push(page * this.pageSize + (cached % this.pageSize));
      }
      pageIds.push(...sequence.pages);
      rowOffsets.push(positions.length);
      pageOffsets.push(pageIds.length);
    }
    const kvLengths = plans.map(({ sequence }) => sequence.length - sequence.dropped);
    const dropped = plans.map(({ sequence }) => sequence.dropped);
    return { positions, slots, rowOffsets, pageOffsets, pageIds, kvLengths, dropped };
  }

  /** Pages after the sinks of which no query from position `length` on sees a token. */
  toDrop(sequence) {
    if (!this.window) return 0;
    const invisible = Math.floor((sequence.length - this.window + 1) / this.pageSize);
    return Math.max(0, invisible - this.sinkPages - sequence.dropped / this.pageSize);
  }

  get(seq) {
    const sequence = this.sequences.get(seq);
    if (!sequence) throw new RangeError(`there is no sequence ${seq}: never added, or freed`);
    return sequence;
  }
}

/** The most pages that one sequence ever holds; `chunk` tokens at most are appended at once. */
export function pagesPerSequence(tokens, chunk, pageSize, window = 0, sinks = 0) {
  const pages = Math.ceil(tokens / pageSize);
  if (!window) return pages;
  const moving = Math.ceil((pageSize - 1 + window - 1 + chunk) / pageSize);
  return Math.min(pages, Math.ceil(sinks / pageSize) + moving);
}
