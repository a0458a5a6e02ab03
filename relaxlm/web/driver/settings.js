// How to choose tokens and when to end: the options of a generation, as in Python
// (relaxlm/runtime/generation.py), and their ranges.

import { RequestError } from "./errors.js";

const within = (low, high) => (x) => typeof x === "number" && x >= low && x <= high;
const whole = (low, high = Infinity) => (x) => Number.isInteger(x) && x >= low && x <= high;
const isText = (x) => typeof x === "string" && x !== "";
const MAX_ID = 2 ** 31 - 1;

// name: [default, whether a value is possible, what is expected]
const OPTIONS = {
  temperature: [1, (x) => within(0, Number.MAX_VALUE)(x), "a number, 0 (greedy) or more"],
  top_p: [1, within(0, 1), "a number from 0 to 1"],
  top_k: [0, whole(0), "a whole number, 1 or more, or 0 for all tokens"],
  min_p: [0, within(0, 1), "a number from 0 to 1"],
  repetition_penalty: [1, within(0.01, 100), "a number from 0.01 to 100"],
  presence_penalty: [0, within(-2, 2), "a number from -2 to 2"],
  frequency_penalty: [0, within(-2, 2), "a number from -2 to 2"],
  max_tokens: [null, whole(1), "a whole number, 1 or more"],
  stop: [[], (x) => x.every(isText), "a text or a list of texts, none of them empty"],
  stop_token_ids: [[], (x) => x.every(whole(0, MAX_ID)), "a list of token ids"],
  seed: [null, isSeed, "a whole number from -2**63 to 2**64 - 1"],
  logit_bias: [{}, isBias, "token ids, each with a number from -100 to 100"],
  ignore_eos: [false, (x) => typeof x === "boolean", "true or false"],
};

function isSeed(x) {
  if (typeof x === "number" && !Number.isSafeInteger(x)) return false;
  if (typeof x !== "number" && typeof x !== "bigint") return false;
  return BigInt(x) >= -(1n << 63n) && BigInt(x) < 1n << 64n;
}

function isBias(x) {
  if (typeof x !== "object" || Array.isArray(x)) return false;
  return Object.entries(x).every(
    ([id, bias]) => /^\d+$/.test(id) && Number(id) <= MAX_ID && within(-100, 100)(bias),
  );
}

/**
 * All options of a generation: those given, then those of each of `defaults`, then the table's.
 * null and undefined mean "not given".
 *
 * @throws {RequestError} an unknown option, or a value that is not possible
 */
export function generationSettings(...given) {
  const result = Object.fromEntries(Object.entries(OPTIONS).map(([name, [value]]) => [name, value]));
  for (const options of given.reverse()) {
    for (let [name, value] of Object.entries(options ?? {})) {
      if (value === null || value === undefined) continue;
      if (!(name in OPTIONS)) {
        throw new RequestError(
          `'${name}' is not a generation option: expected one of ${Object.keys(OPTIONS).join(", ")}`,
        );
      }
      if (name === "stop" && typeof value === "string") value = [value];
      if (name === "top_k" && value === -1) value = 0;
      const [standard, possible, expected] = OPTIONS[name];
      if (Array.isArray(standard) !== Array.isArray(value) || !possible(value)) {
        const shown = typeof value === "bigint" ? String(value) : JSON.stringify(value);
        throw new RequestError(`${name} = ${shown} is not possible: expected ${expected}`);
      }
      result[name] = value;
    }
  }
  return result;
}
