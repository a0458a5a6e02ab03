"""benchmarks/peers: relaxlm's side of the comparison computes what it is asked for."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from tests.numpy_llama import llama_logits
from tests.tiny_model import CONFIG, TinyModel

PEERS = Path(__file__).parent.parent / "benchmarks" / "peers"


def test_steps_are_the_models(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PEERS))
    peer = importlib.import_module("relaxlm_peer").RelaxLM(tiny.folder)
    ids = np.array([[5, 40, 7, 19], [8, 3, 77, 120]])
    peer.prefill(ids[0])
    peer.prepare(ids)
    following = np.array([11, 95])
    expected = [
        llama_logits(tiny.weights, CONFIG, np.append(row, token))[-1].argmax()
        for row, token in zip(ids, following, strict=True)
    ]
    np.testing.assert_array_equal(peer.step(following), expected)
    peer.step(ids[:, 0])
    peer.rewind()
    np.testing.assert_array_equal(peer.step(following), expected)
