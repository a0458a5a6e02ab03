"""`relaxlm bench`: its table, its file and its errors. No test asserts a time."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from relaxlm.cli import main as program
from tests.tiny_model import TinyModel


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tiny: TinyModel):
    monkeypatch.setattr(program, "COMMANDS", ("bench",))

    def run(*arguments: object):
        words = ["bench", tiny.folder, "--model-lib", tiny.library, "--rounds", 1, *arguments]
        return CliRunner().invoke(program.app, [str(word) for word in words], prog_name="relaxlm")

    return run


def test_prompts_then_contexts_then_batches(bench, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    result = bench("--prompt", "16,40", "--context", "8,20", "--batch", "1,3", "--json", output)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert "llama, q0f32, float32 cache; cpu, " in lines[0]
    assert [line.split("  ")[0] for line in lines[2:-1]] == [
        *("prompt of 16", "prompt of 40", "decode after 8", "decode after 20"),
        "decode after 8, 3 sequences",
    ]
    assert lines[-1].startswith("reading the weights and nothing else, meanwhile: ")
    found = json.loads(output.read_text())
    assert [(row["kind"], row["tokens"], row["batch"]) for row in found["rows"]] == [
        *(("prefill", 16, 1), ("prefill", 40, 1)),
        *(("decode", 8, 1), ("decode", 20, 1), ("decode", 8, 3)),
    ]
    for row in found["rows"]:
        speed = row["batch"] if row["kind"] == "decode" else row["tokens"]
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(speed)


def test_numbers_that_are_none(bench) -> None:
    result = bench("--batch", "1,x")
    assert result.exit_code == 2 and "expected numbers above 0" in result.stderr


def test_more_than_the_library_takes(bench) -> None:
    result = bench("--prompt", "8", "--context", "8", "--batch", "200")
    assert result.exit_code == 1 and '--overrides "max_batch_size=200"' in result.stderr
    result = bench("--prompt", "300", "--context", "8")
    assert result.exit_code == 1 and '--overrides "context_window_size=300"' in result.stderr
