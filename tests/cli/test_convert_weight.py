"""`relaxlm convert_weight` as it is typed, on a random checkpoint and on a real one."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import typer
from typer.testing import CliRunner

from relaxlm.cli.convert_weight import convert_weight
from relaxlm.errors import CheckpointError, ConfigError
from relaxlm.models import ignored_sources, load_config, parameter_specs
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.params import WeightFolder
from tests.shared_data import SHARED, needs_shared_data

app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(convert_weight)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 160,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source [1]"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rng = np.random.default_rng(0)
    tensors = {
        source.name: (rng.standard_normal(source.shape) * 0.1 + 0.02).astype(np.float16)
        for spec in parameter_specs(load_config(folder))
        for source in spec.sources
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_it_prints_the_estimate_the_result_and_the_largest_errors(
    source: Path, tmp_path: Path
) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    result = run(source, "--quantization", "q4f16_1", "-o", out, "--report", report)
    assert result.exit_code == 0, result.output
    size = r"[\d.]+ (bytes|kB|MB|GB)"
    lines = result.output.splitlines()
    patterns = [
        rf"{re.escape(str(source))}: 82,240 weights, 164 kB",
        rf"q4f16_1 takes {size} of disk \({size} free\) and about {size} of memory",
        rf"{re.escape(str(out))}: 46.7 kB in 1 file, 4\.545 bits per weight, [\d.]+ s "
        rf"\({size}/s\), peak memory {size}",
        r"largest errors \(relative RMS, largest absolute\):",
        *[r"  \d\.\d\de-\d\d  \d\.\d\de-\d\d  [\w.]+\.weight \[\d+, \d+\]"] * 5,
        rf"the error of every parameter: {re.escape(str(report))}",
    ]
    assert len(lines) == len(patterns)
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
    config = load_config(source)
    scheme = get_scheme("q4f16_1")
    expected = {k: v for s in parameter_specs(config) for k, v in scheme.storage(s).items()}
    WeightFolder(out).check(expected)
    errors = json.loads(report.read_text())["errors"]
    assert {error["name"] for error in errors} == {s.name for s in parameter_specs(config)}


def test_config_json_may_be_given_instead_of_its_folder(source: Path, tmp_path: Path) -> None:
    for i, given in enumerate((source, source / "config.json")):
        result = run(given, "--quantization", "q3f16_0", "-o", tmp_path / f"{i}")
        assert result.exit_code == 0, result.output
    shards = [(tmp_path / f"{i}" / "params_shard_0.bin").read_bytes() for i in range(2)]
    assert shards[0] == shards[1]


def test_an_unknown_preset_is_an_error(source: Path, tmp_path: Path) -> None:
    result = run(source, "--quantization", "q4", "-o", tmp_path / "out")
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith(
        "quantization 'q4' is not known, expected one of: q0f32"
    )


def test_a_folder_of_other_files_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_0.gguf").write_bytes(b"GGUF")
    result = run(tmp_path, "--quantization", "q4f16_1", "-o", tmp_path.parent / "out")
    assert isinstance(result.exception, CheckpointError)
    assert "model-Q4_0.gguf is a GGUF file" in str(result.exception)


def test_help_says_what_it_does() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "Quantize a checkpoint's weights and write them in the MLC container." in result.output


@needs_shared_data
def test_a_real_checkpoint_is_converted_without_loss_at_q0f32(tmp_path: Path) -> None:
    folder = SHARED / "stories260k-llama"
    result = run(folder, "--quantization", "q0f32", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    weights = WeightFolder(tmp_path / "out")
    config = load_config(folder)
    assert ignored_sources(config)
    for spec in parameter_specs(config):
        whole = np.concatenate([tensors[source.name] for source in spec.sources])
        np.testing.assert_array_equal(weights.load(spec.name), whole)
