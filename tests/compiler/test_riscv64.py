"""A library for 64-bit RISC-V computes there what one for this machine computes here.

There are no wheels of TVM for it. Its runtime is compiled from the sources in the wheel, together
with a program (`replay.cpp`) that repeats a session's calls, and qemu's user mode runs both on the
library's file.
"""

import ctypes
import hashlib
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relaxlm.compiler import riscv_half
from relaxlm.compiler.request import CompileRequest
from relaxlm.compiler.web import runtime
from relaxlm.files import cache_folder
from relaxlm.runtime import cpu, tvm_runtime
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.multiversion import VARIABLE
from relaxlm.versions import PINNED
from tests.compiler import runtime_step
from tests.compiler.conftest import LIMITS, Portable

COMPILER = shutil.which("riscv64-linux-gnu-g++")
QEMU = shutil.which("qemu-riscv64") or shutil.which("qemu-riscv64-static")
PROGRAM = Path(__file__).with_name("replay.cpp")
PROGRAMS = cache_folder().parent / "relaxlm-riscv64"  # of the machine, not of the tests
# Where Debian's cross compiler has the C library that programs load there.
SYSTEM = "/usr/riscv64-linux-gnu"
# Numbers of DLPack for NumPy's kinds.
CODES = {"i": 0, "u": 1, "f": 2}

MISSING = [
    what
    for what, there in (
        ("AVX2, to compare with", {"avx2", "f16c", "fma"} <= cpu.host_cpu_features()),
        ("compiler for RISC-V (Debian's g++-riscv64-linux-gnu)", COMPILER),
        ("qemu-riscv64 (Debian's qemu-user)", QEMU),
    )
    if not there
]

pytest.importorskip("ziglang")
pytest.importorskip("lief")


def test_conversions_of_halves(tmp_path: Path) -> None:
    """The same code for this machine, of every half and of what lies between two."""
    calls = """
void to_floats(const _Float16 *given, float *found, int n) {
  for (int i = 0; i < n; i++) found[i] = relaxlm_extend(given[i]);
}
void to_halves(const float *given, _Float16 *found, int n) {
  for (int i = 0; i < n; i++) found[i] = relaxlm_truncate(given[i]);
}
"""
    code = riscv_half.SOURCE + calls
    code = code.replace("__extendhfsf2", "relaxlm_extend")  # a compiler has functions of this name
    source, library = tmp_path / "half.c", tmp_path / "half.so"
    source.write_text(code.replace("__truncsfhf2", "relaxlm_truncate"))
    zig = [sys.executable, "-m", "ziglang", "cc", "-O1", "-shared", "-fPIC", "-nostdlib"]
    subprocess.run([*zig, source, "-o", library], check=True)
    functions = ctypes.CDLL(str(library))

    def called(name: str, given: np.ndarray, kind: type) -> np.ndarray:
        found = np.empty(len(given), kind)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (given, found)]
        getattr(functions, name)(*pointers, len(given))
        return found

    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    floats = called("to_floats", halves, np.float32)
    np.testing.assert_array_equal(floats, halves.astype(np.float32))
    np.testing.assert_array_equal(called("to_halves", floats, np.float16), halves)
    # Ties, and their neighbours; past the largest half; and random bits.
    finite = np.sort(floats[np.isfinite(floats)])
    ties = (finite[1:].astype(np.float64) + finite[:-1]).astype(np.float32) / 2
    random = np.random.default_rng(3).integers(0, 1 << 32, 1 << 18, np.uint32).view(np.float32)
    edges = np.array([65519.996, 65520, 1e30, 2**-25, 2**-26, -0.0], np.float32)
    parts = [ties, np.nextafter(ties, np.float32(9)), np.nextafter(ties, np.float32(-9))]
    given = np.concatenate([*parts, random, edges])
    with np.errstate(over="ignore"):
        expected = given.astype(np.float16)
    np.testing.assert_array_equal(called("to_halves", given, np.float16), expected)
    assert np.signbit(called("to_halves", given, np.float16))[-1]


@pytest.fixture(scope="module")
def program() -> Path:
    """The runtime and `replay.cpp`, compiled once per machine, in less than a minute."""
    assert COMPILER is not None
    state = hashlib.sha256(repr(sorted(PINNED.items())).encode() + PROGRAM.read_bytes())
    for header in sorted(runtime.HEADERS.rglob("*.h")):
        state.update(header.read_bytes())
    folder = PROGRAMS / state.hexdigest()[:32]
    if not (folder / "replay").exists():
        shutil.rmtree(folder, ignore_errors=True)
        runtime.assemble(folder / "tree")
        include = [f"-I{path}" for path in runtime.INCLUDED]
        command = [COMPILER, "-std=c++17", "-w", "-rdynamic", *include, str(PROGRAM)]
        command += ["-o", "../made", "-ldl", "-lpthread", "-latomic"]
        subprocess.run(command, cwd=folder / "tree", check=True, capture_output=True)
        shutil.rmtree(folder / "tree")
        (folder / "made").rename(folder / "replay")
    return folder / "replay"


@pytest.fixture(scope="module")
def library(portable: Portable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("riscv64") / "there.so"
    request = CompileRequest.read(portable.folder, None, "linux-riscv64", None, LIMITS, "O1")
    request.compile().save(path)
    return path


def written(arrays: Iterable[np.ndarray]) -> bytes:
    """A list of tensors, as `replay.cpp` reads it."""
    parts = []
    for array in arrays:
        head = (CODES[array.dtype.kind], 8 * array.itemsize, array.ndim, *array.shape, array.nbytes)
        parts += [struct.pack(f"<{len(head)}q", *head), array.tobytes()]
    return struct.pack("<q", len(parts) // 2) + b"".join(parts)


@pytest.mark.skipif(bool(MISSING), reason=f"no {', no '.join(MISSING)}")
def test_logits_are_those_of_this_machine(
    portable: Portable,
    program: Path,
    library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "x86-64-v2")  # which rounds no more than the code for RISC-V
    states: list[bytes] = []
    steps: list[bytes] = []
    set_params = Executor._set_params

    def recorded(self: Executor, tensors: Any) -> None:
        set_params(self, tensors)
        states.extend(written(map(tvm_runtime.download, part)) for part in (self._kv, self._params))
        forward = self._forward

        def call(*given: Any) -> Any:
            *inputs, _, _ = given
            steps.append(written(map(tvm_runtime.download, inputs)))
            return forward(*given)

        self._forward = call

    monkeypatch.setattr(Executor, "_set_params", recorded)
    expected = runtime_step.logits(portable.library, portable.folder)
    assert len(steps) == len(expected)
    calls, output = tmp_path / "calls", tmp_path / "logits"
    calls.write_bytes(b"".join([*states, struct.pack("<q", len(steps)), *steps]))
    command = [QEMU, "-L", SYSTEM, "-E", "TVM_NUM_THREADS=2", program, library, calls, output]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = np.fromfile(output, np.float32).reshape(expected.shape)
    limit = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit)
