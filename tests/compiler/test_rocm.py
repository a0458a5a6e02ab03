"""Machine code for AMD's GPUs, which nothing here can run."""

import struct
from pathlib import Path
from typing import Any

import pytest

from relaxlm import models
from relaxlm.compiler import rocm
from relaxlm.compiler.build import compile_model
from relaxlm.compiler.options import CompileOptions
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import LibraryError, ToolchainError
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.library import Library
from tests.models.parity import tiny_config

try:
    rocm.bitcode_folder()
    rocm.find_lld()
    REASON = ""
except ToolchainError as error:
    REASON = str(error)

needs_rocm = pytest.mark.skipif(bool(REASON), reason=REASON)
RAW = tiny_config("llama", num_hidden_layers=1, head_dim=128)
# ELF, 64 bit, little-endian, of AMD's ABI: e_ident of the file that the driver loads.
AMD_FILE = b"\x7fELF\x02\x01\x01\x40"


def what_kernels_take(code: Any) -> dict[str, tuple[int, int, int, int]]:
    """By name: bytes of memory that a workgroup shares, bytes of memory of a lane's own, whether
    there are 32 lanes, and whether a lane has a stack.

    Source: "Kernel Descriptor" of "User Guide for AMDGPU Backend" of LLVM.
    """
    found = {}
    for symbol in code.dynamic_symbols:
        if str(symbol.name).endswith(".kd"):
            descriptor = bytes(code.get_content_from_virtual_address(symbol.value, 64))
            shared, own = struct.unpack_from("<II", descriptor)
            (properties,) = struct.unpack_from("<H", descriptor, 56)
            found[str(symbol.name)] = (shared, own, properties >> 10 & 1, properties >> 11 & 1)
    return found


@needs_rocm
# With 64 lanes and with 32; EF_AMDGPU_MACH of "User Guide for AMDGPU Backend" of LLVM.
@pytest.mark.parametrize(
    ("arch", "number", "narrow"), [("gfx90a", 0x3F, False), ("gfx1100", 0x41, True)]
)
def test_a_model_becomes_machine_code(arch: str, number: int, narrow: bool, tmp_path: Path) -> None:
    lief = pytest.importorskip("lief")
    library = tmp_path / "model.so"
    config, scheme = models.load_config(RAW), get_scheme("q4f16_1")
    options = CompileOptions.resolve(config, scheme)
    compile_model(config, RAW, scheme, resolve_device("rocm", arch), options).save(library)
    content = library.read_bytes()
    code = lief.parse(list(content[content.index(AMD_FILE) :]))
    assert code.header.processor_flag & 0xFF == number
    names = {str(symbol.name) for symbol in code.dynamic_symbols}
    # The descriptor that the driver starts a kernel by, of ours and of what TVM schedules.
    kernels = ("paged_attention", "rope_append", "matmul", "norm", "embedding_lookup", "copy")
    for kernel in kernels:
        assert any(name.endswith("_kernel.kd") and kernel in name for name in names), names
    taken = what_kernels_take(code)
    shared = {name: size for name, (size, *_) in taken.items() if size}
    assert shared.keys() >= {"paged_attention_kernel.kd", "norm_kernel.kd", "matmul_kernel.kd"}
    assert max(shared.values()) <= 64 << 10
    # All values of a lane are in registers.
    assert {(own, lanes, stack) for _, own, lanes, stack in taken.values()} == {(0, narrow, 0)}
    with pytest.raises(LibraryError) as caught:
        Library.load(library)
    assert str(caught.value) == (
        f"{library} was compiled for rocm, and the TVM installed here has no runtime for it; of "
        "the released wheels none has. Compile for this machine with `relaxlm compile FOLDER "
        "--device cpu`"
    )


def test_bitcode_is_for_the_lanes_of_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    with pytest.raises(ToolchainError) as caught:
        rocm.bitcode("gfx90a")
    assert str(caught.value) == (
        "compiling for device 'rocm' needs AMD's device libraries, which are not on this machine "
        f"(looked for ocml.bc in {tmp_path}/amdgcn/bitcode); install ROCm, or Debian's "
        "rocm-device-libs, or set ROCM_PATH to where it is"
    )
    folder = tmp_path / "amdgcn" / "bitcode"
    folder.mkdir(parents=True)
    for name in ("ocml", *rocm._CONTROLS, "oclc_wavefrontsize64_on"):
        (folder / f"{name}.bc").touch()
    assert [file.name for file in rocm.bitcode("gfx942")][-1] == "oclc_wavefrontsize64_on.bc"
    with pytest.raises(ToolchainError) as caught:
        rocm.bitcode("gfx1100")
    assert str(caught.value) == (
        f"the ROCm device libraries in {folder} have no oclc_wavefrontsize64_off.bc; install them "
        "again, or set ROCM_PATH to others"
    )


def test_without_lld(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rocm.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(rocm.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ToolchainError) as caught:
        rocm.find_lld()
    assert str(caught.value) == (
        "compiling for device 'rocm' needs the linker ld.lld, which is not on this machine: "
        "pip install 'relaxlm[cross]', or install LLVM's lld from version 18 on"
    )


def test_a_linker_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="failed to link the kernels for ROCm"):
        rocm._linked(b"no machine code", rocm.find_lld())
