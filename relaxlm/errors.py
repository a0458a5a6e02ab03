"""Every exception that relaxlm raises on purpose.

    RelaxLMError
    ├── VersionError            an installed package is not the release that relaxlm was built for
    ├── ConfigError             config.json, mlc-chat-config.json, an override or an option
    │   └── UnsupportedError    well-formed, but asks for something that relaxlm does not compute
    ├── CheckpointError         the Hugging Face folder: missing, truncated, not weights at all
    ├── WeightsError            a converted folder (tensor-cache.json and its shards)
    ├── TokenizerError          tokenizer files
    ├── TemplateError           chat templates, and conversations that a template refuses
    ├── CompileError            compiling or linking a model library
    │   └── ToolchainError      a compiler or linker that is not there, or that refused its input
    ├── LibraryError            a library that does not fit the machine, the weights or relaxlm
    ├── RequestError            a malformed generation request
    │   └── ContextOverflowError    more tokens than the context window or the KV cache holds
    ├── BusyError               an engine that takes no more requests now
    └── VerificationError       a compiled library's results are too far from the reference

A message says what was found and where, what was expected, and what to do next. The command line
prints it without a stack trace and exits with status 1.
"""


class RelaxLMError(Exception):
    """Something a user can cause, and can mend."""


class VersionError(RelaxLMError):
    pass


class ConfigError(RelaxLMError):
    pass


class UnsupportedError(ConfigError):
    pass


class CheckpointError(RelaxLMError):
    pass


class WeightsError(RelaxLMError):
    pass


class TokenizerError(RelaxLMError):
    pass


class TemplateError(RelaxLMError):
    pass


class CompileError(RelaxLMError):
    pass


class ToolchainError(CompileError):
    """`output`: all that the tool printed, where one ran."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


class LibraryError(RelaxLMError):
    pass


class RequestError(RelaxLMError):
    pass


class ContextOverflowError(RequestError):
    pass


class BusyError(RelaxLMError):
    """Try again in `retry_after` seconds; `closing` if the engine is about to end."""

    def __init__(self, message: str, retry_after: float = 1.0, closing: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.closing = closing


class VerificationError(RelaxLMError):
    pass
