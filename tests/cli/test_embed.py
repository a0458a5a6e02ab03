"""`relaxlm embed`: texts in, vectors out; and other commands on an embedding model."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from relaxlm.cli import embed as command
from relaxlm.cli import main as program
from tests.tiny_embedder import unit


@pytest.fixture
def run(tiny_embedder):
    """Runs `relaxlm embed` on the tiny embedding model; with exit_code, stdout and stderr."""

    def invoke(*options: object, input: str = "", command: str = "embed"):
        place = (str(tiny_embedder.folder), "--model-lib", str(tiny_embedder.library))
        arguments = [command, *place, *map(str, options)]
        return CliRunner().invoke(program.app, arguments, input=input, prog_name="relaxlm")

    return invoke


def test_texts_become_json_lines(run, tiny_embedder) -> None:
    done = run("--text", "the cat", "--text", "größe : 🙂", "--prompt-name", "query")
    assert done.exit_code == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["the cat", "größe : 🙂"]
    expected = unit(tiny_embedder.vectors(["query: the cat", "query: größe : 🙂"]))
    found = np.array([row["embedding"] for row in rows])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert "parameters" in done.stderr


def test_lines_become_an_array(run, tiny_embedder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "_BLOCK", 2)
    lines = ["the cat", "x", "the dog ran", "hello world", "x y"]
    file, array = tmp_path / "lines.txt", tmp_path / "vectors.npy"
    file.write_text("\n".join(lines) + "\n")
    done = run("--texts", file, "-o", array, "--dimensions", 16)
    assert done.exit_code == 0, done.stderr
    expected = unit(tiny_embedder.vectors(lines)[:, :16])
    np.testing.assert_allclose(np.load(array), expected, rtol=1e-4, atol=1e-5)
    assert f"wrote {array}: 5 vectors of 16 numbers" in done.stderr
    piped = run("-o", tmp_path / "vectors.jsonl", input="the cat\r\nx\n")
    assert piped.exit_code == 0, piped.stderr
    rows = (tmp_path / "vectors.jsonl").read_text().splitlines()
    assert [json.loads(row)["text"] for row in rows] == ["the cat", "x"]


def test_what_cannot_be_embedded_leaves_no_file(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "_BLOCK", 2)
    output = tmp_path / "vectors.npy"
    long = "the cat " * 60
    for given, message in (
        ("the cat\n\nx\n", "error: text 2 is empty: leave it out"),
        (f"the cat\nx\n{long}\n", "error: of the texts from number 3 on, counted from 0: text 0 "),
        ("", "error: no text to embed"),
    ):
        done = run("-o", output, input=given)
        assert done.exit_code == 1 and message in done.stderr, done.stderr
        assert list(tmp_path.iterdir()) == []
    assert run("-o", output, "--truncate", input=long).exit_code == 0
    done = run("-o", tmp_path / "vectors.csv", "--text", "x")
    assert done.exit_code == 1 and "expected a name that ends in .npy or .jsonl" in done.stderr
    assert run("--text", "x", "--texts", "y").exit_code == 2


def test_an_embedding_model_is_refused_where_replies_are_asked_for(run, tiny_embedder) -> None:
    name = tiny_embedder.folder.name
    done = run("--prompt", "Hello", command="chat")
    assert done.exit_code == 1
    assert f"error: {name} is an embedding model: it makes vectors" in done.stderr
    for command_ in ("bench", "profile"):
        done = run(command=command_)
        assert done.exit_code == 1 and "is a library for embeddings" in done.stderr, done.stderr


def test_the_whole_way_from_a_folder(tiny_encoder, tmp_path: Path) -> None:
    def relaxlm(*arguments: object):
        given = list(map(str, arguments))
        return CliRunner().invoke(program.app, given, prog_name="relaxlm")

    folder = tmp_path / "built"
    options = ("--quantization", "q4f16_1", "--device", "cpu")
    done = relaxlm("build", tiny_encoder.source, "-o", folder, *options)
    assert done.exit_code == 0, done.stdout + done.stderr
    library = folder / "source-q4f16_1-cpu.so"
    assert f"Embed texts: relaxlm embed {folder} --model-lib {library}" in done.stdout
    done = relaxlm("embed", folder, "--model-lib", library, "--text", "the cat")
    found = np.array(json.loads(done.stdout)["embedding"])
    (exact,) = tiny_encoder.vectors(["the cat"])
    # 4 bits of a tiny random model, and rounded activations.
    assert found @ exact / np.linalg.norm(found) / np.linalg.norm(exact) > 0.95
    done = relaxlm("estimate", folder, "--device", "cpu")
    assert done.exit_code == 0 and "KV cache" not in done.stdout
