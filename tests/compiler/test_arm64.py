"""A library for 64-bit ARM computes there what one for this machine computes here, in each version.

qemu's user mode runs an ARM Python with the released wheels, of which only the run-time parts are
there (`tools/arm64_root.sh`), on a library that was compiled and linked here. It emulates
processors that have no more than a version needs, so that an instruction too many is an error.
"""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from relaxlm.compiler.request import CompileRequest
from relaxlm.files import cache_folder
from relaxlm.runtime import cpu
from relaxlm.runtime.multiversion import VARIABLE
from tests.compiler import runtime_step
from tests.compiler.conftest import LIMITS, Portable

QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
ROOT = Path(os.environ.get("RELAXLM_ARM64_ROOT") or cache_folder().parent / "relaxlm-arm64")

pytestmark = [
    pytest.mark.skipif(
        not {"avx2", "f16c", "fma"} <= cpu.host_cpu_features(), reason="compares with AVX2"
    ),
    pytest.mark.skipif(QEMU is None, reason="no qemu-aarch64 (Debian's package qemu-user)"),
    pytest.mark.skipif(
        not (ROOT / "ready").exists(),
        reason=f"no ARM Python in {ROOT}: make it with tools/arm64_root.sh",
    ),
]


pytest.importorskip("ziglang")
pytest.importorskip("lief")


@pytest.fixture(scope="module")
def library(portable: Portable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights' library for ARM, in all versions."""
    path = tmp_path_factory.mktemp("arm64") / "there.so"
    request = CompileRequest.read(portable.folder, None, "linux-arm64:portable", None, LIMITS, "O1")
    request.compile().save(path)
    return path


def on_arm(library: Path, folder: Path, output: Path, processor: str, version: str) -> np.ndarray:
    """What `runtime_step.py` computes there.

    Args:
        processor: to emulate, by qemu's name.
        version: to load; "" for the best that there is.
    """
    project = Path(__file__).parents[2]
    paths = f"{ROOT / 'packages'}:{project}"
    command = [QEMU, "-cpu", processor, "-L", ROOT, "-E", f"PYTHONPATH={paths}"]
    command += ["-E", f"{VARIABLE}={version}", "-E", "TVM_NUM_THREADS=2"]
    python = next((ROOT / "usr" / "bin").glob("python3.[0-9]*"))
    script = project / "tests" / "compiler" / "runtime_step.py"
    result = subprocess.run(
        [*command, python, script, library, folder, output],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = np.load(output)
    # ROOT's /proc/cpuinfo lists all extensions, whatever is emulated.
    assert found["version"] == (version or "armv8.6-a")
    return found["logits"]


@pytest.mark.parametrize(
    ("version", "processor", "like", "tolerance"),
    [
        ("armv8-a", "cortex-a53", "x86-64-v2", 1e-5),
        # A sum in another order may be rounded to the next byte.
        ("armv8.2-a+dotprod", "cortex-a76", "x86-64-v3", 5e-3),
        ("", "max", "x86-64-v3", 5e-3),
    ],
)
def test_logits_are_those_of_this_machine(
    version: str,
    processor: str,
    like: str,
    tolerance: float,
    portable: Portable,
    library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Versions of x86-64 with the same roundings: of nothing, and of activations to bytes.
    monkeypatch.setenv(VARIABLE, like)
    expected = runtime_step.logits(portable.library, portable.folder)
    found = on_arm(library, portable.folder, tmp_path / "out.npz", processor, version)
    limit = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit)
