"""ROCm kernels: LLVM's machine code for AMD's GPUs, with AMD's bitcode, linked by lld.

LLVM compiles an exponential into a call of `__ocml_exp2_f32`, which is in the device libraries
that come with ROCm (`ocml.bc`). How those behave is decided by further files, each of which defines
one constant: lanes per wave, denormal numbers and so on. TVM's list of them is for GPUs with 64
lanes, and links contradicting files; `rocm_compilation` puts one for the right GPU in its place.
Kernels of ours do not rely on the number of lanes either (`target.GPU_LIMITS`). What they call
does not ask for the GPU's generation; lld would say so.

Source: ROCm Device Libraries, doc/OCML.md, "Controls".
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from relaxlm.compiler.link import run_tool
from relaxlm.errors import RelaxLMError, ToolchainError

# Behind $ROCM_PATH: AMD's packages, and Debian's.
FOLDERS = (
    "/opt/rocm/amdgcn/bitcode",
    "/usr/lib/*/amdgcn/bitcode",
    "/usr/lib/clang/*/amdgcn/bitcode",
)
INSTALL = "install ROCm, or Debian's rocm-device-libs, or set ROCM_PATH to where it is"
_CONTROLS = (
    "oclc_daz_opt_off",
    "oclc_correctly_rounded_sqrt_on",
    "oclc_finite_only_off",
    "oclc_unsafe_math_off",
)


@contextlib.contextmanager
def rocm_compilation(arch: str) -> Iterator[None]:
    """Within the block, TVM compiles ROCm kernels into machine code for one GPU.

    Args:
        arch: "gfx90a".

    Raises:
        ToolchainError: there is no bitcode or no lld, or lld refused the machine code.
    """
    files, lld = bitcode(arch), find_lld()
    errors: list[RelaxLMError] = []

    def link(machine_code: Any) -> bytearray:
        try:
            return _linked(bytes(machine_code), lld)
        except RelaxLMError as error:
            errors.append(error)
            raise

    functions: dict[str, Callable] = {
        "tvm_callback_rocm_bitcode_path": lambda *_: [str(file) for file in files],
        "tvm_callback_rocm_link": link,
    }
    import tvm_ffi

    theirs = {name: tvm_ffi.get_global_func(name) for name in functions}
    for name, function in functions.items():
        tvm_ffi.register_global_func(name, function, override=True)
    try:
        yield
    except Exception:
        # An exception that crosses TVM's C++ comes back with another type.
        if errors:
            raise errors[0] from None
        raise
    finally:
        for name, function in theirs.items():
            tvm_ffi.register_global_func(name, function, override=True)


def bitcode(arch: str) -> list[Path]:
    """The files of AMD's device libraries for a GPU.

    Raises:
        ToolchainError: they are not here.
    """
    folder = bitcode_folder()
    lanes = "on" if len(arch) == len("gfx90a") else "off"  # from gfx1010 on, there are 32
    names = ["ocml", *_CONTROLS, f"oclc_wavefrontsize64_{lanes}"]
    files = [folder / f"{name}.bc" for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ToolchainError(
            f"the ROCm device libraries in {folder} have no {', '.join(missing)}; install them "
            "again, or set ROCM_PATH to others"
        )
    return files


def bitcode_folder() -> Path:
    """Where AMD's device libraries are.

    Raises:
        ToolchainError: they are not here.
    """
    root = os.environ.get("ROCM_PATH")
    patterns = (f"{root}/amdgcn/bitcode",) if root else FOLDERS
    for pattern in patterns:
        for found in sorted(glob.glob(pattern)):
            if (Path(found) / "ocml.bc").is_file():
                return Path(found)
    raise ToolchainError(
        "compiling for device 'rocm' needs AMD's device libraries, which are not on this machine "
        f"(looked for ocml.bc in {', '.join(patterns)}); {INSTALL}"
    )


def find_lld() -> list[str]:
    """The command that links machine code of AMD's GPUs: lld of zig, ROCm or the system.

    In this order: of TVM's LLVM 22, an lld older than 18 does not know the format.

    Raises:
        ToolchainError: there is none.
    """
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "ld.lld"]
    root = os.environ.get("ROCM_PATH", "/opt/rocm")
    for place in (f"{root}/llvm/bin", None):
        if path := shutil.which("ld.lld", path=place):
            return [path]
    raise ToolchainError(
        "compiling for device 'rocm' needs the linker ld.lld, which is not on this machine: "
        "pip install 'relaxlm[cross]', or install LLVM's lld from version 18 on"
    )


def _linked(machine_code: bytes, lld: list[str]) -> bytearray:
    """An object file as the shared object that AMD's driver loads."""
    with tempfile.TemporaryDirectory(prefix="relaxlm-rocm-") as temporary:
        source, output = Path(temporary) / "kernels.o", Path(temporary) / "kernels.hsaco"
        source.write_bytes(machine_code)
        command = [*lld, "--no-undefined", "-shared", str(source), "-o", str(output)]
        run_tool(command, "link the kernels for ROCm")
        return bytearray(output.read_bytes())
