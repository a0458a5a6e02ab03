"""Benchmarks run what replies run."""

from itertools import pairwise

import numpy as np
import pytest

from relaxlm.profiling.session import Session
from relaxlm.runtime.peaks import BLOCK
from relaxlm.runtime.step_logits import DeviceLogits, StepLogits
from tests.runtime.test_peaks import peaks_of
from tests.tiny_model import VOCAB, TinyModel

BLOCKS = 10  # of a row, padding included: of few, all are fetched


def test_tokens_are_chosen_without_fetching_whole_rows(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session.load(tiny.folder, tiny.library, room=[(2, 40)])
    compute, steps, gathered = session.executor.compute, [], []

    def on_gpu(*arguments) -> StepLogits:
        rows = compute(*arguments).all().copy()
        padded = np.full((len(rows), BLOCKS * BLOCK), -np.inf, np.float32)
        padded[:, :VOCAB] = rows
        steps.append((arguments[1], rows))

        def gather(places: np.ndarray) -> np.ndarray:
            gathered.append(len(places))
            return padded.reshape(-1, BLOCK)[places]

        def never(*_: object) -> np.ndarray:
            raise AssertionError("nobody asks for whole rows or sums")

        return DeviceLogits(BLOCKS * BLOCK, never, lambda: peaks_of(padded), gather, never)

    monkeypatch.setattr(session.executor, "compute", on_gpu)
    assert session.prefill(20) > 0
    assert len(gathered) == 1 and gathered[0] <= 2
    session.prepare(20, 2)
    del steps[:], gathered[:]
    for _ in range(4):
        session.step()
    assert len(gathered) == 4 and max(gathered) <= 4  # the largest, and the last of a row
    for (_, rows), (ids, _) in pairwise(steps):
        np.testing.assert_array_equal(ids, rows.argmax(-1))
