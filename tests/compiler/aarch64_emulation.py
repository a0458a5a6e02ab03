"""Runs kernels that TVM compiled for 64-bit ARM, in qemu's emulation of a user program.

    program = build({"double": prim_func}, features=("dotprod",))
    program.run("double", x, y)  # NumPy arrays; written in place

TVM compiles to an object as it would for a phone; a C program of ours, `aarch64_emulation.c`, takes
the place of TVM's runtime. So code generation, instructions and addresses are tested, not threads.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm_ffi.libinfo import find_include_path

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
# What every 64-bit ARM has.
BASE = ("neon",)

needs_emulator = pytest.mark.skipif(
    shutil.which(COMPILER) is None or shutil.which(EMULATOR) is None,
    reason=f"emulating ARM needs {COMPILER} and {EMULATOR}",
)

_FOLDER = tempfile.TemporaryDirectory(prefix="aarch64-emulation-")
# DLPack's type codes.
_CODES = {"i": 0, "u": 1, "f": 2, "bfloat16": 4}


def aarch64_target(features: Sequence[str] = ()) -> tvm.target.Target:
    """ARM with some of LLVM's features on top of what every such CPU has."""
    mattr = [f"+{name}" for name in (*BASE, *features)]
    return tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": mattr})


@dataclass(frozen=True)
class Program:
    """Kernels linked into a program for ARM.

    Attributes:
        assembly: what LLVM made of them.
    """

    path: Path
    assembly: str

    def run(self, name: str, *arrays: np.ndarray) -> None:
        """Call a kernel; arrays are written in place.

        Raises:
            RuntimeError: the kernel refused its arguments, or touched memory that is not its own.
        """
        request, result = self.path.with_suffix(".in"), self.path.with_suffix(".out")
        with request.open("wb") as file:
            file.write(np.int64(len(arrays)).tobytes())
            for array in arrays:
                code = _CODES.get(array.dtype.name, _CODES.get(array.dtype.kind))
                header = [code, 8 * array.itemsize, array.ndim, *array.shape]
                file.write(np.array(header, np.int64).tobytes())
                file.write(np.ascontiguousarray(array).tobytes())
        command = [EMULATOR, "-cpu", "max", self.path, name, request, result]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: exit status {done.returncode}: {done.stderr.strip()}")
        content = result.read_bytes()
        for array in arrays:
            array[...] = np.frombuffer(content[: array.nbytes], array.dtype).reshape(array.shape)
            content = content[array.nbytes :]
        assert not content


def build(kernels: dict[str, tvm.tirx.PrimFunc], features: Sequence[str] = ()) -> Program:
    """Compile and link kernels for a CPU with `features`, such as "dotprod"."""
    functions = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    module = tvm.compile(tvm.IRModule(functions), target=aarch64_target(features)).mod
    folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    module.write_to_file(str(folder / "kernels.o"))
    source = Path(__file__).with_suffix(".c")
    command = [COMPILER, "-O1", "-static", f"-I{find_include_path()}"]
    command += ["-DKERNELS=" + " ".join(f"KERNEL({name})" for name in kernels), str(source)]
    command += [str(folder / "kernels.o"), "-lm", "-o", str(folder / "program")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    return Program(folder / "program", module.inspect_source("asm"))
