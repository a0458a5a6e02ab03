"""What an engine plans for the states of recurrent layers."""

import pytest

from relaxlm.engine.config import EngineConfig, plan_cache
from relaxlm.errors import ConfigError
from relaxlm.runtime.cache_size import slots_for
from relaxlm.runtime.library import Library
from relaxlm.runtime.metadata import LibraryMetadata, StateInfo, TensorInfo
from tests.tiny_model import TinyModel

STATE = 2**20


@pytest.fixture(scope="module")
def plain(tiny: TinyModel) -> LibraryMetadata:
    return Library.load(tiny.library).metadata


@pytest.fixture(scope="module")
def hybrid(plain: LibraryMetadata) -> LibraryMetadata:
    tensor = TensorInfo(name="0.scan", shape=(STATE // 4,), dtype="float32")
    state = StateInfo(tensors=[tensor], bytes_per_sequence=STATE)
    return plain.model_copy(update={"state": state})


@pytest.fixture(scope="module")
def recurrent(hybrid: LibraryMetadata) -> LibraryMetadata:
    none = {"tensors": [], "bytes_per_token": 0, "page_size": 256}
    return hybrid.model_copy(update={"kv_cache": hybrid.kv_cache.model_copy(update=none)})


def memory(info: LibraryMetadata, left: int) -> int:
    return info.memory.params + info.memory.temporary["forward"] + left


def test_every_reply_and_an_embedding_have_a_state(plain, hybrid) -> None:
    plan = plan_cache(hybrid, EngineConfig())
    assert plan.kept == 4 + 2 * 4
    assert plan.cache.state_slots == slots_for(plan.limits.sequences + 1, plan.kept)
    assert plan.cache.nbytes(hybrid).states == plan.cache.state_slots * STATE
    assert plan.cache.sequences(hybrid).states.pool.total == plan.cache.state_slots
    assert plan_cache(hybrid, EngineConfig(prefix_cache=False)).kept == 0
    assert plan_cache(plain, EngineConfig()).cache.state_slots == 0
    assert plan_cache(plain, EngineConfig()).kept == 0
    assert plan_cache(plain, EngineConfig()).cache.sequences(plain).states is None


@pytest.mark.parametrize("left", [30, 100, 200])
def test_there_are_as_many_replies_as_states_fit_beside_the_pages(hybrid, left) -> None:
    plan = plan_cache(hybrid, EngineConfig(mode="server"), memory(hybrid, left * STATE))
    half = 0.7 * left / 2
    assert slots_for(plan.limits.sequences + 1) <= half < slots_for(plan.limits.sequences + 2)
    assert plan.cache.state_slots == slots_for(plan.limits.sequences + 1, plan.kept) <= half
    pages = plan.cache.nbytes(hybrid).kv_cache + plan.cache.nbytes(hybrid).states
    assert pages <= 0.7 * left * STATE
    assert plan.context == 256


def test_more_states_than_fit_are_refused(hybrid) -> None:
    config = EngineConfig(mode="server", max_batch_size=40)
    with pytest.raises(ConfigError) as raised:
        plan_cache(hybrid, config, memory(hybrid, 100 * STATE))
    assert str(raised.value) == (
        "the recurrent states of 40 replies take 64 MB, and 36.7 MB of memory are left for them: "
        "set a smaller max_batch_size"
    )
    with pytest.raises(ConfigError, match=r"1 reply take .*: end other programs"):
        plan_cache(hybrid, EngineConfig(mode="interactive"), memory(hybrid, 3 * STATE))


def test_without_pages_the_context_takes_no_memory(recurrent) -> None:
    longer = recurrent.limits.model_copy(update={"context_window_size": 2**16})
    info = recurrent.model_copy(
        update={
            "limits": longer,
            "kv_cache": recurrent.kv_cache.model_copy(update={"page_size": 2**14}),
        }
    )
    plan = plan_cache(info, EngineConfig(mode="server"), memory(info, 40 * STATE))
    assert plan.context == 2**16
    assert plan.cache.nbytes(info) == (0, plan.cache.state_slots * STATE)
    assert slots_for(plan.limits.sequences + 1) <= 28 < slots_for(plan.limits.sequences + 2)
    sequences = plan.cache.sequences(info)
    for _ in range(plan.limits.sequences):
        sequences.append(sequences.add(), 2**16)
    sequences.check()


def test_a_size_of_a_cache_that_is_not_there_is_refused(recurrent) -> None:
    with pytest.raises(ConfigError) as raised:
        plan_cache(recurrent, EngineConfig(kv_cache_tokens=1000))
    assert str(raised.value) == (
        "engine_config: kv_cache_tokens = 1000, but llama has no KV cache: leave it out"
    )
