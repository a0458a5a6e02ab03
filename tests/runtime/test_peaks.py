"""What the peaks of logits find is what a look at all of them finds."""

import numpy as np
import pytest

from relaxlm.errors import LibraryError
from relaxlm.runtime.generation import GenerationConfig, SamplingState
from relaxlm.runtime.peaks import BLOCK, largest, largest_ids, of_row
from relaxlm.runtime.sampling import sample


def peaks_of(logits: np.ndarray) -> np.ndarray:
    """[batch, vocab] to [batch, blocks], as libraries compute them."""
    starts = np.arange(0, logits.shape[1], BLOCK)
    with np.errstate(invalid="ignore"):
        return np.maximum.reduceat(logits, starts, axis=1)


def rows(vocab: int, seed: int, digits: int = 8) -> np.ndarray:
    """[4, vocab] float32; few digits make ties."""
    return np.random.default_rng(seed).normal(0, 3, (4, vocab)).round(digits).astype(np.float32)


@pytest.mark.parametrize("vocab", [5, BLOCK, BLOCK + 1, 40 * BLOCK + 77])
@pytest.mark.parametrize("digits", [0, 8])
def test_the_largest_is_that_of_argmax(vocab: int, digits: int) -> None:
    logits = rows(vocab, vocab, digits)
    for row, peaks in zip(logits, peaks_of(logits), strict=True):
        assert largest(row, peaks) == row.argmax()


@pytest.mark.parametrize("count", [1, 5, 20])
@pytest.mark.parametrize("digits", [0, 8])
def test_the_largest_ids_are_those_that_reach_a_bound(count: int, digits: int) -> None:
    logits = rows(200 * BLOCK + 77, count, digits)
    for row, peaks in zip(logits, peaks_of(logits), strict=True):
        ids = largest_ids(row, peaks, count)
        assert ids is not None
        assert count <= len(ids) < len(row)
        np.testing.assert_array_equal(ids, np.flatnonzero(row >= row[ids].min()))


def test_few_blocks_or_few_possible_tokens_are_left_to_the_row() -> None:
    [row] = rows(8 * BLOCK, 1)[:1]
    assert largest_ids(row, peaks_of(row[None])[0], 2) is None
    row[:] = -np.inf
    row[77] = 1
    assert largest_ids(row, peaks_of(row[None])[0], 1) is not None
    row = np.concatenate([row] * 4)
    assert largest_ids(row, peaks_of(row[None])[0], 4) is not None
    row[: 16 * BLOCK] = -np.inf
    assert largest_ids(row, peaks_of(row[None])[0], 4) is None


@pytest.mark.parametrize("vocab", [BLOCK - 3, BLOCK, 5 * BLOCK, 5 * BLOCK + 1, 6 * BLOCK - 1])
def test_padding_has_no_peak(vocab: int) -> None:
    [padded] = rows(6 * BLOCK, 2)[:1]
    padded[vocab:] = 99
    row = padded[:vocab]
    np.testing.assert_array_equal(of_row(peaks_of(padded[None])[0], row), peaks_of(row[None])[0])


SETTINGS = [
    {"temperature": 0},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 5, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 400},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 0, "repetition_penalty": 1.2},
    {"temperature": 0.7, "top_k": 20, "logit_bias": {7: 30.0}},
    {"temperature": 0, "logprobs": True, "top_logprobs": 3},
]


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_same_tokens_are_chosen(fields: dict, masked: bool) -> None:
    vocab = 200 * BLOCK + 77
    config = GenerationConfig(**fields, seed=3)
    rng = np.random.default_rng(4)
    words = rng.integers(0, 2**32, -(-vocab // 32), dtype=np.uint32)

    def states() -> list[SamplingState]:
        made = [SamplingState(config, [1, 2, 3], vocab - 50, choice) for choice in range(4)]
        for state in made:
            state.mask = words[: -(-(vocab - 50) // 32)] if masked else None
        return made

    with_peaks, without = states(), states()
    for seed in range(6):
        logits = rows(vocab, seed, digits=seed % 3)
        logits[:, vocab - 20 :] = 99  # padding
        assert sample(logits, with_peaks, peaks_of(logits)) == sample(logits, without)


def test_what_is_no_number_is_found() -> None:
    logits = rows(4 * BLOCK, 5)
    logits[0, 700] = np.nan
    logits[1, 3] = np.inf
    logits[2] = -np.inf
    states = [SamplingState(GenerationConfig(temperature=0), [1], 4 * BLOCK, 0) for _ in range(4)]
    found = sample(logits, states, peaks_of(logits))
    messages = [str(result) for result in found[:3]]
    assert all(isinstance(result, LibraryError) for result in found[:3])
    assert "nan for token 700 in row 0" in messages[0]
    assert "inf for token 3 in row 1" in messages[1]
    assert "no logit above -inf in row 2" in messages[2]
    assert found[3].token == logits[3].argmax()
