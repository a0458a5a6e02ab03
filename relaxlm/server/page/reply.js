// One reply in the making: reads the stream into a version of a message, and measures it.

import { ServerError, streamChat } from "./api.js";

/**
 * Fills `version` until the reply ends, fails or is stopped; never throws. `changed` is called
 * after each chunk. What had come when it ended stays in `version.content`.
 */
export async function readReply(version, body, { signal, changed }) {
  const sent = performance.now();
  const elapsed = () => (performance.now() - sent) / 1000;
  const { timing } = version;
  try {
    for await (const chunk of streamChat(body, signal)) {
      if (chunk.usage) version.usage = readUsage(chunk.usage);
      const choice = chunk.choices?.[0];
      const reasoning = choice?.delta?.reasoning_content ?? "";
      const content = choice?.delta?.content ?? "";
      if (reasoning || content) {
        const now = elapsed();
        timing.first ??= now;
        timing.total = now;
        timing.pieces += 1;
        if (content && version.reasoning && !version.content) timing.thinking = now - timing.first;
      }
      version.reasoning += reasoning;
      version.content += content;
      if (choice?.finish_reason) version.finish = choice.finish_reason;
      changed();
    }
    if (!version.finish) {
      throw new ServerError("stream", "The connection ended before the reply was complete.");
    }
  } catch (error) {
    if (signal.aborted) version.finish = "stopped";
    else version.error = describe(error);
  }
  timing.total ??= elapsed();
}

const SHORTEST_S = 0.005; // less says nothing about the speed

/** Tokens per second after the first token; null if that can't be told. */
export function tokensPerSecond({ usage, timing }) {
  if (!usage || usage.completion < 2 || timing.first === null) return null;
  const seconds = timing.total - timing.first;
  return seconds > SHORTEST_S ? (usage.completion - 1) / seconds : null;
}

/** OpenAI's usage, and relaxlm's own speeds in `extra`. */
function readUsage({ extra, ...usage }) {
  return {
    prompt: usage.prompt_tokens ?? null,
    cached: usage.prompt_tokens_details?.cached_tokens ?? null,
    completion: usage.completion_tokens ?? null,
    reasoning: usage.completion_tokens_details?.reasoning_tokens ?? null,
    queueSeconds: extra?.queue_s ?? null,
    promptSpeed: extra?.prefill_tokens_per_s ?? null,
    replySpeed: extra?.decode_tokens_per_s ?? null,
  };
}

function describe(error) {
  if (error instanceof ServerError) {
    const { kind, message, field, retryAfter } = error;
    const told = !field || message.includes(field);
    return { kind, message: told ? message : `${message} (${field})`, retryAfter };
  }
  return { kind: "stream", message: `The server’s answer can’t be read: ${error.message}` };
}
