"""Libraries for 64-bit ARM compute there what libraries for this machine compute here.

qemu's user mode runs an ARM Python with the released wheels, of which only the run-time parts are
there (`tools/arm64_root.sh`), on a library that was compiled and linked here.
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
from tests.compiler import arm64_step
from tests.tiny_model import TinyModel, convert

QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
ROOT = Path(os.environ.get("RELAXLM_ARM64_ROOT") or cache_folder().parent / "relaxlm-arm64")
FLOAT, ROUNDED = "O1;act_quant=0", "O1;act_quant=1"
LIMITS = "prefill_chunk_size=64;max_batch_size=4;kv_cache_dtype=float32"

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
def folder(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's weights in 4 bits."""
    return convert(tiny.source, tmp_path_factory.mktemp("arm64") / "tiny-q4f16_1", "q4f16_1")


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What this machine computes, in float32 and with activations rounded to bytes."""
    found = {}
    for opt in (FLOAT, ROUNDED):
        library = tmp_path_factory.mktemp("here") / "here.so"
        # A level of x86-64 whose kernels round to bytes, as ARM's, and not to bfloat16.
        compiled = CompileRequest.read(folder, None, "cpu", "x86-64-v3", LIMITS, opt).compile()
        compiled.save(library)
        found[opt] = arm64_step.logits(library, folder)
    return found


def on_arm(library: Path, folder: Path, output: Path) -> np.ndarray:
    """What `arm64_step.py` computes there."""
    project = Path(__file__).parents[2]
    paths = f"{ROOT / 'packages'}:{project}"
    command = [QEMU, "-cpu", "max", "-L", ROOT, "-E", f"PYTHONPATH={paths}"]
    python = next((ROOT / "usr" / "bin").glob("python3.[0-9]*"))
    script = project / "tests" / "compiler" / "arm64_step.py"
    result = subprocess.run(
        [*command, "-E", "TVM_NUM_THREADS=2", python, script, library, folder, output],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return np.load(output)["logits"]


@pytest.mark.parametrize(
    ("arch", "opt", "tolerance"),
    [
        ("armv8-a", FLOAT, 1e-5),
        # A sum in another order may be rounded to the next byte.
        ("armv8.2-a+dotprod", ROUNDED, 5e-3),
        ("armv8.6-a", ROUNDED, 5e-3),
    ],
)
def test_logits_are_those_of_this_machine(
    arch: str,
    opt: str,
    tolerance: float,
    expected: dict[str, np.ndarray],
    folder: Path,
    tmp_path: Path,
) -> None:
    library = tmp_path / "there.so"
    CompileRequest.read(folder, None, "linux-arm64", arch, LIMITS, opt).compile().save(library)
    found = on_arm(library, folder, tmp_path / "out.npz")
    limit = tolerance * np.abs(expected[opt]).max()
    np.testing.assert_allclose(found, expected[opt], rtol=0, atol=limit)
