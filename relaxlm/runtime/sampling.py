"""Logits to token ids.

Each row goes through these steps, in this order, in float64:

0. Tokens that the state's mask forbids are as if their logit were -inf.
1. logit_bias is added.
2. repetition_penalty r, on every token of prompt and reply: a positive logit is divided by r, a
   negative one multiplied (CTRL; as in transformers). Then, on every token that the reply has c > 0
   times: minus (presence_penalty + frequency_penalty * c) (as in OpenAI's API and vLLM).
3. temperature divides. At 0 the largest logit wins, the remaining steps do not apply, and no random
   number is used.
4. top_k keeps the k largest.
5. top_p, of the probabilities of what is left, keeps the fewest most probable tokens that reach p
   together; at least one.
6. min_p keeps tokens of at least min_p times the largest probability.
7. One uniform number picks a token: the first, in the order of ids, with which the probabilities
   sum to more than that number.

Steps 3 to 6 stand in the order of transformers; vLLM adds the bias first, too, but applies min_p
before top_k. Of equal logits the lower id is the larger one in every step (transformers keeps all
that tie with the last of the top k). Rows do not influence each other: a request with a seed gets
the same tokens in any batch.

Log probabilities are those of the model's own logits, before step 0.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from relaxlm.errors import LibraryError
from relaxlm.runtime.generation import GenerationConfig, SamplingState

# Temporaries of a vocabulary's size are kept from call to call: the kernel's page faults for fresh
# memory take longer than the arithmetic on it.
_memory = threading.local()


class Sampled(NamedTuple):
    token: int
    logprob: float | None  # natural logarithm; None unless the request asks for logprobs
    top: tuple[tuple[int, float], ...]  # the `top_logprobs` most probable (id, logprob), best first


def sample(logits: np.ndarray, states: Sequence[SamplingState]) -> list[Sampled | LibraryError]:
    """Choose the next token of each request, and record it in the request's state.

    Args:
        logits: [batch, vocab] float32; not changed. -inf forbids a token. A row may be longer than
            its state's `vocab_size`: the rest is padding, and never chosen.
        states: one for each row.

    Returns:
        For each row its token, or what is wrong with the row, and then its state has not changed:
        it has NaN or +inf, or no finite logit, or none that its mask allows.
    """
    if logits.ndim != 2 or len(logits) != len(states) or logits.dtype != np.float32:
        raise ValueError(
            f"logits {logits.dtype} {list(logits.shape)} for {len(states)} requests: "
            f"expected float32 [{len(states)}, vocab]"
        )
    if any(state.vocab_size > logits.shape[1] for state in states):
        raise ValueError(
            f"logits for {logits.shape[1]} tokens, and vocabularies of "
            f"{sorted({state.vocab_size for state in states})}"
        )
    results: list[Sampled | LibraryError] = []
    for i, (row, state) in enumerate(zip(logits, states, strict=True)):
        try:
            results.append(_sample_row(row[: state.vocab_size], state, i))
        except LibraryError as error:
            results.append(error)
    return results


def _sample_row(row: np.ndarray, state: SamplingState, index: int) -> Sampled:
    config = state.config
    most_probable = _checked_argmax(row, index)
    left = row
    if state.mask is not None:
        left = np.where(_allowed(state.mask, len(row)), row, np.float32(-np.inf))
        most_probable = int(left.argmax())
        if left[most_probable] == -np.inf:
            raise LibraryError(
                f"no token may follow: the mask of row {index} of the logits forbids all "
                f"{len(row)} tokens, or all but those that the model rules out"
            )
    adjusted = _adjust(left, state)
    if config.temperature > 0:
        token = _choose(adjusted, config, state.uniform())
    else:
        token = most_probable if adjusted is left else int(adjusted.argmax())
    sampled = Sampled(token, None, ())
    if config.logprobs:
        sampled = Sampled(token, *logprobs_of(row, token, config.top_logprobs))
    state.accept(token)
    return sampled


def _allowed(mask: np.ndarray, size: int) -> np.ndarray:
    """[size] bool from a bit mask."""
    if mask.dtype != np.uint32 or mask.shape != (-(-size // 32),):
        raise ValueError(
            f"a mask {mask.dtype} {list(mask.shape)}: expected uint32 [{-(-size // 32)}], "
            f"a bit for each of {size} tokens"
        )
    bits = np.unpackbits(mask.astype("<u4", copy=False).view(np.uint8), bitorder="little")
    return bits[:size].view(bool)


def _checked_argmax(row: np.ndarray, index: int) -> int:
    """The lowest id of the largest logit. NumPy's argmax stops at a NaN, so one look is enough."""
    best = int(row.argmax())
    value = float(row[best])
    if np.isfinite(value):
        return best
    found = "no logit above -inf" if value == -np.inf else f"{value} for token {best}"
    raise LibraryError(
        f"the model computed {found} in row {index} of its logits: expected finite numbers. "
        "Check the weights with `relaxlm verify`; if float16 is too narrow for this model, "
        "use a bfloat16 or float32 preset"
    )


def _adjust(row: np.ndarray, state: SamplingState) -> np.ndarray:
    """Bias and penalties: [vocab] float64, good until the next call; or `row` if there are none."""
    config = state.config
    penalized = config.presence_penalty != 0 or config.frequency_penalty != 0
    if not len(state.bias) and config.repetition_penalty == 1 and not penalized:
        return row
    out = _buffer("logits", len(row))
    out[:] = row
    out[state.bias_ids] += state.bias
    if config.repetition_penalty != 1:
        ids = state.seen()
        seen, penalty = out[ids], config.repetition_penalty
        out[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
    if penalized:
        ids, counts = state.generated_counts()
        out[ids] -= config.presence_penalty + config.frequency_penalty * counts
    return out


def _choose(logits: np.ndarray, config: GenerationConfig, uniform: float) -> int:
    """Steps 3 to 7 for logits [vocab] float32 or float64."""
    ids: np.ndarray | None = None  # of the tokens left, ascending; None while all are left
    if 0 < config.top_k < len(logits):
        ids = _largest(logits, config.top_k)
        logits = logits[ids]
    if config.top_p < 1:
        left = _nucleus(logits, config)
        logits = logits[left]
        ids = left if ids is None else ids[left]
    weights = _weights(logits, config.temperature)
    if config.min_p > 0:
        left = np.flatnonzero(weights >= config.min_p)  # the largest weight is 1
        weights = weights[left]
        ids = left if ids is None else ids[left]
    sums = np.cumsum(weights, out=weights)
    place = int(np.searchsorted(sums, uniform * sums[-1], side="right"))
    if place == len(sums):  # the product was rounded up
        place = int(np.searchsorted(sums, sums[-1], side="left"))
    return place if ids is None else int(ids[place])


def _buffer(name: str, size: int) -> np.ndarray:
    """[size] float64 of this thread's own memory, with whatever was last written there."""
    buffer = getattr(_memory, name, None)
    if buffer is None or len(buffer) < size:
        buffer = np.empty(size)
        setattr(_memory, name, buffer)
    return buffer[:size]


def _weights(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities times a constant, float64, the largest 1; good until the next call."""
    weights = _buffer("weights", len(logits))
    np.subtract(logits, logits.max(), out=weights, dtype=np.float64)
    with np.errstate(over="ignore", under="ignore"):  # -inf and 0 are right then
        weights /= temperature
        return np.exp(weights, out=weights)


def _largest(logits: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` largest logits, ascending; of equal ones the lower ids."""
    place = len(logits) - count
    return _down_to(logits, np.partition(logits, place)[place], count)


def _down_to(logits: np.ndarray, last: np.floating, count: int) -> np.ndarray:
    """Ids of the `count` largest logits, ascending, given the smallest of them."""
    chosen = logits > last
    ties = np.flatnonzero(logits == last)
    chosen[ties[: count - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)


def _nucleus(logits: np.ndarray, config: GenerationConfig) -> np.ndarray:
    """Ids of the fewest largest logits whose weights reach `top_p` of the sum, ascending.

    Sorting values is many times faster than sorting ids by value, and it is enough: it gives the
    smallest logit that stays.
    """
    weights = _weights(logits, config.temperature)
    total = weights.sum()
    # All tokens below this weight together have less than half of what may be left out.
    heavy = weights >= 0.5 * (1 - config.top_p) * total / len(weights)
    ids = None
    if np.count_nonzero(heavy) < len(heavy) // 4:
        ids = np.flatnonzero(heavy)
        logits = logits.take(ids)
    values = np.sort(logits)[::-1]
    weights = _weights(values, config.temperature)
    sums = np.cumsum(weights, out=weights)
    place = int(np.searchsorted(sums, config.top_p * total, side="left"))
    place = min(place, len(values) - 1)  # the sum may end a rounding error short of it
    kept = _down_to(logits, values[place], place + 1)
    return kept if ids is None else ids.take(kept)


def logprobs_of(
    row: np.ndarray, token: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """A token's log probability, and the `count` most probable tokens with theirs.

    Args:
        row: [vocab] float32 logits.
    """
    norm = float(row.max()) + float(np.log(_weights(row, 1.0).sum()))
    if not count:
        return float(row[token]) - norm, ()
    ids = _largest(row, min(count, len(row)))
    ids = ids[np.argsort(-row[ids], kind="stable")]
    top = tuple((int(i), float(row[i]) - norm) for i in ids if row[i] > -np.inf)
    return float(row[token]) - norm, top
