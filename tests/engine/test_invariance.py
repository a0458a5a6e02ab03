"""A batch-invariant library under the engine: a prompt's tokens are the same alone and in a crowd.

The model rounds its weights and what it multiplies them with, so that elsewhere the kernels that a
step's size decides on give other last bits.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relaxlm import GenerationConfig
from relaxlm.compiler.request import CompileRequest
from relaxlm.engine.config import EngineConfig
from relaxlm.engine.loop import EngineLoop
from relaxlm.engine.types import GenerationRequest
from tests.engine.test_loop import Receiver
from tests.tiny_model import TOKENS, TinyModel, convert


@pytest.fixture(scope="module")
def invariant(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder and a library."""
    place = tmp_path_factory.mktemp("invariant")
    folder = convert(tiny.source, place / "tiny-q4f16_1", "q4f16_1", max_batch_size=32)
    library = place / "tiny.so"
    request = CompileRequest.read(folder, device="cpu", opt="O1;batch_invariant=1")
    request.compile().save(library)
    return folder, library


def run(loop: EngineLoop, requests: list[GenerationRequest], pauses: list[float]) -> list[Any]:
    """Log probabilities and tokens of all replies of each request."""
    receivers = []
    for request, pause in zip(requests, pauses, strict=True):
        receivers.append(Receiver())
        loop.submit(request, receivers[-1])
        receivers[-1].started.wait(pause)
    found = []
    for request, receiver in zip(requests, receivers, strict=True):
        receiver.wait()
        chosen = [c for u in receiver.updates for c in u.choices]
        found.append(
            [
                [token.sampled for c in chosen if c.index == i for token in c.tokens]
                for i in range(request.config.n)
            ]
        )
    return found


def make_requests(count: int) -> list[GenerationRequest]:
    rng = random.Random(7)
    shared = [rng.randrange(3, TOKENS) for _ in range(60)]
    requests = []
    for i in range(count):
        own = [rng.randrange(3, TOKENS) for _ in range(rng.randrange(1, 50))]
        config = GenerationConfig(
            temperature=0.0 if i % 2 else 1.0,
            seed=i,
            max_tokens=rng.randrange(5, 120),
            n=2 if i % 5 == 0 else 1,
            logprobs=True,
            ignore_eos=True,
        )
        # Circles of a few tokens, for which guesses come true.
        prompt = (shared if i % 3 else []) + own + ([40, 41, 42] * 5 if i % 4 == 0 else [])
        requests.append(GenerationRequest(prompt, config))
    return requests


def test_replies_are_the_same_to_the_last_bit_alone_and_in_a_crowd(invariant):
    folder, library = invariant
    requests = make_requests(14)
    alone = EngineConfig(mode="server", prefix_cache=False, batch_invariant=True)
    with EngineLoop.load(folder, library, config=alone) as loop:
        expected = [run(loop, [request], [0.0])[0] for request in requests]

    crowd = EngineConfig(
        mode="server",
        batch_invariant=True,
        speculative="ngram",
        kv_cache_tokens=300,  # of about 2000 that the requests have at their ends
        prefill_chunk_size=64,
        max_batch_size=12,
        mixed_prefill_tokens=37,
    )
    order = list(range(len(requests)))
    with EngineLoop.load(folder, library, config=crowd) as loop:
        for _ in range(3):
            random.Random(3).shuffle(order)
            pauses = [0.02 * (i % 3 == 0) for i in range(len(order))]
            found = run(loop, [requests[i] for i in order], pauses)
            for i, replies in zip(order, found, strict=True):
                assert replies == expected[i], f"request {i}"
        stats = loop.stats()
    assert stats.preemptions and stats.prefix_hits and stats.drafted_tokens, stats
    assert max(stats.batch_sizes) > 4
    assert np.isfinite([s.logprob for r in expected for reply in r for s in reply]).all()
