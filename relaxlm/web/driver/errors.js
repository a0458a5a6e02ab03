// What a caller can cause, as an error whose message says what was found, what was expected and
// what to do next.

export class RelaxLMError extends Error {
  constructor(message, options) {
    super(message, options);
    this.name = this.constructor.name;
  }
}

/** A library that is none of ours, of another release, or made for something else. */
export class LibraryError extends RelaxLMError {}

/** Files of weights that are missing, damaged, or those of another model. */
export class WeightsError extends RelaxLMError {}

/** mlc-chat-config.json or a tokenizer that cannot be used. */
export class ConfigError extends RelaxLMError {}

/** A request with an unknown option or a value that is not possible. */
export class RequestError extends RelaxLMError {}

/** A conversation that the model's template refuses. */
export class TemplateError extends RelaxLMError {}

/** More tokens than there is room for. */
export class ContextOverflowError extends RelaxLMError {}

/** No WebGPU, or a GPU without what the library needs. */
export class DeviceError extends RelaxLMError {}
