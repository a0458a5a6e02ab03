"""What is refused for browsers, before and after compiling."""

from pathlib import Path

import pytest

from relaxlm.compiler.build import _check_wasm_memory, describe_model
from relaxlm.compiler.request import CompileRequest
from relaxlm.compiler.web.link import custom_section, read_metadata
from relaxlm.errors import ConfigError, LibraryError, UnsupportedError
from relaxlm.runtime.jit import library_for
from relaxlm.runtime.library import Library
from tests.tiny_model import TinyModel


def test_a_model_beyond_the_memory_of_browsers_is_refused(tiny: TinyModel) -> None:
    request = CompileRequest.read(tiny.folder, device="wasm")
    assert (request.options.act_quant, request.device.kind) == (False, "wasm")
    parts = (request.config, request.raw, request.scheme, request.device, request.options)
    info = describe_model(*parts)
    _check_wasm_memory(info)
    large = info.model_copy(
        update={"memory": info.memory.model_copy(update={"params": 2**31 - 1000})}
    )
    with pytest.raises(UnsupportedError, match=r"device 'wasm': the model needs 2.15 GB \(131 kB"):
        _check_wasm_memory(large)


def test_attention_takes_the_memory_of_one_thread(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relaxlm.compiler.build.usable_cores", lambda: 100)
    plans = {}
    for device in ("wasm", "cpu"):
        request = CompileRequest.read(tiny.folder, device=device, opt="act_quant=0")
        parts = (request.config, request.raw, request.scheme, request.device, request.options)
        plans[device] = describe_model(*parts).memory.temporary["forward"]
    assert plans["wasm"] < plans["cpu"]


def test_python_runs_no_libraries_for_browsers(tiny: TinyModel, tmp_path: Path) -> None:
    for device in ("wasm", "webgpu"):
        with pytest.raises(ConfigError, match=f"device '{device}' is for .*, and nothing runs for"):
            library_for(tiny.folder, device)
    library = tmp_path / "tiny.wasm"
    library.write_bytes(b"\0asm\1\0\0\0")
    with pytest.raises(LibraryError, match=r"tiny.wasm was compiled for browsers: relaxlm's"):
        Library.load(library)


@pytest.mark.parametrize("opt", ["act_quant=1", "batch_invariant=1"])
def test_options_of_other_cpus_are_refused(tiny: TinyModel, opt: str) -> None:
    request = CompileRequest.read(tiny.folder, device="wasm", opt=opt)
    with pytest.raises(ConfigError, match=f"--opt {opt} is for device 'cpu', not 'wasm'"):
        request.compile()


def test_presets_and_caches_that_shaders_have_no_numbers_for_are_refused(tiny: TinyModel) -> None:
    source = tiny.source
    with pytest.raises(UnsupportedError, match="quantization q4bf16_1 is not supported on webgpu"):
        CompileRequest.read(
            source, "q4bf16_1", "webgpu", overrides="kv_cache_dtype=float16"
        ).compile()
    with pytest.raises(UnsupportedError, match="kv_cache_dtype = float8_e4m3 is not supported on"):
        CompileRequest.read(source, "q4f16_1", "webgpu", overrides="kv_cache_dtype=fp8").compile()


def test_a_module_says_of_itself_what_it_is(tmp_path: Path, tiny: TinyModel) -> None:
    request = CompileRequest.read(tiny.folder, device="webgpu")
    parts = (request.config, request.raw, request.scheme, request.device, request.options)
    info = describe_model(*parts)
    module = b"\0asm\1\0\0\0" + custom_section("name", b"x" * 300)
    library = tmp_path / "tiny.wasm"
    library.write_bytes(module)
    with pytest.raises(LibraryError, match=r"tiny\.wasm is no library for browsers"):
        read_metadata(library)
    library.write_bytes(module + custom_section("relaxlm", info.model_dump_json().encode()))
    assert read_metadata(library) == info
