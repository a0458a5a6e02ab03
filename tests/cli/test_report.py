"""The memory that commands print, with and without pages and recurrent states."""

from types import SimpleNamespace
from typing import cast

import pytest

from relaxlm.cli.report import memory_lines
from relaxlm.cli.serve import _memory_lines
from relaxlm.engine.config import EngineConfig, plan_cache
from relaxlm.engine.loop import EngineLoop
from relaxlm.files import format_bytes
from relaxlm.runtime.library import Library
from relaxlm.runtime.metadata import LibraryMetadata, StateInfo, TensorInfo
from tests.tiny_model import TinyModel

STATE = StateInfo(
    tensors=[TensorInfo(name="0.scan", shape=(3, 100), dtype="float32")], bytes_per_sequence=1200
)
KINDS = ["attention", "both", "recurrent"]


@pytest.fixture(scope="module")
def plain(tiny: TinyModel) -> LibraryMetadata:
    return Library.load(tiny.library).metadata


def of_kind(plain: LibraryMetadata, kind: str) -> LibraryMetadata:
    none = {"tensors": [], "bytes_per_token": 0, "page_size": 256}
    cache = plain.kv_cache.model_copy(update=none) if kind == "recurrent" else plain.kv_cache
    state = plain.state if kind == "attention" else STATE
    return plain.model_copy(update={"kv_cache": cache, "state": state})


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_sequence_takes(plain: LibraryMetadata, kind: str) -> None:
    lines = memory_lines(of_kind(plain, kind))
    cache = "  KV cache             131 kB  float32, 512 bytes per token, 256 tokens of context"
    state = "  recurrent states     1.2 kB  of one sequence, however long it is"
    assert (cache in lines, state in lines) == (kind != "recurrent", kind != "attention")
    sizes = [plain.memory.params, plain.memory.temporary["forward"]]
    sizes += [131072] * (kind != "recurrent") + [1200] * (kind != "attention")
    assert lines[-1].split(maxsplit=1) == ["total", format_bytes(sum(sizes))]


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_engine_takes(plain: LibraryMetadata, kind: str) -> None:
    info, config = of_kind(plain, kind), EngineConfig()
    model = SimpleNamespace(folder="tiny", library=SimpleNamespace(metadata=info))
    engine = SimpleNamespace(model=model, plan=plan_cache(info, config), config=config)
    text = "\n".join(_memory_lines(cast(EngineLoop, engine)))
    assert ("KV cache" in text) == (kind != "recurrent")
    states = "  recurrent states    22.8 kB  19 of 1.2 kB, 12 of them for requests to go on from"
    assert (states in text) == (kind != "attention")
    assert "up to 4 requests at a time, 256 tokens each" in text
