"""Profiles: which kernels ran, what they had to do, and whose time it was."""

from pathlib import Path

import numpy as np
import pytest

from relaxlm.errors import ConfigError
from relaxlm.profiling.instrument import Argument, Call, Instrument
from relaxlm.profiling.profile import _Costs, profile_decode, profile_prefill, summarize
from relaxlm.profiling.session import Session
from relaxlm.profiling.work import Work
from relaxlm.runtime.metadata import StateInfo, TensorInfo
from tests.tiny_model import VOCAB, TinyModel

LAYERS, HIDDEN, MID = 2, 64, 96


@pytest.fixture(scope="module")
def session(tiny: TinyModel) -> Session:
    return Session.load(tiny.folder, tiny.library, room=[(1, 64), (3, 40)])


def test_what_a_compiled_library_cannot_be_told_is_refused(tiny: TinyModel) -> None:
    for options, message in (
        ({"device": "cuda"}, f"device 'cuda', but {tiny.library} was compiled for cpu"),
        ({"opt": "act_quant=0"}, "opt = 'act_quant=0' is for compiling"),
        ({"overrides": "max_batch_size=2"}, "overrides = 'max_batch_size=2' is for compiling"),
    ):
        with pytest.raises(ConfigError) as caught:
            Session.load(tiny.folder, tiny.library, **options)
        assert str(caught.value).startswith(message)


def test_every_matrix_once_and_all_of_the_step(session: Session) -> None:
    step = profile_prefill(session, 33, 2)
    matrices = [part for part in step.kernels if part.operations and "k, v" not in part.on]
    assert {(part.on, part.calls) for part in matrices} == {
        *(("self_attn.qkv_proj", LAYERS), ("self_attn.o_proj", LAYERS)),
        *(("mlp.gate_up_proj", LAYERS), ("mlp.down_proj", LAYERS), ("lm_head", 1)),
    }
    [gate] = [part for part in matrices if part.on == "mlp.gate_up_proj"]
    # The last layer computes only the row whose logits are wanted.
    assert gate.operations == 2 * (33 + 1) * HIDDEN * 2 * MID
    assert gate.nbytes == 4 * (LAYERS * HIDDEN * 2 * MID + (33 + 1) * (HIDDEN + 2 * MID))
    assert [part.name for part in step.layers] == ["before", "0", "1", "after"]
    for parts in (step.kernels, step.layers):
        total = sum(part.seconds for part in parts)
        assert step.outside == pytest.approx(max(0, step.seconds - total))
    seconds = [part.seconds for part in step.kernels]
    assert seconds == sorted(seconds, reverse=True)


def test_decoding_reads_the_weights_and_the_cache(session: Session) -> None:
    step = profile_decode(session, 20, 3, 2)
    assert step.tokens == 3
    work = Work.of(session.executor.metadata)
    operations = sum(part.operations for part in step.kernels)
    assert operations == 3 * work.operations(1, 20, 1)
    [attention] = [part for part in step.kernels if part.operations and "k, v" in part.on]
    least = 3 * 21 * work.cache_bytes
    assert least <= attention.nbytes < least + 10_000  # tables, queries and results
    [lookup] = [part for part in step.kernels if part.on == "embed_tokens"]
    assert lookup.nbytes == 3 * 4 + 2 * 3 * HIDDEN * 4  # ids, rows read, rows written


def test_a_bias_is_no_matrix(session: Session) -> None:
    name = "model.layers.0.self_attn.qkv_proj.bias"
    call = Call(
        "rope_append",
        (
            Argument((3, 128), "float32", ""),
            Argument((128,), "float16", name),
            Argument((3, 4, 16), "float32", ""),
        ),
    )
    nbytes, operations = _Costs(session.executor.metadata, [(0, 3)]).of(call)
    assert (nbytes, operations) == (3 * 128 * 4 + 128 * 2 + 3 * 64 * 4, 0)


def test_a_recurrence_reads_and_writes_the_states_of_its_sequences(session: Session) -> None:
    tensor = TensorInfo(name="0.scan", shape=(2, 8, 16), dtype="float32")
    state = StateInfo(tensors=[tensor], bytes_per_sequence=4 * 256)
    info = session.executor.metadata.model_copy(update={"state": state})
    call = Call(
        "linear_scan",
        (
            Argument((5, 2, 8), "float32", ""),
            Argument((9, 2, 8, 16), "float32", "0.scan"),
            Argument((5, 2, 16), "float32", ""),
        ),
    )
    nbytes, operations = _Costs(info, [(7, 1), (0, 4)]).of(call)
    assert nbytes == 5 * 16 * 4 + 2 * 2 * 256 * 4 + 5 * 32 * 4
    assert operations == 5 * 5 * 256  # a product, and twice a product and a sum
    work = Work.of(info)
    assert work.operations(4, 0, 0) - Work.of(session.executor.metadata).operations(4, 0, 0) == (
        4 * 5 * 256
    )


def test_a_watched_step_computes_the_same(session: Session) -> None:
    executor, sequences = session.executor, session.sequences
    ids = np.arange(9, dtype=np.int32)

    def logits() -> np.ndarray:
        seq = sequences.add()
        found = executor.forward(sequences.batch([(seq, 9)]), ids, np.array([8], np.int32)).copy()
        sequences.free(seq)
        return found

    plain, instrument = logits(), Instrument(executor)
    with instrument.record() as calls:
        np.testing.assert_array_equal(logits(), plain)
    with instrument.measure() as seconds:
        np.testing.assert_array_equal(logits(), plain)
    assert len(calls) == len(seconds) > 10 and min(seconds) > 0
    assert calls[-1].arguments[-1].shape == (1, VOCAB)
    before = len(calls)
    logits()
    assert len(calls) == before  # nobody watches any more


def test_parameters_of_a_layer_name_it(session: Session) -> None:
    x = Argument((5, HIDDEN), "float32", "")
    calls = [
        Call("lookup", (Argument((VOCAB, HIDDEN), "float32", "model.embed_tokens.weight"), x)),
        Call("add", (x, x)),
        Call("norm", (x, Argument((HIDDEN,), "float32", "model.layers.0.norm.weight"), x)),
        Call("add", (x, x)),
        Call("norm", (x, Argument((HIDDEN,), "float32", "model.layers.1.norm.weight"), x)),
        Call("norm", (x, Argument((HIDDEN,), "float32", "model.norm.weight"), x)),
        Call("add", (x, x)),
    ]
    seconds = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    step = summarize(session.executor.metadata, "", 5, [(0, 5)], calls, seconds, 30.0)
    found = [(part.name, part.seconds) for part in step.layers]
    assert found == [("before", 3.0), ("0", 7.0), ("1", 5.0), ("after", 13.0)]
    assert step.outside == 2.0
    kernels = {(part.name, part.on): part.calls for part in step.kernels}
    assert kernels == {
        **{("lookup", "embed_tokens"): 1, ("add", ""): 3},
        **{("norm", "norm"): 3},
    }


def test_picture(session: Session, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs relaxlm[plot]")
    from relaxlm.profiling.plot import draw

    steps = [profile_prefill(session, 8, 1), profile_decode(session, 8, 1, 1)]
    draw(steps, tmp_path / "steps.png", "tiny")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_what_stands_for_all_rounds(session: Session) -> None:
    step = profile_decode(session, 8, 1, 3, of_rounds=len)
    assert step.seconds == 3 and {part.seconds / part.calls for part in step.kernels} == {3}
