"""What the engine takes and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from relaxlm.errors import RelaxLMError
from relaxlm.runtime.generation import GenerationConfig
from relaxlm.runtime.sampling import Sampled

if TYPE_CHECKING:
    from relaxlm.engine.grammar import Grammar

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt, to be continued `config.n` times.

    Attributes:
        prompt: token ids, at least one.
        config: with all defaults merged in. `max_tokens` None: as many as the context takes.
        stop_token_ids, stop_strings: the model's own; `config` may add some, and its `ignore_eos`
            switches these off.
        grammar: what the reply must match, or None.
        prompt_logprobs: also return log probabilities of the prompt's own tokens.
        continuing: the reply goes on with the prompt's own text, and may begin with a space.
        shown_special: special tokens whose text belongs to the reply; others give no text.
    """

    prompt: Sequence[int]
    config: GenerationConfig
    stop_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    grammar: Grammar | None = None
    prompt_logprobs: bool = False
    continuing: bool = False
    shown_special: frozenset[int] = frozenset()


class TokenText(NamedTuple):
    """A token that was chosen, and the text that became final with it."""

    sampled: Sampled
    text: str


@dataclass(frozen=True)
class ChoiceUpdate:
    """What one reply has gained.

    Attributes:
        index: of the reply, from 0.
        tokens: new ones, the one that ended the reply included.
        text: of these tokens and of what was held back before; final.
        finish_reason: set when the reply has ended: "stop" for an end token or a stop string,
            "length" for a limit, "cancelled" for a caller that had enough.
        stopped_by: the stop token's id or the stop string, if one ended it.
    """

    index: int
    tokens: tuple[TokenText, ...]
    text: str
    finish_reason: FinishReason | None = None
    stopped_by: int | str | None = None


@dataclass(frozen=True)
class PromptReport:
    """What became of a prompt, told with the first token.

    Attributes:
        tokens: its length.
        cached_tokens: how many of them were found in the prefix cache.
        logprobs: one for each token but the first, if they were asked for: the token itself, its
            log probability given those before it, and the `top_logprobs` most probable ones.
    """

    tokens: int
    cached_tokens: int
    logprobs: tuple[Sampled, ...] = ()


@dataclass(frozen=True)
class RequestTimings:
    """Seconds of wall time, told with the last update.

    Attributes:
        queued: from submission to the first step that took part of the prompt.
        prefill: from there to the first token.
        decode: from the first token to the last.
        generated_tokens: of all replies.
    """

    queued: float
    prefill: float
    decode: float
    generated_tokens: int


@dataclass(frozen=True)
class Update:
    """News of a request. The last one has `finished` set, and `error` if it failed.

    Attributes:
        at: when the step ended, `time.perf_counter` seconds.
    """

    request_id: int
    at: float
    choices: tuple[ChoiceUpdate, ...] = ()
    prompt: PromptReport | None = None
    timings: RequestTimings | None = None
    error: RelaxLMError | None = None
    finished: bool = False


@dataclass
class EngineStats:
    """Counters since the start, and the state now (`waiting` to `pages_cached`).

    Attributes:
        waiting, running: requests.
        pages_used: held by running requests. pages_cached: kept for later ones alone.
        prefix_tokens, prefix_hits: prompt tokens looked up in the prefix cache, and found there.
        preemptions: times that a running reply gave up its pages, to be computed again later.
        drafted_tokens, accepted_tokens: of speculative decoding.
        forward_seconds: inside the model. step_seconds: all that the engine's thread did, that
            included.
    """

    waiting: int = 0
    running: int = 0
    pages_total: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    preemptions: int = 0
    prefix_tokens: int = 0
    prefix_hits: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    forward_seconds: float = 0.0
    step_seconds: float = 0.0
    batch_sizes: dict[int, int] = field(default_factory=dict)
