// Logits to token ids: the steps of relaxlm/runtime/sampling.py, in their order, in float64.

import { LibraryError, RequestError } from "./errors.js";
import { BLOCK, FewLogits } from "./few_logits.js";
import { Random } from "./random.js";

/** One reply in the making: its settings, its random numbers, and the tokens so far. */
export class Sampler {
  /**
   * @param {object} settings from `generationSettings`
   * @param {number[]} prompt token ids that the repetition penalty counts as seen
   * @param {number} vocabSize ids are below it; logits from there on are padding
   * @throws {RequestError} a token id outside the vocabulary
   */
  constructor(settings, prompt, vocabSize) {
    this.settings = settings;
    this.vocabSize = vocabSize;
    this.random = new Random(settings.seed);
    this.seen = new Set(prompt);
    this.counts = new Map(); // id -> how often the reply has it
    this.bias = Object.entries(settings.logit_bias).map(([id, bias]) => [Number(id), bias]);
    const named = { logit_bias: this.bias.map(([id]) => id), "the prompt": this.seen };
    named.stop_token_ids = settings.stop_token_ids;
    for (const [name, ids] of Object.entries(named)) {
      for (const id of ids) {
        if (id >= vocabSize) {
          throw new RequestError(
            `${name} has token id ${id}: expected 0 to ${vocabSize - 1}, the vocabulary of this model`,
          );
        }
      }
    }
  }

  /**
   * The blocks of a row that are likely to be enough to choose from; null for the whole row.
   *
   * @param {number} blocks of the row
   * @returns {{ largest: number, named: number[] } | null} how many with the largest peaks, and
   *   those whose logits are adjusted or of which a part is padding
   */
  blocksRead(blocks) {
    const { temperature, top_k } = this.settings;
    const largest = temperature > 0 ? top_k : 1;
    const named = new Set([...this.adjustedIds()].map((id) => Math.floor(id / BLOCK)));
    if (this.vocabSize % BLOCK) named.add(Math.floor(this.vocabSize / BLOCK));
    if (!largest || 4 * (largest + named.size) > blocks) return null;
    return { largest, named: [...named] };
  }

  /**
   * Chooses the next token and records it.
   *
   * @param {Float32Array | FewLogits} logits at least `vocabSize`, or some of them
   * @returns {number | null} the token; null if few logits are not enough, and nothing has happened
   * @throws {LibraryError} logits that are no finite numbers
   */
  choose(logits) {
    const { temperature, top_k } = this.settings;
    const few = logits instanceof FewLogits ? logits : null;
    const row = few ? few.values : logits.subarray(0, this.vocabSize);
    const id = (place) => (few ? few.id(place) : place);
    const best = checkedArgmax(row, id);
    const place = few ? (token) => few.place(token) : (token) => token;
    const values = this.adjusts ? this.adjusted(row, place) : row;
    if (few && !few.haveLargest(values, temperature > 0 ? top_k : 1)) return null;
    let chosen = best;
    if (temperature > 0) chosen = draw(values, this.settings, this.random.uniform());
    else if (this.adjusts) chosen = argmax(values);
    const token = id(chosen);
    this.counts.set(token, (this.counts.get(token) ?? 0) + 1);
    this.seen.add(token);
    return token;
  }

  get adjusts() {
    const { repetition_penalty, presence_penalty, frequency_penalty } = this.settings;
    const penalties = repetition_penalty !== 1 || presence_penalty !== 0 || frequency_penalty !== 0;
    return this.bias.length > 0 || penalties;
  }

  /** The ids whose logits bias and penalties change. */
  adjustedIds() {
    const { repetition_penalty, presence_penalty, frequency_penalty } = this.settings;
    const ids = new Set(this.bias.map(([id]) => id));
    if (repetition_penalty !== 1) this.seen.forEach((id) => ids.add(id));
    if (presence_penalty || frequency_penalty) this.counts.forEach((_, id) => ids.add(id));
    return ids;
  }

  /** Bias and penalties, float64; `place` gives that of an id in the row. */
  adjusted(row, place) {
    const { repetition_penalty, presence_penalty, frequency_penalty } = this.settings;
    const values = Float64Array.from(row);
    for (const [id, bias] of this.bias) values[place(id)] += bias;
    if (repetition_penalty !== 1) {
      for (const id of this.seen) {
        if (values[place(id)] > 0) values[place(id)] /= repetition_penalty;
        else values[place(id)] *= repetition_penalty;
      }
    }
    if (presence_penalty || frequency_penalty) {
      for (const [id, count] of this.counts) {
        values[place(id)] -= presence_penalty + frequency_penalty * count;
      }
    }
    return values;
  }
}

/** The lowest id of the largest logit; a NaN counts as the largest. */
function argmax(values) {
  let best = 0;
  for (let id = 0; id < values.length; id++) {
    if (!(values[id] <= values[best])) best = id;
    if (Number.isNaN(values[best])) break;
  }
  return best;
}

function checkedArgmax(row, id) {
  const best = argmax(row);
  if (!Number.isFinite(row[best])) {
    throw new LibraryError(
      `the model computed ${row[best]} for token ${id(best)}: expected finite numbers. Check the ` +
        "weights with `relaxlm verify`; if float16 is too narrow for this model, use a float32 preset",
    );
  }
  return best;
}

/** Temperature, top_k, top_p, min_p and the choice by one uniform number. */
function draw(values, { temperature, top_k, top_p, min_p }, uniform) {
  let ids = null; // ascending; null for all
  if (top_k > 0 && top_k < values.length) ids = largest(values, null, top_k);
  const reference = values[argmax(values)];
  const weigh = (id) => Math.exp((values[id] - reference) / temperature);
  if (top_p < 1) ids = nucleus(values, ids, weigh, top_p);
  ids ??= Array.from(values.keys());
  let weights = Float64Array.from(ids, weigh);
  if (min_p > 0) {
    ids = ids.filter((_, i) => weights[i] >= min_p); // the largest weight is 1
    weights = weights.filter((weight) => weight >= min_p);
  }
  const target = uniform * weights.reduce((a, b) => a + b, 0);
  let sum = 0;
  let last = 0; // the last id with a weight, for a product that was rounded up
  for (let i = 0; i < ids.length; i++) {
    sum += weights[i];
    if (sum > target) return ids[i];
    if (weights[i] > 0) last = i;
  }
  return ids[last];
}

/** The ids, ascending, of the `count` largest of some (or all) values; of equal ones the lower. */
function largest(values, ids, count) {
  const chosen = ids ? Float64Array.from(ids, (id) => values[id]) : Float64Array.from(values);
  chosen.sort();
  const limit = chosen[chosen.length - count];
  let ties = 0;
  for (let i = chosen.length - count; i < chosen.length && chosen[i] === limit; i++) ties++;
  const kept = [];
  const consider = (id) => {
    if (values[id] > limit || (values[id] === limit && ties-- > 0)) kept.push(id);
  };
  if (ids) ids.forEach(consider);
  else for (let id = 0; id < values.length; id++) consider(id);
  return kept;
}

/** The ids, ascending, of the fewest largest values whose weights reach `topP` of their sum. */
function nucleus(values, ids, weigh, topP) {
  ids ??= Array.from(values.keys());
  const weights = Float64Array.from(ids, weigh);
  const total = weights.reduce((a, b) => a + b, 0);
  // All tokens below this weight together have less than half of what may be left out.
  const lightest = (0.5 * (1 - topP) * total) / ids.length;
  const heavy = ids.filter((_, i) => weights[i] >= lightest);
  const ordered = weights.filter((weight) => weight >= lightest).sort().reverse();
  let sum = 0;
  let count = 0;
  while (count < ordered.length && (count === 0 || sum < topP * total)) sum += ordered[count++];
  return largest(values, heavy, count);
}
