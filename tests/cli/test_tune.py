"""`relaxlm tune`: what it searches, prints and keeps. No test asserts a time."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from relaxlm.cli import main as program
from relaxlm.compiler.kernels import tuning
from relaxlm.compiler.kernels.cpu_rounded import supports
from relaxlm.compiler.kernels.isa import best_isa
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.tuning import Tuning
from relaxlm.profiling import search
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.cpu import host_cpu_features
from tests.tiny_model import TinyModel, convert


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RELAXLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(program, "COMMANDS", ("tune",))
    monkeypatch.setattr(search, "RESIDENT", 1 << 20)
    monkeypatch.setattr(search, "AHEAD", (1024, 4096))
    monkeypatch.setattr(search, "TASK_ROWS", (32, 512))
    monkeypatch.setattr(search, "ROWS", 40)

    def run(folder: Path):
        words = ["tune", str(folder), "--seconds", "0.01"]
        return CliRunner().invoke(program.app, words, prog_name="relaxlm")

    return run


def test_every_matrix_is_measured_and_the_result_kept(
    tune, tiny: TinyModel, tmp_path: Path
) -> None:
    isa = best_isa(host_cpu_features().__contains__)
    if isa is None:
        pytest.skip("no dot products here")
    quant = get_scheme("q4f16_1").linear
    if not supports(StoredMatrix(64, 64, quant, "float16"), isa):
        pytest.skip("no kernels for matrices as small as these on this CPU")
    folder = convert(tiny.source, tmp_path / "q4", "q4f16_1")
    tuning.save(tmp_path / "cache", Tuning(), []).write_text("{")  # what was there is not read
    result = tune(folder)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    shapes = {line.partition("[")[2].partition("]")[0] for line in lines if "rows of x" in line}
    assert shapes == {"128, 64", "64, 64", "192, 64", "64, 96", "320, 64"}
    found = tuning.saved(tmp_path / "cache")
    assert lines[-3].startswith(f"ahead = {found.ahead}")
    assert lines[-2].startswith(f"task_rows = {found.task_rows}")
    assert lines[-1] == f"wrote {tuning.path(tmp_path / 'cache')}"
    measured = json.loads(tuning.path(tmp_path / "cache").read_text())["measured"]
    parameters = {sample["parameter"] for sample in measured}
    assert parameters == ({"ahead", "task_rows"} if isa == "amx" else {"ahead"})


def test_a_preset_without_parameters(tune, tiny: TinyModel) -> None:
    result = tune(tiny.folder)
    assert result.exit_code == 1
    assert "nothing to tune: q0f32 has no kernels with parameters on this CPU" in result.stderr
