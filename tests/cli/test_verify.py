"""`relaxlm verify`: what it prints, its files and its exit codes."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from relaxlm.cli import main as program
from tests.models import parity
from tests.verification.test_verify import change_tensor, convert, save_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and the same converted to q4f16_1."""
    source = save_checkpoint(
        tmp_path_factory.mktemp("qwen"), parity.tiny_config("qwen2", tie_word_embeddings=True)
    )
    return source, convert(source, tmp_path_factory.mktemp("dist") / "converted", "q4f16_1")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, cache: Path):
    monkeypatch.setenv("RELAXLM_CACHE", str(cache))
    monkeypatch.delenv("RELAXLM_DEBUG", raising=False)
    monkeypatch.setattr(program, "COMMANDS", ("verify",))

    def verify(*arguments: object):
        words = ["verify", *map(str, arguments), "--device", "cpu"]
        return CliRunner().invoke(program.app, words, prog_name="relaxlm")

    return verify


def test_a_library_that_passes(run, folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, folder = folders
    output = tmp_path / "found.json"
    result = run(source, folder, "--min-top1", 0.3, "--max-length", 40, "--json", output)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].endswith(f".so: qwen2, q4f16_1, cpu, float16 cache; weights in {folder}")
    assert lines[1].startswith("needs about ") and "the original 800 MB, the library " in lines[1]
    assert lines[2] == "weights: exactly what q4f16_1 makes of the checkpoint"
    assert sum(line.startswith("against ") for line in lines) == 2
    assert lines[-1] == "verified"
    assert max(map(len, lines[2:])) <= 80
    found = json.loads(output.read_text())
    assert found["passed"] and found["failure"] is None
    assert [part["reference"] for part in found["comparisons"]] == ["float", "dequantized"]
    # Six texts of our own, some cut to 40 tokens.
    assert len(found["comparisons"][0]["prompts"]) == 6
    assert max(prompt["tokens"] for prompt in found["comparisons"][0]["prompts"]) == 40


def test_texts_come_from_options_and_files(run, folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, folder = folders
    texts, output = tmp_path / "texts.txt", tmp_path / "found.json"
    texts.write_text("third, größer\n\nfourth\n", encoding="utf-8")
    result = run(
        *(source, folder, "--prompt", "first", "--prompt", "second\nline", "--prompts", texts),
        *("--json", output, "--reference", "dequantized"),
    )
    assert result.exit_code == 0, result.output
    (comparison,) = json.loads(output.read_text())["comparisons"]
    found = [prompt["prompt"] for prompt in comparison["prompts"]]
    assert found == ["first", "second\nline", "third, größer", "fourth"]


def test_a_file_without_texts_is_an_error(run, folders: tuple[Path, Path], tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n \n")
    result = run(*folders, "--prompts", texts)
    assert result.exit_code == 1
    assert result.stderr == f"error: {texts} has no text, expected one prompt per line\n"


def test_a_broken_library_is_exit_code_1(run, folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, folder = folders
    broken, output = shutil.copytree(folder, tmp_path / "broken"), tmp_path / "found.json"
    change_tensor(
        broken, "model.layers.1.self_attn.c_attn.bias", lambda values: values * values.dtype.type(3)
    )
    arguments = ("--prompt", "The quick brown fox.", "--min-top1", 0, "--json", output)
    result = run(source, broken, *arguments)
    assert result.exit_code == 1
    assert " does not pass. Against the values that the library stores the " in result.stderr
    assert " First diverging: layer 1 (relative error " in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    # The numbers are there all the same.
    assert "verified" not in result.stdout
    assert any(line.endswith("<- first") for line in result.stdout.splitlines())
    assert json.loads(output.read_text())["passed"] is False


def test_a_threshold_of_ones_own_decides(run, folders: tuple[Path, Path]) -> None:
    arguments = (*folders, "--prompt", "The quick brown fox.")
    result = run(*arguments, "--threshold", 1e-6, "--min-top1", 0)
    assert result.exit_code == 1
    assert "Against the checkpoint in float32 the mean KL is " in result.stderr
    assert result.stderr.endswith(
        "nats, allowed are 1e-06. It computes exactly what it stores: q4f16_1 with a float16 cache "
        "costs this model as much. Try a preset with more bits.\n"
    )
    result = run(*arguments, "--max-error", 1e-9, "--min-top1", 0)
    assert result.exit_code == 1
    assert "Against the values that the library stores the largest error" in result.stderr


@pytest.mark.parametrize(
    "options", [("--min-top1", 1.5), ("--max-length", 0), ("--reference", "exact")]
)
def test_values_out_of_range_are_usage_errors(run, folders: tuple[Path, Path], options) -> None:
    assert run(*folders, *options).exit_code == 2
