"""The memory and the kernels that commands print."""

from types import SimpleNamespace
from typing import cast

import pytest

from relaxlm.cli.report import memory_lines, print_kernels
from relaxlm.cli.serve import _memory_lines
from relaxlm.compiler.cuda_report import KernelReport
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
    model = SimpleNamespace(folder="tiny", library=SimpleNamespace(metadata=info, device="cpu"))
    engine = SimpleNamespace(model=model, plan=plan_cache(info, config), config=config)
    text = "\n".join(_memory_lines(cast(EngineLoop, engine)))
    assert ("KV cache" in text) == (kind != "recurrent")
    states = "  recurrent states    22.8 kB  19 of 1.2 kB, 12 of them for requests to go on from"
    assert (states in text) == (kind != "attention")
    assert "up to 4 requests at a time, 256 tokens each" in text


def test_kernels_of_a_cuda_library(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a_kernel_with_a_name_that_would_not_fit_into_eighty_columns_beside_its_numbers"
    print_kernels(
        [
            KernelReport("cast_kernel", "sm_90", 12, 0, 0, 0),
            KernelReport(name, "sm_90", 64, 8, 4, 12, shared=49152),
            KernelReport("cast_kernel", "sm_100", 10, 0, 0, 0),
            KernelReport(name, "sm_100", 70, 0, 0, 0, shared=49152),
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "kernels: 2 for sm_90, sm_100; 1 spills; at most 70 registers and 49.2 kB of shared memory"
    )
    assert [line.split() for line in lines[2:]] == [
        [name, "sm_90", "64", "49152", "4", "12", "8"],
        ["sm_100", "70", "49152", "0", "0", "0"],
        ["cast_kernel", "sm_90", "12", "0", "0", "0", "0"],
        ["sm_100", "10", "0", "0", "0", "0"],
    ]
