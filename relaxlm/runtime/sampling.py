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

`sampling_choice` has steps 3 to 7 and says how it can be fast about them.

Log probabilities are those of the model's own logits, before step 0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from relaxlm.errors import LibraryError
from relaxlm.runtime.generation import SamplingState
from relaxlm.runtime.peaks import BLOCK, blocks_of_largest, largest
from relaxlm.runtime.peaks import of_row as peaks_of_row
from relaxlm.runtime.sampling_by_blocks import NUCLEUS_BLOCKS, RowBlocks, choose_by_blocks
from relaxlm.runtime.sampling_choice import (
    Logits,
    bound_near,
    buffer,
    choose,
    most_probable,
    weigh,
)

# For each byte of a mask, the upper limits of the logits of its 8 tokens.
_LIMITS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") == 1,
    np.float32(np.inf),
    np.float32(-np.inf),
)
_NOBODY = np.empty(0, np.int64)
_FLOAT32 = np.dtype(np.float32)


class Sampled(NamedTuple):
    token: int
    logprob: float | None  # natural logarithm; None unless the request asks for logprobs
    top: tuple[tuple[int, float], ...]  # the `top_logprobs` most probable (id, logprob), best first


def sample(
    logits: np.ndarray,
    states: Sequence[SamplingState],
    peaks: np.ndarray | None = None,
    blocks: Sequence[RowBlocks | None] | None = None,
) -> list[Sampled | LibraryError]:
    """Choose the next token of each request, and record it in the request's state.

    Args:
        logits: [batch, vocab] float32; not changed. -inf forbids a token. A row may be longer than
            its state's `vocab_size`: the rest is padding, and never chosen.
        states: one for each row.
        peaks: [batch, blocks] float32, as the library computes them of `logits` (`peaks.py`); the
            same tokens are chosen without, in more time.
        blocks: of rows of which not all is there, and that are drawn from by sums over blocks.

    Returns:
        For each row its token, or what is wrong with the row, and then its state has not changed:
        it has NaN or +inf, or no finite logit, or none that its mask allows.
    """
    if logits.ndim != 2 or len(logits) != len(states) or logits.dtype != _FLOAT32:
        raise ValueError(
            f"logits {logits.dtype} {list(logits.shape)} for {len(states)} requests: "
            f"expected float32 [{len(states)}, vocab]"
        )
    vocab = logits.shape[1]
    results: list[Sampled | LibraryError] = []
    for i, state in enumerate(states):
        if state.vocab_size > vocab:
            raise ValueError(
                f"logits for {vocab} tokens, and a vocabulary of {state.vocab_size} in row {i}"
            )
        row = logits[i, : state.vocab_size]
        try:
            of_row = None if peaks is None else peaks_of_row(peaks[i], row)
            parts = None if blocks is None else blocks[i]
            results.append(_sample_row(row, state, i, of_row, parts))
        except LibraryError as error:
            results.append(error)
    return results


def all_sampled(results: Sequence[Sampled | LibraryError]) -> list[Sampled]:
    """The same without errors, of which the first is raised.

    Raises:
        LibraryError: what `sample` found wrong with a row.
    """
    chosen = []
    for result in results:
        if isinstance(result, LibraryError):
            raise result
        chosen.append(result)
    return chosen


def _sample_row(
    row: np.ndarray,
    state: SamplingState,
    index: int,
    peaks: np.ndarray | None,
    blocks: RowBlocks | None,
) -> Sampled:
    token = _checked_argmax(row, index, peaks)
    left, mask = row, state.mask
    if mask is not None:
        _check_mask(mask, len(row))
        if not state.greedy or not _allows(mask, token):
            left, peaks = _masked(row, mask), None
            token = int(left.argmax())
            if left[token] == -np.inf:
                raise LibraryError(
                    f"no token may follow: the mask of row {index} of the logits forbids all "
                    f"{len(row)} tokens, or all but those that the model rules out"
                )
    config = state.config
    if not state.greedy:
        with np.errstate(over="ignore", under="ignore"):  # infinite and zero are right then
            adjusted = _adjusted(left, state) if state.adjusts else Logits(left, peaks=peaks)
            if config.temperature > 0:
                uniform = state.uniform()
                found = None
                if blocks is not None:
                    found = choose_by_blocks(blocks, config, uniform)
                    if found is None:
                        blocks.complete()
                token = choose(adjusted, config, uniform) if found is None else found
            else:
                token = adjusted.largest()
    sampled = Sampled(token, None, ())
    if config.logprobs:
        sampled = Sampled(token, *logprobs_of(row, token, config.top_logprobs))
    state.accept(token)
    return sampled


class BlocksRead(NamedTuple):
    """What `sample` looks at in a row of logits."""

    blocks: np.ndarray  # [k] int64, ascending
    reference: float | None = None  # of the sums of weights over blocks, if it needs them


def blocks_read(peaks: np.ndarray, state: SamplingState) -> BlocksRead | None:
    """The blocks of a row of logits that `sample` looks into, given the peaks; None: all.

    All, that is with a mask, a bias, penalties or log probabilities, and with a top_k that is large
    for the row.

    Args:
        peaks: [blocks] float32 of the row.
    """
    config, size = state.config, state.vocab_size
    whole, rest = divmod(size, BLOCK)
    if state.mask is not None or state.adjusts or config.logprobs or not whole:
        return None
    peaks = peaks[: whole + (rest > 0)].copy()
    # In a block that is partly padding, the peak may be the padding's: it is looked into.
    peaks[whole:] = -np.inf
    always = [int(peaks.argmax()), *([whole] if rest else [])]
    largest_logit, blocks, reference = float(peaks.max()), None, None
    if config.temperature == 0:
        blocks = np.empty(0, np.int64)
    elif 0 < config.top_k < size:
        blocks = blocks_of_largest(peaks, config.top_k)
    elif config.top_p < 1:
        count = min(NUCLEUS_BLOCKS, len(peaks))
        blocks, reference = np.argpartition(-peaks, count - 1)[:count], largest_logit
    elif config.min_p > 0:
        bound = bound_near(largest_logit, config.min_p, config.temperature)
        blocks = np.flatnonzero(peaks >= bound)
    else:  # which block is looked into is known when the random number is
        blocks, reference = np.empty(0, np.int64), largest_logit
    return None if blocks is None else BlocksRead(np.union1d(blocks, always), reference)


def _check_mask(mask: np.ndarray, size: int) -> None:
    words = -(-size // 32)
    if mask.dtype != np.uint32 or mask.shape != (words,):
        raise ValueError(
            f"a mask {mask.dtype} {list(mask.shape)}: expected uint32 [{words}], "
            f"a bit for each of {size} tokens"
        )


def _allows(mask: np.ndarray, token: int) -> bool:
    return bool(int(mask[token // 32]) >> token % 32 & 1)


def _masked(row: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[vocab] float32 with -inf for what a bit mask forbids, good until the next call."""
    limits = buffer("masked", 32 * len(mask), np.float32)
    octets = mask.astype("<u4", copy=False).view(np.uint8)
    # A table is three times as fast as unpacking bits; all octets are in it, whatever the mode.
    _LIMITS.take(octets, axis=0, out=limits.reshape(-1, 8), mode="clip")
    left = limits[: len(row)]
    return np.minimum(row, left, out=left)


def _checked_argmax(row: np.ndarray, index: int, peaks: np.ndarray | None) -> int:
    """The lowest id of the largest logit. NumPy's argmax stops at a NaN, so one look is enough."""
    best = int(row.argmax()) if peaks is None else largest(row, peaks)
    value = row.item(best)
    if math.isfinite(value):
        return best
    found = "no logit above -inf" if value == -np.inf else f"{value} for token {best}"
    raise LibraryError(
        f"the model computed {found} in row {index} of its logits: expected finite numbers. "
        "Check the weights with `relaxlm verify`; if float16 is too narrow for this model, "
        "use a bfloat16 or float32 preset"
    )


def _adjusted(row: np.ndarray, state: SamplingState) -> Logits:
    """Steps 1 and 2, good until the next call: only the tokens that they change are touched."""
    config = state.config
    seen = state.seen() if config.repetition_penalty != 1 else _NOBODY
    said, counts = _NOBODY, _NOBODY
    if config.presence_penalty != 0 or config.frequency_penalty != 0:
        said, counts = state.generated_counts()
    ids = np.concatenate([state.bias_ids, seen, said])
    table = buffer("exact", len(row))
    table[ids] = row[ids]
    table[state.bias_ids] += state.bias
    values, penalty = table[seen], config.repetition_penalty
    table[seen] = np.where(values > 0, values / penalty, values * penalty)
    table[said] -= config.presence_penalty + config.frequency_penalty * counts
    values = table[ids]
    rounded = buffer("rounded", len(row), np.float32)
    rounded[:] = row
    rounded[ids] = values
    return Logits(rounded, ids, values)


def logprobs_of(
    row: np.ndarray, token: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """A token's log probability, and the `count` most probable tokens with theirs.

    Args:
        row: [vocab] float32 logits.
    """
    largest = float(row.max())
    weights = weigh(row, largest, 1.0, out=buffer("weights", len(row)))
    norm = largest + math.log(weights.sum())
    if not count:
        return float(row[token]) - norm, ()
    ids, values = most_probable(Logits(row), count)
    order = np.argsort(-values, kind="stable")
    top = tuple((int(ids[i]), float(values[i]) - norm) for i in order)
    return float(row[token]) - norm, top
