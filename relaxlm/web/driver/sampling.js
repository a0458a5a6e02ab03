// Logits to token ids: the steps of relaxlm/runtime/sampling.py, in their order, in float64.

import { LibraryError, RequestError } from "./errors.js";
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
   * Chooses the next token and records it.
   *
   * @param {Float32Array} logits at least `vocabSize`
   * @throws {LibraryError} logits that are no finite numbers
   */
  choose(logits) {
    const { temperature } = this.settings;
    const row = logits.subarray(0, this.vocabSize);
    const best = checkedArgmax(row);
    const values = this.adjusts ? this.adjusted(row) : row;
    let token = best;
    if (temperature > 0) token = draw(values, this.settings, this.random.uniform());
    else if (this.adjusts) token = argmax(values);
    this.counts.set(token, (this.counts.get(token) ?? 0) + 1);
    this.seen.add(token);
    return token;
  }

  get adjusts() {
    const { repetition_penalty, presence_penalty, frequency_penalty } = this.settings;
    const penalties = repetition_penalty !== 1 || presence_penalty !== 0 || frequency_penalty !== 0;
    return this.bias.length > 0 || penalties;
  }

  /** Bias and penalties, float64. */
  adjusted(row) {
    const { repetition_penalty, presence_penalty, frequency_penalty } = this.settings;
    const values = Float64Array.from(row);
    for (const [id, bias] of this.bias) values[id] += bias;
    if (repetition_penalty !== 1) {
      for (const id of this.seen) {
        if (values[id] > 0) values[id] /= repetition_penalty;
        else values[id] *= repetition_penalty;
      }
    }
    for (const [id, count] of this.counts) {
      values[id] -= presence_penalty + frequency_penalty * count;
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

function checkedArgmax(row) {
  const best = argmax(row);
  if (!Number.isFinite(row[best])) {
    throw new LibraryError(
      `the model computed ${row[best]} for token ${best}: expected finite numbers. Check the ` +
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
