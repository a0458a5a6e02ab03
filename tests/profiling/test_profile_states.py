"""Profiles and measurements of models with recurrent layers."""

import pytest

from relaxlm.profiling.profile import profile_decode
from relaxlm.profiling.session import Session
from relaxlm.profiling.work import Work, nbytes
from tests.tiny_model import TinyModel

CONTEXT, BATCH = 20, 3


@pytest.fixture(scope="module", params=["hybrid", "recurrent"])
def session(request: pytest.FixtureRequest) -> Session:
    model: TinyModel = request.getfixturevalue(f"{request.param}_tiny")
    return Session.load(model.folder, model.library, room=[(1, 40), (BATCH, 40)])


def test_decoding_reads_and_writes_the_states_of_every_sequence(session: Session) -> None:
    info = session.executor.metadata
    step = profile_decode(session, CONTEXT, BATCH, 2)
    for kind in ("scan", "conv"):
        tensors = [tensor for tensor in info.state.tensors if tensor.name.endswith(f".{kind}")]
        [kernel] = [part for part in step.kernels if part.on.split(", ")[-1] == kind]
        assert kernel.calls == len(tensors)
        least = 2 * BATCH * sum(map(nbytes, tensors))
        # Besides: what goes in and comes out, a convolution's weights, and tables.
        assert least < kernel.nbytes < least + 30_000
    work = Work.of(info)
    assert work.state_bytes == sum(map(nbytes, info.state.tensors))
    assert bool(work.cache_bytes) == bool(info.kv_cache.tensors) == bool(work.pair_operations)


def test_every_measurement_starts_at_the_same_context(session: Session) -> None:
    for _ in range(2):
        assert session.decode(CONTEXT, BATCH, 4) > 0
        assert {session.sequences.length(seq) for seq in session._held} == {CONTEXT + 5}
        session.sequences.check()
    prompts = list(session._held)
    session.prepare(CONTEXT, BATCH)
    assert session._held == prompts, "the prompts were computed again"
    assert {session.sequences.length(seq) for seq in prompts} == {CONTEXT}
    assert session.prefill(30) > 0
