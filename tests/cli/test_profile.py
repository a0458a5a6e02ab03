"""`relaxlm profile`: its tables, its file and its errors."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from relaxlm.cli import main as program
from tests.tiny_model import TinyModel


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, tiny: TinyModel):
    monkeypatch.setattr(program, "COMMANDS", ("profile",))

    def run(*arguments: object):
        words = ["profile", tiny.folder, "--model-lib", tiny.library, "--rounds", 1, *arguments]
        return CliRunner().invoke(program.app, [str(word) for word in words], prog_name="relaxlm")

    return run


def test_a_table_per_step(profile, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    result = profile("--prompt", 24, "--context", 9, "--batch", 2, "--layers", "--json", output)
    assert (result.exit_code, result.stderr) == (0, "")
    tables = [table.splitlines() for table in result.stdout.split("\n\n")]
    assert len(tables) == 4
    assert tables[0][0].startswith("prompt of 24 tokens: ")
    assert tables[2][0].startswith("decode after 9 tokens, 2 sequences: ")
    for table in (tables[1], tables[3]):
        assert [row.split()[0] for row in table] == ["layer", "before", "0", "1", "after"]
    for table in (tables[0], tables[2]):
        assert table[1].split() == "kernel works on calls ms share MB GB/s GOPS".split()
        assert table[-1].startswith("outside kernels")
    found = json.loads(output.read_text())["steps"]
    assert [step["tokens"] for step in found] == [24, 2]


def test_no_picture_without_matplotlib(profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = profile("--png", "steps.png")
    assert result.exit_code == 1 and result.stdout == ""
    assert "pip install 'relaxlm[plot]'" in result.stderr
