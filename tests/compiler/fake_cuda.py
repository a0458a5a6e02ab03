"""A stand-in for NVIDIA's driver and runtime libraries, so that TVM's own CUDA runtime runs.

    environment = {**os.environ, "LD_LIBRARY_PATH": str(build(folder))}    # of a new process
    with kernels_on_the_cpu(folder):                                       # in that process
        compile_model(...).save(library)

`fake_cuda.cpp` says what it does and what it finds out. A process has to be started with it: the
linker binds TVM's libraries when they are loaded. Kernels are those of `cuda_emulation`.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from relaxlm.compiler import build as compiling
from relaxlm.runtime import cuda
from tests.compiler import cuda_emulation

SOURCE = Path(__file__).with_suffix(".cpp")
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(')
# What TVM's libraries ask for carries the name of NVIDIA's runtime library as its version.
_VERSIONS = f"{cuda.CUDART} {{ global: cu*; fake_cuda*; local: *; }};"


def build(folder: Path) -> Path:
    """Compile the stand-ins into a folder, for LD_LIBRARY_PATH."""
    versions, library = folder / "versions", folder / cuda.CUDART
    versions.write_text(_VERSIONS)
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror"]
    command += [f"-Wl,-soname,{cuda.CUDART}", f"-Wl,--version-script={versions}"]
    result = subprocess.run(
        [*command, "-o", str(library), str(SOURCE), "-ldl"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[:4000]
    (folder / cuda.DRIVER).symlink_to(library.name)  # the linker knows that it is the same
    return folder


def counted(what: str) -> int:
    """How often something has happened: see `fake_cuda_count` of `fake_cuda.cpp`."""
    return ctypes.CDLL(cuda.CUDART).fake_cuda_count(what.encode())


def without_kernels(idle: bool) -> None:
    """Let kernels do nothing, from now on, to measure what the CPU does; or compute again."""
    ctypes.CDLL(cuda.CUDART).fake_cuda_idle(idle)


@contextmanager
def kernels_on_the_cpu(folder: Path) -> Iterator[None]:
    """Within the block, libraries for CUDA get kernels that the stand-in for a driver can run.

    Args:
        folder: where to put the kernels; as long as the libraries are used.
    """
    import tvm_ffi

    def compile_kernels(code: str) -> bytes:
        names = dict.fromkeys(_KERNEL.findall(code))  # each is declared, then defined
        entries = [
            f'extern "C" FakeLaunch* fake_kernel_{name}(void** arguments) '
            f"{{ return emu::record({name}, arguments); }}"
            for name in names
        ]
        text = "\n".join([cuda_emulation.host_source(code), *entries, ""])
        library = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            cuda_emulation.compile_cpp(text, library)
        return f"FAKE:{library}".encode() + b"\0"

    @contextmanager
    def compilation(*_: object) -> Iterator[SimpleNamespace]:
        name = "tvm_callback_cuda_compile"
        theirs = tvm_ffi.get_global_func(name)
        tvm_ffi.register_global_func(name, compile_kernels, override=True)
        yield SimpleNamespace()
        tvm_ffi.register_global_func(name, theirs, override=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "cuda_compilation", compilation)
        # There is no machine code.
        patch.setattr(compiling, "check_device_code", lambda *_: [])
        yield
