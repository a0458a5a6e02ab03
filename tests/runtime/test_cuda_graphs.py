"""Steps of replies as CUDA graphs, by TVM's CUDA runtime on a stand-in for the driver."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiler import fake_cuda
from tests.compiler.cuda_emulation import needs_compiler

CASES = Path(__file__).with_name("cuda_graph_cases.py")


@needs_compiler
def test_cases_pass_in_a_process_with_a_fake_gpu(tmp_path: Path) -> None:
    folder = tmp_path / "libraries"
    folder.mkdir()
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake_cuda.build(folder))}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    result = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'cases'}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        pytest.fail(f"{result.stdout[-8000:]}\n{result.stderr[-2000:]}")
    assert " passed" in result.stdout and "skipped" not in result.stdout
