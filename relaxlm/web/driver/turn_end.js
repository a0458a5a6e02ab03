// The tokens with which a chat template ends the assistant's turns: relaxlm/runtime/turn_end.py.

const ANSWER = "probe-of-an-answer";
const TURNS = [
  { role: "user", content: "hello" },
  { role: "assistant", content: ANSWER },
];
// gpt-oss writes several messages in a turn, each with an end of its own; these two end the turn.
const CHANNELS = ["<|channel|>", "<|message|>"];
const ENDS_OF_CHANNELS = ["<|return|>", "<|call|>"];

/**
 * The special tokens behind an answer, none if the template writes none there.
 *
 * @param {string} source the template's text
 * @param {(messages: object[]) => string} render writes a conversation without a reply's beginning
 * @param {import("./tokenizer.js").Tokenizer} tokenizer
 * @returns {number[]}
 */
export function turnEnds(source, render, tokenizer) {
  if (CHANNELS.every((mark) => source.includes(mark))) {
    const found = ENDS_OF_CHANNELS.map((token) => tokenizer.backend.token_to_id(token));
    return found.filter((id) => id !== undefined);
  }
  let text;
  try {
    text = render(TURNS);
  } catch {
    return [];
  }
  const place = text.lastIndexOf(ANSWER);
  const rest = place < 0 ? "" : text.slice(place + ANSWER.length).trimStart();
  if (!rest.trim()) return [];
  const [first] = tokenizer.encode(rest);
  const begins = first === tokenizer.bosId && tokenizer.bosId !== tokenizer.eosId;
  return tokenizer.specialIds.has(first) && !begins ? [first] : [];
}
