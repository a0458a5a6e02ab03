"""Runs CUDA kernels that TVM generated on the CPU, to test what they compute without a GPU.

    with CudaEmulation() as cuda:
        kernel = cuda.build(prim_func)
        kernel(x, y)  # NumPy arrays; written in place

Inside the block TVM compiles for CUDA as always, but what makes a module of the kernels' C++ is
g++ with `cuda_emulation.hpp`, which says what is checked and what is missing. Host code is TVM's
own: argument checks and grid sizes are tested, too. Whole Relax functions run in the VM: give it
their executable's `.mod` and `tvm.cuda()`. CUDA memory is CPU memory as soon as this is imported.

Arguments lie between two inaccessible memory pages: a kernel that touches what is beyond an array's
end fails, or shows by NaN where up to 63 bytes of padding follow.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm_ffi.libinfo import find_include_path

from tests.compiler.global_functions import GlobalFunctions

TARGET = {"kind": "cuda", "arch": "sm_80", "max_threads_per_block": 1024, "thread_warp_size": 32}
CUDA = 2  # its number in DLPack
ORDERS = {"forward": "0", "reverse": "1", "random": "7"}

FORBIDDEN = 64 << 20  # bytes in front of and behind an array

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None,
    reason="the emulation of CUDA needs g++ on Linux",
)


def _use_cpu_memory_for_cuda() -> bool:
    """Make CUDA's memory the CPU's, for the rest of this process; False where there is a GPU.

    TVM asks for a device's functions once and keeps them, so this happens when the module is
    imported, before a test can make TVM ask for the real ones.
    """
    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None:
        return False
    tvm_ffi.register_global_func("device_api.cuda", tvm_ffi.get_global_func("device_api.cpu"))
    assert tvm.cuda(0).exist
    tvm_ffi.remove_global_func("device_api.cuda")
    return True


CPU_MEMORY_FOR_CUDA = _use_cpu_memory_for_cuda()
needs_cpu_memory = pytest.mark.skipif(
    not CPU_MEMORY_FOR_CUDA, reason="the Relax VM uses the GPU that is here"
)


class CudaEmulation:
    """While entered, TVM's CUDA kernels and CUDA memory are the CPU's.

    Args:
        order: in which order the threads of a block take turns: a key of `ORDERS`.
    """

    def __init__(self, order: str = "forward") -> None:
        self.order = order
        self.patch: Callable[[str], str] = lambda code: code  # applied to the generated C++
        self._functions = GlobalFunctions()
        self._modules: list[Any] = []

    def __enter__(self) -> CudaEmulation:
        self._functions.replace("ffi.Module.create.cuda", self._create_module)
        self._functions.replace("__tvm_set_device", lambda device_type, device_id: None)
        os.environ["CUDA_EMULATION_ORDER"] = ORDERS[self.order]
        return self

    def __exit__(self, *_: object) -> None:
        self._functions.restore()
        del os.environ["CUDA_EMULATION_ORDER"]

    def build(self, function: tvm.tirx.PrimFunc) -> Callable[..., None]:
        """Compile a PrimFunc with thread bindings.

        Returns:
            The kernel as a function of NumPy arrays and numbers, which writes the arrays in place.
        """
        return self.build_all([function])[0]

    def build_all(self, functions: Sequence[tvm.tirx.PrimFunc]) -> list[Callable[..., None]]:
        """The same for several: the host compiler reads CUDA's part of the code once."""
        first = len(self._modules)
        named = {f"kernel{first + i}": function for i, function in enumerate(functions)}
        module = tvm.IRModule(
            {name: function.with_attr("global_symbol", name) for name, function in named.items()}
        )
        compiled = tvm.compile(module, target=self.target).mod
        # Kept: a function does not keep its module's library loaded.
        self._modules += [compiled] * len(functions)
        return [of_arrays(compiled[name], CUDA) for name in named]

    @property
    def target(self) -> tvm.target.Target:
        return tvm.target.Target(TARGET, host={"kind": "llvm"})

    def tensor(self, array: np.ndarray) -> tvm.runtime.Tensor:
        """A copy of an array as a CUDA tensor, for the Relax VM."""
        return on_device(guarded(array), CUDA)

    def _create_module(self, code: bytes, format: str, functions: Any, source: Any) -> Any:
        """What TVM's CUDA runtime does with generated C++: make a module of it."""
        return load(emulated_source(self.patch(bytes(code).decode()), functions))


_FOLDER = tempfile.TemporaryDirectory(prefix="cuda-emulation-")


@functools.cache
def load(text: str) -> Any:
    """Compile C++ into a library and load it as a TVM module."""
    library = Path(_FOLDER.name) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    compile_cpp(text, library)
    return tvm_ffi.load_module(str(library))


def emulated_source(code: str, functions: Any) -> str:
    """TVM's CUDA C++ for a host compiler, with an entry point for each kernel."""
    lines = [host_source(code)]
    for name, info in functions.items():
        tags = ", ".join(f'"{tag}"' for tag in info.launch_param_tags)
        lines.append(
            f'extern "C" int __tvm_ffi_{name}(void*, const TVMFFIAny* args, int32_t count, '
            f'TVMFFIAny*) {{ return emu::entry("{name}", {name}, {{{tags}}}, args, count); }}'
        )
    return "\n".join(lines) + "\n"


def host_source(code: str) -> str:
    """TVM's CUDA C++ for a host compiler."""
    # The emulation has the functions of this file.
    code = re.sub(
        r"#ifndef RELAXLM_PTX\n.*?\n}  // namespace relaxlm\n#endif\n", "", code, flags=re.DOTALL
    )
    if "asm volatile" in code or "__asm__" in code.partition('extern "C"')[2]:
        raise NotImplementedError("the kernels contain inline PTX, which is not emulated")
    # g++ wants the attribute first.
    code = re.sub(r"__shared__ (alignas\(\d+\))", r"\1 __shared__", code)
    lines = ['#include "cuda_emulation.hpp"']
    for line in code.splitlines():
        words = line.split()
        if words[:1] == ["#include"] and words[1].startswith(
            ("<cuda", "<math_constants", "<mma", "<device")
        ):
            continue
        if "extern __shared__" in line:  # extern __shared__ uchar buf[];
            name = line.split("[")[0].split()[-1]
            line = f"  auto* {name} = (unsigned char*)emu::dynamic_shared.data();"
        lines.append(line)
    return "\n".join(lines)


_COMPILE = ("g++", "-std=c++17", "-O0", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing")


def compile_cpp(text: str, library: Path) -> None:
    """A library of C++ whose first line includes one of the emulations' headers."""
    header = text.partition("\n")[0].split('"')[1]
    source = library.with_suffix(".cpp")
    source.write_text(text)
    _run([*_COMPILE, "-shared", f"-I{_precompiled(header)}", *_includes()], source, library)


@functools.cache
def _precompiled(header: str) -> Path:
    """A folder that has a header as g++ reads it fastest: half of what a small kernel takes."""
    output = Path(_FOLDER.name) / f"{header}.gch"
    _run([*_COMPILE, *_includes(), "-x", "c++-header"], Path(__file__).parent / header, output)
    return output.parent


def _includes() -> list[str]:
    return [f"-I{Path(__file__).parent}", f"-I{find_include_path()}"]


def _run(command: Sequence[str], source: Path, output: Path) -> None:
    result = subprocess.run(
        [*command, "-o", str(output), str(source)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{source}:\n{result.stderr[:4000]}"


def guarded(array: np.ndarray) -> np.ndarray:
    """A copy whose memory ends right before, and starts less than a page after, forbidden memory.

    Sixty-four mebibytes of it, so that an index gone wild does not hit another array.
    Its address is a multiple of 64, as TVM requires; so up to 63 bytes of 0xFF follow the end.
    """
    size = max(-(-array.nbytes // 64) * 64, 64)
    usable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, usable + 2 * FORBIDDEN)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert protect(start, FORBIDDEN, 0) == 0
    assert protect(start + FORBIDDEN + usable, FORBIDDEN, 0) == 0
    whole = np.frombuffer(memory, np.uint8)[FORBIDDEN : FORBIDDEN + usable]
    whole[:] = 0xFF
    copy = whole[whole.size - size :][: array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def of_arrays(run: Callable[..., None], device_type: int) -> Callable[..., None]:
    """A kernel of tensors on a device, as a function of arrays and numbers."""

    def kernel(*arguments: np.ndarray | float) -> None:
        copies = [guarded(x) if isinstance(x, np.ndarray) else x for x in arguments]
        run(*(on_device(x, device_type) if isinstance(x, np.ndarray) else x for x in copies))
        for array, copy in zip(arguments, copies, strict=True):
            if isinstance(array, np.ndarray):
                array[...] = copy

    return kernel


class _OnDevice:
    """Offers an array through DLPack as if it were on a device."""

    def __init__(self, array: np.ndarray, device_type: int) -> None:
        self.device_type = device_type
        name = array.dtype.name
        plain = array.view(f"uint{8 * array.itemsize}")
        self.capsule = plain.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        # DLTensor: void* data; int32 device_type, device_id; int32 ndim; uint8 code, bits; ...
        tensor = pointer(self.capsule, b"dltensor")
        ctypes.c_int32.from_address(tensor + 8).value = device_type
        code = {"i": 0, "u": 1, "f": 2, "b": 4}[name[0]]  # the b of bfloat16
        ctypes.c_uint8.from_address(tensor + 20).value = code

    def __dlpack__(self, **_: object) -> object:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device_type, 0


def on_device(array: np.ndarray, device_type: int) -> tvm.runtime.Tensor:
    """The array's own memory as a tensor on a device."""
    return tvm_ffi.from_dlpack(_OnDevice(array, device_type))
