"""Distances of logits and vectors, against their definitions row by row."""

import math

import numpy as np
import pytest

from relaxlm.verification import metrics
from relaxlm.verification.metrics import LogitDistance, compare_logits, layer_error


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row.astype(np.float64))
    return powers / powers.sum()


def random_logits(n: int, vocab: int = 9) -> tuple[np.ndarray, np.ndarray, list[int]]:
    rng = np.random.default_rng(n)
    reference = rng.normal(3, 2, (n, vocab)).astype(np.float32)
    library = reference + rng.normal(0, 2, (n, vocab)).astype(np.float32)
    return reference, library, [int(i) for i in rng.integers(0, vocab, n)]


@pytest.mark.parametrize("block", [1, 20, 1 << 21])
def test_distances_are_those_of_the_definitions(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_BLOCK_VALUES", block)
    reference, library, ids = random_logits(7)
    found = compare_logits(reference, library, ids)
    p, q = [softmax(row) for row in reference], [softmax(row) for row in library]
    kl = [float((a * np.log(a / b)).sum()) for a, b in zip(p, q, strict=True)]
    error = np.abs(reference.astype(np.float64) - library)
    assert (found.rows, found.values, found.targets) == (7, 63, 6)
    assert found.max_error == error.max()
    assert found.mean_error == pytest.approx(error.mean())
    assert found.spread == pytest.approx(np.sqrt(reference.var(axis=1).mean()))
    assert found.relative_error == pytest.approx(error.max() / found.spread)
    assert found.kl_mean == pytest.approx(np.mean(kl))
    assert found.kl_max == pytest.approx(max(kl))
    agreeing = [a.argmax() == b.argmax() for a, b in zip(p, q, strict=True)]
    assert 0 < sum(agreeing) < 7 and found.top1 == sum(agreeing) / 7
    for probabilities, nll in ((p, found.nll_reference), (q, found.nll_library)):
        expected = [-math.log(probabilities[i][ids[i + 1]]) for i in range(6)]
        assert nll == pytest.approx(np.mean(expected))


def test_distances_of_two_texts_add_up() -> None:
    first, second = random_logits(4), random_logits(6)
    together = compare_logits(*first) + compare_logits(*second)
    assert together.rows == 10 and together.targets == 8
    parts = [compare_logits(*first), compare_logits(*second)]
    assert together.max_error == max(part.max_error for part in parts)
    assert together.kl_max == max(part.kl_max for part in parts)
    assert together.kl_mean == pytest.approx((4 * parts[0].kl_mean + 6 * parts[1].kl_mean) / 10)
    assert LogitDistance() + parts[0] == parts[0]


def test_adding_a_constant_to_a_row_is_an_error_of_logits_but_no_divergence() -> None:
    reference, _, ids = random_logits(5)
    found = compare_logits(reference, reference + np.float32(1), ids)
    assert found.max_error == pytest.approx(1, rel=1e-5)
    assert found.kl_max < 1e-12 and found.top1 == 1


def test_equal_logits_have_no_distance() -> None:
    reference, _, ids = random_logits(5)
    found = compare_logits(reference, reference, ids)
    assert (found.max_error, found.kl_mean, found.kl_max, found.top1) == (0, 0, 0, 1)


def test_one_token_has_no_likelihood() -> None:
    reference, library, ids = random_logits(1)
    assert math.isnan(compare_logits(reference, library, ids).nll_library)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_infinitely_far(wrong: float) -> None:
    for side in (0, 1):
        *logits, ids = random_logits(5)
        logits[side][2, 1] = wrong
        found = compare_logits(*random_logits(4)) + compare_logits(*logits, ids)
        assert found.relative_error == found.kl_mean == found.kl_max == math.inf


def test_the_error_of_a_layer_is_that_of_the_worst_token() -> None:
    reference = np.ones((4, 8), np.float32)
    reference[0] = 1000  # a long vector must not hide the others
    library = reference.copy()
    library[0, 0] += 10
    library[2, :2] += np.float32([0.3, -0.4])
    assert layer_error(reference, library) == pytest.approx(0.5 / 8**0.5)
    library[3, 3] = np.nan
    assert layer_error(reference, library) == layer_error(library, reference) == math.inf
    assert layer_error(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)) == 0
