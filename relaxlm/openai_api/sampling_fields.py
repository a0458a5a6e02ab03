"""Fields that several requests share: how tokens are chosen, streaming, and what has no effect."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from relaxlm.openai_api.fields import LogitBias, RequestModel, Seed, Stops
from relaxlm.runtime.generation import GenerationConfig, Penalty, Probability, TokenId

# Fields of GenerationConfig that a request spells the same.
_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "seed",
    "logit_bias",
    "n",
    "ignore_eos",
)

# Why fields that other servers have are not taken, and what to use.
OTHER_SERVERS = {
    "guided_json": 'use response_format = {"type": "json_schema", ...}',
    "guided_regex": 'use response_format = {"type": "regex", "regex": ...}',
    "guided_grammar": 'use response_format = {"type": "grammar", "grammar": ...}',
    "guided_choice": 'use response_format = {"type": "regex", ...} with the choices joined by |',
    "structured_outputs": "use response_format",
    "use_beam_search": "replies are sampled, or greedy with temperature = 0",
    "chat_template": "the model's own template is used; chat_template_kwargs sets its variables",
}

NO_EFFECT = {
    "metadata": "kept by OpenAI with stored replies; nothing is stored here",
    "user": "tells OpenAI who abuses its service",
    "safety_identifier": "tells OpenAI who abuses its service",
    "prompt_cache_key": "a hint for finding a cache; every prompt is looked up in the one there is",
    "prompt_cache_retention": "the longest time that a prefix may stay cached; it stays while "
    "there is room, and never on disk",
    "service_tier": 'only "auto" and "default": there is one tier',
    "store": "only false: nothing is stored",
}


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None

    without_effect: ClassVar[Mapping[str, str]] = {
        "include_obfuscation": "only false: chunks are not padded"
    }


class SamplingFields(RequestModel):
    """What decides the next token, and the end."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None

    def sampling(self, **more: Any) -> GenerationConfig:
        """As the engine takes it. `more` has the fields that requests spell differently.

        Raises:
            RequestError: a value outside its range.
        """
        return GenerationConfig(**self.given(*_SAME), **more)


class IdentityFields(RequestModel):
    """Who asks, and what is to be kept: accepted where it changes nothing of the answer."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
