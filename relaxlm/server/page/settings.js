// What can be set for a conversation, and the request that comes of it.
//
// A setting that is not set is not sent: the server then takes the model's own default.

export const NUMBERS = [
  {
    name: "temperature", label: "Temperature", min: 0, max: 2,
    hint: "0 always takes the likeliest token; higher is more varied.",
  },
  {
    name: "top_p", label: "Top P", min: 0, max: 1,
    hint: "Only the likeliest tokens that together have this probability.",
  },
  {
    name: "top_k", label: "Top K", min: 0, whole: true,
    hint: "Only that many of the likeliest tokens; 0 for all.",
  },
  {
    name: "min_p", label: "Min P", min: 0, max: 1,
    hint: "Only tokens at least this likely, compared with the likeliest.",
  },
  {
    name: "repetition_penalty", label: "Repetition penalty", min: 0.01, max: 100,
    hint: "Above 1: avoids tokens of prompt and reply.",
  },
  {
    name: "presence_penalty", label: "Presence penalty", min: -2, max: 2,
    hint: "Above 0: avoids tokens that the reply already has.",
  },
  {
    name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2,
    hint: "Above 0: the more often, the more.",
  },
  {
    name: "max_tokens", label: "Longest reply, tokens", min: 1, whole: true,
    hint: "Empty: as long as the context allows.",
  },
  {
    name: "seed", label: "Seed", min: -(2 ** 53 - 1), max: 2 ** 53 - 1, whole: true,
    hint: "The same seed and settings give the same reply.",
  },
];

export const FORMATS = ["text", "json_object", "json_schema"];
export const THINKING = ["default", "on", "off"];

/** Settings with nothing set. */
export function emptySettings() {
  return { system: "", stop: [], format: "text", schema: "", thinking: "default", numbers: {} };
}

/** Stored or imported settings: what is known and valid of them, the rest is left out. */
export function readSettings(stored) {
  const settings = emptySettings();
  if (typeof stored !== "object" || stored === null) return settings;
  if (typeof stored.system === "string") settings.system = stored.system;
  if (Array.isArray(stored.stop)) settings.stop = stored.stop.filter(isNonEmptyString);
  if (FORMATS.includes(stored.format)) settings.format = stored.format;
  if (typeof stored.schema === "string") settings.schema = stored.schema;
  if (THINKING.includes(stored.thinking)) settings.thinking = stored.thinking;
  for (const field of NUMBERS) {
    const value = stored.numbers?.[field.name];
    if (typeof value === "number" && !numberProblem(field, value)) {
      settings.numbers[field.name] = value;
    }
  }
  return settings;
}

/** Why a number is not possible, as a sentence; "" if it is. */
export function numberProblem({ label, min, max, whole }, value) {
  const kind = whole ? "a whole number" : "a number";
  const top = max === undefined ? "or more" : `to ${max}`;
  const inside = value >= min && (max === undefined || value <= max);
  const good = Number.isFinite(value) && inside && (!whole || Number.isSafeInteger(value));
  return good ? "" : `${label} has to be ${kind}, ${min} ${top}.`;
}

/** Why a JSON schema is not possible; "" if it is. */
export function schemaProblem(text) {
  try {
    const schema = JSON.parse(text);
    const good = typeof schema === "object" && schema !== null && !Array.isArray(schema);
    return good ? "" : "A JSON schema has to be an object.";
  } catch (error) {
    return `This is not JSON: ${error.message}`;
  }
}

/** The body of a streamed chat completion. */
export function requestBody(model, messages, settings) {
  const system = settings.system.trim();
  const body = {
    model,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
    ...settings.numbers,
  };
  if (settings.stop.length) body.stop = settings.stop;
  if (settings.thinking !== "default") {
    body.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  }
  if (settings.format === "json_object") body.response_format = { type: "json_object" };
  if (settings.format === "json_schema") {
    body.response_format = {
      type: "json_schema",
      json_schema: { name: "reply", strict: true, schema: JSON.parse(settings.schema) },
    };
  }
  return body;
}

/** What differs from the defaults, in a few words each. */
export function summary(settings) {
  const words = NUMBERS.filter(({ name }) => name in settings.numbers).map(
    ({ name, label }) => `${label.split(",")[0].toLowerCase()} ${settings.numbers[name]}`,
  );
  if (settings.system.trim()) words.unshift("system prompt");
  if (settings.stop.length) words.push(settings.stop.length === 1 ? "1 stop" : "stops");
  if (settings.format === "json_object") words.push("JSON");
  if (settings.format === "json_schema") words.push("JSON schema");
  if (settings.thinking !== "default") words.push(`thinking ${settings.thinking}`);
  return words;
}

function isNonEmptyString(value) {
  return typeof value === "string" && value !== "";
}
