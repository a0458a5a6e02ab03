"""ChatConfig: what a caller changes of a model folder's settings."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relaxlm.errors import ConfigError, RequestError
from relaxlm.runtime.chat_config import explained
from relaxlm.runtime.generation import GenerationConfig

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_gen_len",
)
_COMPILED = (
    "context_window_size",
    "prefill_chunk_size",
    "max_batch_size",
    "sliding_window_size",
    "attention_sink_size",
    "kv_cache_dtype",
)


class ChatConfig(BaseModel):
    """Settings that replace those of the model's mlc-chat-config.json. Sizes are in tokens.

    The settings from `context_window_size` on belong to the library: they take effect when it is
    compiled on first use; a given library must have been compiled with them. Only the context may
    be smaller than the library's.

    Raises:
        ConfigError: an unknown setting, or a value that is not possible.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_gen_len: int | None = None
    conv_template: str | None = None
    context_overflow: Literal["drop_oldest_turns", "error"] = "drop_oldest_turns"
    context_window_size: int | None = Field(default=None, gt=0)
    prefill_chunk_size: int | None = Field(default=None, gt=0)
    max_batch_size: int | None = Field(default=None, gt=0)
    sliding_window_size: int | None = Field(default=None, gt=0)
    attention_sink_size: int | None = Field(default=None, ge=0)
    kv_cache_dtype: str | None = None

    def __init__(self, **settings: Any) -> None:
        if name := settings.get("kv_cache_dtype"):
            from relaxlm.quantization.kv_cache import get_kv_format

            settings["kv_cache_dtype"] = get_kv_format(str(name)).name
        try:
            super().__init__(**settings)
            GenerationConfig(**self.sampling())
        except ValidationError as error:
            raise ConfigError(f"chat_config: {explained(error)}") from None
        except RequestError as error:
            raise ConfigError(f"chat_config: {error}") from None

    @staticmethod
    def of(given: "ChatConfig | Mapping[str, Any] | None") -> "ChatConfig":
        """The configuration that an argument stands for."""
        return given if isinstance(given, ChatConfig) else ChatConfig(**(given or {}))

    def compiled(self) -> dict[str, int | str]:
        """The settings of the library that are set here."""
        return self._given(_COMPILED)

    def overrides(self) -> str:
        """The settings of the library, spelled as for `relaxlm compile --overrides`."""
        return ";".join(f"{name}={value}" for name, value in self.compiled().items())

    def sampling(self) -> dict[str, Any]:
        """The defaults of GenerationConfig that are set here."""
        return self._given(_SAMPLING)

    def _given(self, names: tuple[str, ...]) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}
