"""What may be chosen of an engine, and the KV cache that follows from it."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relaxlm.engine.scheduler import StepLimits
from relaxlm.errors import ConfigError
from relaxlm.files import format_bytes
from relaxlm.runtime.cache_size import CacheSize, pages_for, slots_for
from relaxlm.runtime.chat_config import explained
from relaxlm.runtime.metadata import LibraryMetadata

Mode = Literal["local", "interactive", "server"]
Count = Annotated[int, Field(gt=0)]

# Replies at a time, by mode; "server" takes what the library was compiled for.
_BATCH = {"interactive": 1, "local": 4}
# "server": the share of the memory left that the KV cache may take.
_SERVER_SHARE = 0.7
# Other modes: the most they take, for a conversation is not held up by another one's cache.
_LOCAL_SHARE = 0.35
# Sequences that are kept: some, and more with each reply at a time, for a turn of a conversation
# leaves up to three and goes on from one.
_KEPT, _KEPT_PER_REPLY = 4, 2
# Tokens of prompts in a step beside replies being written, on CPUs: a small share of a second.
_MIXED_ON_CPU = 256
# What a machine that doesn't tell its memory is taken to have left.
_ASSUMED_MEMORY = 4 * 2**30


class EngineConfig(BaseModel):
    """Sizes are in tokens. None: follows from `mode`, the library and the memory that is free.

    Attributes:
        mode: "interactive" for one user, "local" for a few programs on one machine (4 replies at a
            time), "server" for as many as the library and the memory take.
        max_batch_size: replies at a time, `n` > 1 counted.
        context_window_size: prompt and reply of one request.
        kv_cache_tokens: of all requests together.
        prefill_chunk_size: the most tokens of one step.
        mixed_prefill_tokens: of prompts, in steps in which replies are being written.
        max_waiting: requests; further ones are refused until some have ended.
        prefix_cache: whether requests share the work on common prefixes; with a sliding window or
            recurrent layers, on those that others end with (`kept_sequences.py`).
        speculative: "ngram" guesses tokens from the text so far; see `batch_invariant`.
        speculative_tokens: the longest guess.
        batch_invariant: compile a library whose results do not depend on what else is in a step;
            a given library must be one. None: as `speculative` asks for it, on CPUs, so that
            guesses change no reply; elsewhere, and with another library, they may change its
            rounding.

    Raises:
        ConfigError: an unknown setting, or a value that is not possible.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode = "local"
    max_batch_size: Count | None = None
    context_window_size: Count | None = None
    kv_cache_tokens: Count | None = None
    prefill_chunk_size: Count | None = None
    mixed_prefill_tokens: Count | None = None
    max_waiting: Annotated[int, Field(ge=0)] = 256
    prefix_cache: bool = True
    speculative: Literal["off", "ngram"] = "off"
    speculative_tokens: Annotated[int, Field(gt=0, le=32)] = 4
    batch_invariant: bool | None = None

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(f"engine_config: {explained(error)}") from None


@dataclass(frozen=True)
class CachePlan:
    """What an engine runs with.

    Attributes:
        context: the most tokens of prompt and reply.
        kept: sequences for later requests to go on from, where they cannot share pages.
    """

    context: int
    cache: CacheSize
    limits: StepLimits
    kept: int


def plan_cache(info: LibraryMetadata, config: EngineConfig, memory: int | None = None) -> CachePlan:
    """
    Args:
        memory: bytes that weights, cache and buffers may take; None if the device doesn't tell.

    Raises:
        ConfigError: more than the library was compiled for, or than the memory holds.
    """
    compiled = info.limits
    batch = _within(config.max_batch_size, compiled.max_batch_size, "max_batch_size")
    if config.max_batch_size is None:
        batch = min(_BATCH.get(config.mode, batch), batch)
    free = (memory or _ASSUMED_MEMORY) - info.memory.params - info.step_bytes
    share = int(max(free, 0) * (_SERVER_SHARE if config.mode == "server" else _LOCAL_SHARE))
    batch, kept, states = _sequences(info, config, batch, share)
    chunk = _within(config.prefill_chunk_size, compiled.prefill_chunk_size, "prefill_chunk_size")
    if chunk < batch:
        raise ConfigError(
            f"engine_config: prefill_chunk_size = {chunk} is less than the {batch} replies that a "
            "step may hold: make it larger, or max_batch_size smaller"
        )
    context = _within(
        config.context_window_size, compiled.context_window_size, "context_window_size"
    )
    size, window = info.kv_cache.page_size, compiled.sliding_window_size

    def pages_of(tokens: int) -> int:
        # A page more: for the copy of a shared page that a reply begins with.
        return 1 + pages_for(info, tokens, chunk)

    if window:
        context = 2**31 - 1
    # Pages that are no more than numbers are enough for all.
    most = batch if info.kv_cache.tensors else batch + 1 + kept
    pages = _pages(info, config, most * pages_of(context), share - states, free)
    if pages < pages_of(context):  # memory for less than one whole context
        context = (pages - 1) * size
        if window or context < 1 or config.context_window_size is not None:
            raise ConfigError(
                f"the KV cache has room for {max(pages - 1, 0) * size} tokens, and one request "
                f"may need {(pages_of(context) - 1) * size}: set a smaller context_window_size"
                + (" or a larger kv_cache_tokens" if config.kv_cache_tokens else "")
            )
    mixed = config.mixed_prefill_tokens
    if mixed is None:
        mixed = _MIXED_ON_CPU if info.target.kind == "cpu" else chunk
    limits = StepLimits(chunk, batch, compiled.max_batch_size, min(mixed, chunk))
    return CachePlan(context, CacheSize.of(info, pages, batch + 1, kept), limits, kept)


def _sequences(
    info: LibraryMetadata, config: EngineConfig, batch: int, share: int
) -> tuple[int, int, int]:
    """Replies at a time, and sequences kept for later requests, as far as memory has their states.

    Args:
        share: bytes for states and pages together.

    Returns:
        replies, kept sequences, and bytes of states.
    """
    whole = config.prefix_cache and (info.state.tensors or info.limits.sliding_window_size)
    kept = _KEPT + _KEPT_PER_REPLY * batch if whole else 0
    state = info.state.bytes_per_sequence
    if not state:
        return batch, kept, 0
    # Beside a KV cache, which gets half.
    most = share // (2 if info.kv_cache.tensors else 1) // state
    # One sequence more: a text that is embedded between the steps.
    fitting = next((n for n in range(batch, 0, -1) if slots_for(n + 1) <= most), 0)
    if fitting < batch and (config.max_batch_size is not None or not fitting):
        replies = "1 reply" if batch == 1 else f"{batch} replies"
        raise ConfigError(
            f"the recurrent states of {replies} take {format_bytes(slots_for(batch + 1) * state)}, "
            f"and {format_bytes(most * state)} of memory are left for them: "
            + ("set a smaller max_batch_size" if fitting else "end other programs")
        )
    kept = min(kept, most - slots_for(fitting + 1))
    return fitting, kept, slots_for(fitting + 1, kept) * state


def _pages(info: LibraryMetadata, config: EngineConfig, wanted: int, share: int, free: int) -> int:
    """Of the KV cache: those wanted, as far as their share of the free memory goes."""
    if not info.kv_cache.tensors:
        if config.kv_cache_tokens is not None:
            raise ConfigError(
                f"engine_config: kv_cache_tokens = {config.kv_cache_tokens}, but {info.model_type} "
                "has no KV cache: leave it out"
            )
        return wanted
    page_size = info.kv_cache.page_size
    if config.kv_cache_tokens is not None:
        return -(-config.kv_cache_tokens // page_size) + 1
    affordable = max(share // (page_size * info.kv_cache.bytes_per_token), 0)
    if affordable < 2:
        raise ConfigError(
            f"{format_bytes(max(free, 0))} of memory are left beside the weights: too little for "
            "a KV cache; end other programs, or set kv_cache_tokens to use it all the same"
        )
    return min(wanted, affordable)


def _within(asked: int | None, compiled: int, name: str) -> int:
    if asked is None:
        return compiled
    if asked > compiled:
        raise ConfigError(
            f"engine_config: {name} = {asked}, but the library was compiled for {compiled}; "
            f'compile with --overrides "{name}={asked}", or ask for less'
        )
    return asked
