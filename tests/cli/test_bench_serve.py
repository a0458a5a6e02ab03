"""`relaxlm bench serve`: a server is started, measured and ended. No test asserts a time."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from relaxlm.cli import main as program
from relaxlm.profiling.serving_process import HOST, free_port
from tests.tiny_model import TinyModel


def run(*arguments: object):
    words = ["bench", "serve", *map(str, arguments)]
    return CliRunner().invoke(program.app, words, prog_name="relaxlm")


def test_a_server_is_started_and_measured(tiny: TinyModel, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    loads = ("--concurrency", "1,2", "--requests", 4, "--seed", 3)
    lengths = ("--prompt-tokens", "90:120", "--output-tokens", 6, "--shared-prefix", 32)
    files = ("--json", tmp_path / "x.json", "--plot", tmp_path / "x.png")
    served = (tiny.folder, "--model-lib", tiny.library, "--options", "--threads 1")
    result = run(*served, *loads, *lengths, *files)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].endswith(
        "4 requests of 90 to 120 tokens, 32 of them shared, replies of 6; seed 3"
    )
    assert [line.split("  ")[0] for line in lines[2:4]] == ["1 at a time", "2 at a time"]
    assert lines[-1] == f"wrote {tmp_path / 'x.png'}" and (tmp_path / "x.png").exists()
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["exact"] and found["dialect"]["extensions"] == {"ignore_eos": True}
    for load in found["loads"]:
        assert load["errors"] == {} and load["output_tokens"] == 4 * 6
        assert load["cached_tokens"] >= 4 * 32 and load["queued"] is not None
        assert all(90 <= one["prompt_tokens"] <= 120 for one in load["exchanges"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "name a FOLDER to serve, or the --url"),
        (("folder", "--url", "http://x"), "name a FOLDER to serve, or the --url"),
        (("--url", "http://x", "--options", "--threads 1"), "are for a FOLDER, not for --url"),
        (("folder", "--concurrency", "0"), "expected numbers above 0"),
        (("folder", "--concurrency", "2", "--request-rate", "2"), "two kinds of load"),
        (("folder", "--request-rate", "x"), "expected numbers above 0"),
    ],
)
def test_arguments_that_do_not_fit(arguments: tuple[str, ...], error: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert error in " ".join(result.stderr.replace("│", " ").split())


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("folder", "--prompt-tokens", "9:3")
    assert result.exit_code == 1 and "two such as 100:400" in result.stderr
    result = run("--url", f"http://{HOST}:{free_port()}")
    assert result.exit_code == 1 and "is the server running" in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("folder", "--plot", "x.png")
    assert result.exit_code == 1 and "pip install 'relaxlm[plot]'" in result.stderr
