// Who has which slot of the recurrent layers' state tensors: relaxlm/runtime/state_slots.py without
// forks.
//
// A state is that after a sequence's last token. What a sequence may go back to, it has to keep. A
// slot that is kept is never written: the next step writes to a fresh one, and the sequence lets go
// of the one it has read.

import { ContextOverflowError } from "./errors.js";

/** Earlier states that a sequence may keep. */
export const MOST_KEPT = 2;

/** Slots with which no step of so many sequences lacks one. */
export function slotsFor(sequences, kept) {
  return sequences + Math.floor(sequences / 2) + kept;
}

/** What a new sequence has: no slot, and no (tokens, slot) of earlier states. */
export const noState = () => ({ slot: null, kept: [] });

/** The slots of a step, and what earlier states need of them. */
export class StateSlots {
  /** @param {import("./page_tables.js").PagePool} pool of slots; nobody else takes any */
  constructor(pool, mostKept = MOST_KEPT) {
    Object.assign(this, { pool, mostKept });
  }

  /** @throws {ContextOverflowError} too few slots are free for a step of these sequences */
  require(states) {
    const needed = this.needed(states);
    if (needed > this.pool.free) {
      throw new ContextOverflowError(
        `${needed} more states are needed for ${states.length} sequences, ${this.pool.free} of ` +
          `${this.pool.total} are free`,
      );
    }
  }

  needed(states) {
    return states.filter((state) => !this.isAlone(state)).length;
  }

  /** Whether a step may write the state where it is. */
  isAlone({ slot }) {
    return slot !== null && this.pool.holders[slot] === 1;
  }

  /** Gives each sequence a slot to write to; there are enough. Returns [sources, targets]. */
  step(states) {
    const fresh = this.pool.take(this.needed(states)).values();
    const shared = [];
    const sources = [];
    for (const state of states) {
      const alone = this.isAlone(state);
      const before = state.slot;
      if (!alone) state.slot = fresh.next().value;
      if (!alone && before !== null) shared.push(before);
      sources.push(before ?? state.slot);
    }
    // Not before all fresh ones are taken, for those that are shared are read in this step.
    this.pool.release(shared);
    return [sources, states.map(({ slot }) => slot)];
  }

  /** Whether there is a state after the first `length` of a sequence's `now` tokens. */
  canCut({ kept }, now, length) {
    return length === 0 || length === now || kept.some(([tokens]) => tokens === length);
  }

  /** Goes back to the state after the first `length` tokens, which there is. */
  cut(state, now, length) {
    if (length === now) return;
    const slot = length ? new Map(state.kept).get(length) : null;
    if (slot !== null) this.pool.retain(slot);
    const kept = state.kept.filter(([tokens]) => tokens <= length);
    this.release({ slot: state.slot, kept: state.kept.slice(kept.length) });
    Object.assign(state, { slot, kept });
  }

  /** Keeps the state of now, after `now` tokens, to come back to. */
  keep(state, now) {
    if (state.slot === null || state.kept.some(([tokens]) => tokens === now)) return;
    this.pool.retain(state.slot);
    state.kept.push([now, state.slot]);
    if (state.kept.length > this.mostKept) this.pool.release([state.kept.shift()[1]]);
  }

  /** Lets go of all of a sequence's slots. */
  release({ slot, kept }) {
    const own = slot === null ? [] : [slot];
    this.pool.release([...own, ...kept.map(([, held]) => held)]);
  }
}
