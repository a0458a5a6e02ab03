"""Compiling as a whole: what a library says of itself, and what is left when it fails."""

import sys
from pathlib import Path

import pytest
import tvm
from tvm import tirx
from tvm.tirx.build import codegen_build
from tvm_ffi import structural_equal

from relaxlm import models
from relaxlm.compiler import build
from relaxlm.compiler.build import compile_model, describe_model
from relaxlm.compiler.options import CompileOptions
from relaxlm.compiler.request import CompileRequest
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import ConfigError
from relaxlm.quantization.schemes import get_scheme
from tests.models.parity import tiny_config

RAW = tiny_config("qwen3", num_hidden_layers=5, tie_word_embeddings=True)


def resolved(overrides: str = "", preset: str = "q4f16_1", **change: int) -> tuple:
    raw = {**RAW, **change}
    config, scheme = models.load_config(raw), get_scheme(preset)
    options = CompileOptions.resolve(config, scheme, overrides=overrides)
    return config, raw, scheme, resolve_device("cpu"), options


def test_the_estimate_is_what_the_library_says(tmp_path: Path) -> None:
    """A plan made with three layers is exact for five."""
    arguments = resolved("kv_cache_dtype=fp8;prefill_chunk_size=48")
    stages: list[str] = []
    compiled = compile_model(*arguments, progress=lambda stage, share: stages.append(stage))
    estimate = describe_model(*arguments)
    told = compiled.metadata
    assert estimate.memory.temporary["forward"] == told.memory.temporary["forward"] > 0
    assert estimate.memory.params == told.memory.params
    assert estimate.kv_cache == told.kv_cache
    assert estimate.params == told.params
    assert stages == ["lower", "generate code"]
    # fp8: one byte for each of 2 * 16 values of K and of V, and two float32 scales per head.
    assert told.kv_cache.bytes_per_token == 5 * 2 * 2 * (16 + 4)


def test_debug_dump_has_the_ir_after_every_pass(tmp_path: Path) -> None:
    # One layer and the smallest kernels: most of the time goes into writing them, pass by pass.
    small = resolved(preset="q0f32", num_hidden_layers=1)
    compile_model(*small, debug_dump=tmp_path / "dump")
    names = [path.name for path in sorted((tmp_path / "dump").iterdir())]
    assert any("QuantizeParameters" in name for name in names)
    assert any("LowerPagedAttention" in name for name in names)


def test_passes_that_are_left_out_would_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loop nests reach LLVM as they do with TVM's passes for GPUs."""

    def lowered() -> dict[str, tirx.PrimFunc]:
        found: dict[str, tirx.PrimFunc] = {}
        with monkeypatch.context() as patch:

            def generate(module: tvm.IRModule, target: tvm.target.Target) -> tvm.runtime.Module:
                found.update((name.name_hint, f) for name, f in module.functions_items())
                return codegen_build(tvm.IRModule(), target)

            # The function `build` hides the module of that name.
            patch.setattr(sys.modules[codegen_build.__module__], "codegen_build", generate)
            compile_model(*resolved(num_hidden_layers=1))
        return found

    without = lowered()
    monkeypatch.setattr(build, "FOR_GPUS", ())
    whole = lowered()
    assert len(whole) > 9 and whole.keys() == without.keys()
    for name, function in whole.items():
        assert structural_equal(function, without[name], map_free_vars=True), name


def test_a_wrong_suffix_is_refused_before_compiling(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a library for cpu is a \*\.so file"):
        resolve_device("cpu").check_output(tmp_path / "model.wasm")


def test_requests_name_what_is_missing(tmp_path: Path) -> None:
    def message(**options) -> str:
        with pytest.raises(ConfigError) as error:
            CompileRequest.read(tmp_path, device="cpu", **options)
        return str(error.value)

    chat = tmp_path / "mlc-chat-config.json"
    assert message() == (
        f"{chat}: no such file. Expected a folder with mlc-chat-config.json (made by "
        "`relaxlm gen_config`) or config.json, or the path of one"
    )
    import json

    (tmp_path / "config.json").write_text(json.dumps(RAW))
    assert message() == (
        f"{tmp_path / 'config.json'} names no quantization: give one with --quantization q4f16_1"
    )
    assert message(quantization="q5").startswith("quantization 'q5' is not known, expected one of")
    chat.write_text(
        json.dumps({"model_type": "qwen3", "quantization": "q4f16_1", "model_config": RAW})
    )
    assert message(quantization="q0f16") == (
        f"--quantization q0f16, but {chat} belongs to weights in q4f16_1: convert the weights "
        "again, or leave the option out"
    )
    assert CompileRequest.read(tmp_path, device="cpu").scheme.name == "q4f16_1"
