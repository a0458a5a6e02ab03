"""The shortcuts for large vocabularies against a full sort in float64."""

import numpy as np
import pytest

from relaxlm.runtime import sampling_choice
from relaxlm.runtime.generation import GenerationConfig
from relaxlm.runtime.sampling_choice import ROUGH, Logits, choose

VOCAB = 9000  # above the size from which float32 is tried, and from which bins are
SHAPES = ("peaked", "wide", "flat", "equal", "ties", "few")


def random_row(rng: np.random.Generator, shape: str, vocab: int = VOCAB) -> np.ndarray:
    row = rng.standard_normal(vocab)
    if shape == "peaked":
        row *= 2.5
        row[rng.choice(vocab, 100)] += 8
    elif shape == "wide":
        row *= 40
    elif shape == "equal":
        row[:] = -3.25
    elif shape == "ties":
        row = np.round(2 * row)
    elif shape == "few":
        row[rng.random(vocab) > 0.002] = -np.inf
        row[rng.integers(vocab)] = 1.0
    return row.astype(np.float32)


def reference(exact: np.ndarray, config: GenerationConfig, uniform: float) -> int:
    order = np.argsort(-exact, kind="stable")
    weights = np.exp((exact - exact.max()) / config.temperature)
    if config.top_k:
        order = order[: config.top_k]
    if config.top_p < 1:
        sums = np.cumsum(weights[order])
        order = order[: np.searchsorted(sums, config.top_p * sums[-1]) + 1]
    kept = np.sort(order[weights[order] >= config.min_p])
    sums = np.cumsum(weights[kept])
    return int(kept[np.searchsorted(sums, uniform * sums[-1], side="right")])


@pytest.mark.parametrize("shape", SHAPES)
def test_random_settings_give_the_tokens_of_a_full_sort(shape: str) -> None:
    rng = np.random.default_rng(SHAPES.index(shape))
    for round_ in range(60):
        row = random_row(rng, shape)
        logits, exact = Logits(row), row.astype(np.float64)
        if round_ % 2:  # a penalty or a bias
            ids = rng.choice(VOCAB, 300, replace=False)
            exact[ids] += rng.standard_normal(300)
            rounded = exact.astype(np.float32)
            logits = Logits(rounded, np.concatenate([ids, ids[:5]]), exact[[*ids, *ids[:5]]])
            assert logits.largest() == exact.argmax()
        config = GenerationConfig(
            temperature=float(rng.choice([1e-40, 0.01, 0.3, 1.0, 1.7, 50.0, 1e40])),
            top_k=int(rng.choice([0, 0, 1, 40, 700, VOCAB])),
            top_p=float(rng.choice([1.0, 1.0, 0.0, 1e-7, 0.5, 0.9, 0.999, 1 - 2**-53])),
            min_p=float(rng.choice([0.0, 0.0, 0.01, 0.5, 1.0])),
        )
        for uniform in rng.random(5):
            with np.errstate(over="ignore"):
                expected = reference(exact, config, uniform)
                assert choose(logits, config, uniform) == expected, (config, uniform, round_)


def descending(rng: np.random.Generator, steepness: float) -> np.ndarray:
    """Weights that fall with the id: the largest chosen id shows where a nucleus ends."""
    row = -steepness * np.log1p(np.arange(VOCAB)) + 0.1 * rng.standard_normal(VOCAB)
    return np.sort(row)[::-1].astype(np.float32)


@pytest.mark.parametrize("steepness", [0.2, 1.1, 2.0])
@pytest.mark.parametrize("distance", [1e-13, 1e-10, 1e-8, 1e-6])
def test_close_to_a_border_the_token_is_that_of_float64(steepness: float, distance: float) -> None:
    row = descending(np.random.default_rng(5), steepness)
    weights = np.exp(row.astype(np.float64) - row[0])
    borders = np.cumsum(weights) / weights.sum()
    tokens = np.flatnonzero(np.diff(borders) > 4 * distance)
    for token in tokens[:: max(1, len(tokens) // 20)].tolist():
        near = borders[token] - distance, borders[token] + distance
        drawn = [choose(Logits(row), GenerationConfig(), uniform) for uniform in near]
        last = [choose(Logits(row), GenerationConfig(top_p=top_p), 1.0) for top_p in near]
        assert drawn == last == [token, token + 1]


@pytest.mark.parametrize("shape", ["peaked", "wide", "flat", "ties"])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0])
def test_the_error_of_float32_stays_within_its_bound(
    shape: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_choice, "_UNCLEAR", 2)  # float32 however flat the row is
    rng = np.random.default_rng(2)
    for _ in range(5):
        row = 30 + random_row(rng, shape, 150_000)
        ids = rng.choice(len(row), 50, replace=False)
        values = row[ids] + rng.standard_normal(50)
        row[ids] = values
        logits = Logits(row, ids, values)
        rough, reference, error = logits.weights(temperature, exact=False)
        assert rough.dtype == np.float32 and error == ROUGH
        exact = row.astype(np.float64)
        exact[ids] = values
        weights = np.exp((exact - reference) / temperature)
        starts = np.arange(0, len(row), 256)
        found = np.cumsum(np.add.reduceat(rough, starts), dtype=np.float64)
        expected = np.cumsum(np.add.reduceat(weights, starts))
        assert np.abs(found - expected).max() <= ROUGH * expected[-1]
        assert abs(float(rough.sum()) - expected[-1]) <= ROUGH * expected[-1]


def test_float32_is_used_where_it_tells_tokens_apart() -> None:
    rng = np.random.default_rng(0)
    for shape, temperature, expected in (
        ("peaked", 1.0, ROUGH),
        ("wide", 1.0, ROUGH),
        ("flat", 1e3, 0),
        ("equal", 1.0, 0),
        ("peaked", 1e-7, 0),
    ):
        row = random_row(rng, shape, 150_000)
        assert Logits(row).weights(temperature, exact=False)[2] == expected
    assert Logits(row[:100]).weights(1.0, exact=False)[2] == 0
