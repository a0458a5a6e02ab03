"""Whole models compile ahead of time to machine code for GPUs, on a machine without one."""

from dataclasses import replace
from pathlib import Path

import pytest

from relaxlm import models
from relaxlm.compiler import build, cuda
from relaxlm.compiler.build import describe_model
from relaxlm.compiler.options import CompileOptions
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import CompileError, LibraryError, ToolchainError
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.library import Library
from tests.models.parity import tiny_config

try:
    cuda.find_nvcc()
    NVCC = True
except ToolchainError:
    NVCC = False

needs_nvcc = pytest.mark.skipif(not NVCC, reason="there is no nvcc")
RAW = tiny_config("llama", num_hidden_layers=1)


def compile_to(
    path: Path, scheme_name: str, arch: str, overrides: str = "", ptx: bool = True
) -> build.CompiledModel:
    config, scheme = models.load_config(RAW), get_scheme(scheme_name)
    options = CompileOptions.resolve(config, scheme, overrides=overrides)
    device = replace(resolve_device("cuda", arch), ptx=ptx)
    compiled = build.compile_model(config, RAW, scheme, device, options)
    compiled.save(path)
    return compiled


@needs_nvcc
@pytest.mark.parametrize(("scheme", "ptx"), [("q4f32_1", True), ("q0bf16", False)])
def test_a_preset_becomes_machine_code(scheme: str, ptx: bool, tmp_path: Path) -> None:
    library = tmp_path / "model.so"
    compile_to(library, scheme, "sm_80", ptx=ptx)
    images = {(image.kind, image.arch) for image in cuda.device_code(library.read_bytes())}
    assert images == {("elf", "sm_80")} | ({("ptx", "sm_80")} if ptx else set())


@needs_nvcc
def test_several_architectures_and_an_fp8_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "model.so"
    compiled = compile_to(library, "q4f16_1", "sm_90,sm_80", "kv_cache_dtype=fp8")
    attention = [r for r in compiled.kernels if r.kernel == "paged_attention_kernel"]
    assert [report.arch for report in attention] == ["sm_80", "sm_90"]
    assert all(report.registers > 0 and report.shared > 1000 for report in attention)
    images = {(image.kind, image.arch) for image in cuda.device_code(library.read_bytes())}
    assert images == {("elf", "sm_80"), ("elf", "sm_90"), ("ptx", "sm_90")}
    # One without its code is not written, and leaves the one of before.
    before = library.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(CompileError) as caught:
        patch.setattr(cuda, "device_code", lambda data: [])
        compiled.save(library)
    assert str(caught.value) == (
        f"{library}: lacks machine code for sm_80, machine code for sm_90, PTX of sm_90; found no "
        "device code"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.so"]
    assert library.read_bytes() == before


@needs_nvcc
def test_a_cuda_library_without_a_gpu_is_refused(tmp_path: Path) -> None:
    if resolve_device("auto").kind == "cuda":
        pytest.skip("there is a GPU")
    library = tmp_path / "model.so"
    compile_to(library, "q0f16", "sm_80")
    with pytest.raises(LibraryError) as error:
        Executor.from_arrays(Library.load(library), {}, pages=4)
    assert str(error.value) == (
        f"{library} was compiled for cuda, and no usable NVIDIA GPU is here. Compile for this "
        "machine with `relaxlm compile FOLDER --device cpu`"
    )


def test_a_plan_for_cuda_needs_no_compiler() -> None:
    config, scheme = models.load_config(RAW), get_scheme("q4bf16_1")
    options = CompileOptions.resolve(config, scheme)
    info = describe_model(config, RAW, scheme, resolve_device("cuda", "sm_90"), options)
    assert info.target.kind == "cuda" and info.kv_cache.dtype == "bfloat16"
    # Keys and values in rows, as the CUDA kernels read them.
    assert info.kv_cache.tensors[0].shape == (2, 16, 16)
