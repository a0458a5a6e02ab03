"""What comes of a GPU's logits is enough to choose the same tokens."""

import numpy as np
import pytest

from relaxlm.runtime.generation import GenerationConfig, SamplingState
from relaxlm.runtime.peaks import BLOCK
from relaxlm.runtime.sampling import sample
from relaxlm.runtime.step_logits import DeviceLogits, StepLogits
from tests.runtime.test_peaks import SETTINGS, peaks_of, rows

BLOCKS = 201
VOCAB = 200 * BLOCK + 77


class Gpu:
    """Has logits, and counts what is asked for."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits, self.gathered, self.downloads = logits, 0, 0
        padded = np.full((len(logits), BLOCKS * BLOCK), -np.inf, np.float32)
        padded[:, : logits.shape[1]] = logits
        self.blocks = padded.reshape(-1, BLOCK)

    def step(self) -> DeviceLogits:
        peaks = peaks_of(self.logits)
        return DeviceLogits(VOCAB, self.download, lambda: peaks, self.gather, self.weigh)

    def download(self) -> np.ndarray:
        self.downloads += 1
        return self.logits

    def gather(self, places: np.ndarray) -> np.ndarray:
        assert places.dtype == np.int32
        self.gathered += len(places)
        return self.blocks[places]

    def weigh(self, picked: np.ndarray, references: np.ndarray, factors: np.ndarray) -> np.ndarray:
        assert (picked.dtype, references.dtype, factors.dtype) == ("int32", "float32", "float32")
        rows = self.blocks.reshape(-1, BLOCKS, BLOCK)[picked]
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = (rows - references[:, None, None]) * factors[:, None, None]
            return np.exp(scaled).sum(-1, dtype=np.float32)


# What a few blocks are enough for, mostly.
FEW = [
    {"temperature": 0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 5, "min_p": 0.05},
    {"temperature": 0.3, "min_p": 0.3},
    {"temperature": 0.4},
    {"temperature": 0.5, "top_p": 0.3},
    {"temperature": 0.4, "top_p": 0.5, "min_p": 0.2},
]
MANY = [
    {"temperature": 1.5, "top_p": 0.95},  # more tokens than in the blocks with the largest
    {"temperature": 1e-32},
    {"temperature": 1e32, "top_p": 0.5},
]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written is NaN."""
    monkeypatch.setattr(
        "relaxlm.runtime.step_logits._unset",
        lambda *shape: np.full(shape, np.nan, np.float32),
    )


@pytest.mark.parametrize("fields", [*SETTINGS, *FEW[3:], *MANY], ids=str)
@pytest.mark.parametrize("real", [VOCAB, VOCAB - 50, 160 * BLOCK], ids=["", "part", "blocks"])
def test_the_same_tokens_are_chosen(poisoned: None, fields: dict, real: int) -> None:
    config = GenerationConfig(**fields, seed=3)

    def states() -> list[SamplingState]:
        return [SamplingState(config, [1, 2, 3], real, choice) for choice in range(4)]

    ours, theirs = states(), states()
    for seed in range(4):
        logits = rows(VOCAB, seed, digits=seed % 3)
        logits[:, real:] = 99  # padding
        picked = [2, 0, 0, 3]
        gpu = Gpu(logits)
        seen = gpu.step().seen_by(picked, ours)
        tokens = sample(seen.logits, ours, seen.peaks, seen.blocks)
        assert tokens == sample(logits[picked], theirs)
        if fields in FEW:
            # A block for each of the largest at most, that of the largest and a last, partial one.
            assert gpu.downloads == 0 and gpu.gathered < 4 * 40


def test_rows_of_every_kind_in_one_step(poisoned: None) -> None:
    kinds = [FEW[1], {"temperature": 0, "logit_bias": {7: 30.0}}, FEW[0], FEW[0]]
    configs = [GenerationConfig(**fields, seed=1) for fields in kinds]

    def states() -> list[SamplingState]:
        return [SamplingState(config, [1], VOCAB, 0) for config in configs]

    logits = rows(VOCAB, 9)
    gpu, ours = Gpu(logits), states()
    step = gpu.step()
    seen = step.seen_by([0, 1, 2, 3], ours)
    assert sample(seen.logits, ours, seen.peaks, seen.blocks) == sample(logits, states())
    # All of the row whose logits are biased.
    assert gpu.downloads == 0 and BLOCKS < gpu.gathered < BLOCKS + 40
    assert step.all() is logits and step.all() is logits and gpu.downloads == 1


def test_what_is_no_number_is_found(poisoned: None) -> None:
    logits = rows(VOCAB, 5)
    logits[0, 700] = np.nan
    logits[1, VOCAB - 1] = np.inf
    logits[2] = -np.inf
    for fields in FEW:
        config = GenerationConfig(**fields)
        states = [SamplingState(config, [1], VOCAB, 0) for _ in range(4)]
        with np.errstate(invalid="ignore"):
            seen = Gpu(logits).step().seen_by(range(4), states)
            found = sample(seen.logits, states, seen.peaks, seen.blocks)
            expected = sample(logits, states)
        assert [str(error) for error in found[:3]] == [str(error) for error in expected[:3]]


def test_rows_that_are_here_are_not_copied() -> None:
    logits = rows(20_000, 1)
    step = StepLogits(logits, lambda: peaks_of(logits))
    states = [SamplingState(GenerationConfig(temperature=0), [1], 20_000, 0)] * 2
    seen, peaks, _ = step.seen_by([1, 2], states)
    assert peaks is not None and np.shares_memory(seen, logits)
    np.testing.assert_array_equal(seen, logits[1:3])
    np.testing.assert_array_equal(peaks, peaks_of(logits[1:3]))
    np.testing.assert_array_equal(step.seen_by([2, 0], states)[0], logits[[2, 0]])


def test_few_logits_are_looked_at_without_help() -> None:
    logits = rows(20_000, 1)

    def peaks() -> np.ndarray:
        raise AssertionError("the library was asked")

    state = SamplingState(GenerationConfig(temperature=0), [1], 20_000, 0)
    seen = StepLogits(logits, peaks).seen_by([1], [state])
    assert seen.peaks is None
    [found] = sample(seen.logits, [state])
    assert found.token == logits[1].argmax()
