import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from relaxlm.cli.gen_config import gen_config
from relaxlm.errors import ConfigError
from tests.runtime.tokenizer_samples import model_folder


def run(*arguments: object) -> str:
    app = typer.Typer()
    app.command()(gen_config)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_options_reach_the_file(tmp_path: Path) -> None:
    folder, out = model_folder(tmp_path / "model"), tmp_path / "out"
    output = run(
        *(folder, "--quantization", "q4f16_1", "-o", out, "--conv-template", "chatml"),
        *("--context-window-size", 1024, "--sliding-window-size", 512),
        *("--attention-sink-size", 4, "--prefill-chunk-size", 256, "--max-batch-size", 2),
        *("--tensor-parallel-shards", 1),
    )
    assert output == f"wrote {out}/mlc-chat-config.json\n"
    config = json.loads((out / "mlc-chat-config.json").read_text("utf-8"))
    assert config["quantization"] == "q4f16_1"
    assert config["conv_template"]["name"] == "chatml"
    assert config["context_window_size"] == 1024
    assert config["sliding_window_size"] == 512
    assert config["attention_sink_size"] == 4
    assert config["prefill_chunk_size"] == 256
    assert config["model_config"]["max_batch_size"] == 2


def test_notes_are_printed(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    output = run(folder, "--quantization", "q0f32", "--output", tmp_path / "out")
    assert output.startswith("note: prompts are written by the model's own chat template; ")


def test_errors_are_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="conversation template 'x' is not known"):
        run(
            *(model_folder(tmp_path / "m"), "--quantization", "q0f32"),
            *("-o", tmp_path / "out", "--conv-template", "x"),
        )
