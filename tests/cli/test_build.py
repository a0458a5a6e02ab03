"""build, compile, estimate and demo, on the demo model, as they are typed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from relaxlm.demo import MODEL_DIR


def relaxlm(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the program; without a terminal, so no progress bars."""
    command = [sys.executable, "-m", "relaxlm", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo model, built once, and what was printed."""
    folder = tmp_path_factory.mktemp("built") / "demo"
    done = relaxlm("build", MODEL_DIR, "--device", "cpu", "-o", folder)
    assert done.stderr == ""
    return folder, done.stdout


def test_build_makes_a_folder_to_chat_with(built: tuple[Path, str]) -> None:
    folder, output = built
    library = folder / "model-q4f16_1-cpu.so"
    assert library.is_file() and (folder / "tensor-cache.json").is_file()
    assert f"Chat with it: relaxlm chat {folder} --model-lib {library}" in output
    reply = relaxlm("chat", folder, "--prompt", "What is 12 + 30?", "--temperature", 0)
    assert "42" in reply.stdout
    assert "compiling" not in reply.stderr, "the library that was built is not found"


def test_estimate_and_compile_agree_on_memory(built: tuple[Path, str], tmp_path: Path) -> None:
    folder, printed = built
    options = ("--device", "cpu", "--overrides", "context_window_size=512;kv_cache_dtype=fp8")
    estimate = relaxlm("estimate", folder, *options).stdout
    output = ("-o", tmp_path / "model.so", "--verbose")
    compiled = relaxlm("compile", folder, *options, *output).stdout
    memory = estimate[estimate.index("memory:") :]
    assert memory in compiled
    assert re.search(r"^compiled: lower [\d.]+ s, generate code [\d.]+ s$", compiled, re.MULTILINE)
    assert "float8_e4m3" in memory and "512 tokens of context" in memory
    assert memory not in printed  # built with the folder's own limits


def test_unknown_fields_of_the_configuration_are_pointed_out(tmp_path: Path) -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "logit_softcap": 30.0}))
    done = relaxlm(
        *("compile", tmp_path, "--quantization", "q0f32", "--device", "cpu"),
        *("-o", tmp_path / "model.so"),
    )
    assert done.stdout.startswith(
        f"note: {tmp_path} has fields that relaxlm does not know and does not use: logit_softcap. "
        "If the model needs them, its results will be wrong.\n"
    )


def test_a_wrong_suffix_and_a_missing_folder(tmp_path: Path) -> None:
    done = relaxlm(
        *("compile", MODEL_DIR, "--quantization", "q0f32", "--device", "cpu"),
        *("-o", tmp_path / "model.dylib"),
        status=1,
    )
    assert done.stderr == (
        f"error: output {tmp_path / 'model.dylib'}: a library for cpu is a *.so file, not "
        "'.dylib'; *.tar holds object files\n"
    )
    done = relaxlm("build", tmp_path / "none", "--device", "cpu", status=1)
    assert done.stderr == (
        f"error: {tmp_path / 'none'} is not a folder, expected a Hugging Face folder with "
        "config.json and model.safetensors\n"
    )


def test_build_refuses_before_it_converts(tmp_path: Path) -> None:
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    for arguments, message in (
        (("--device", "vulkan"), "error: device 'vulkan' is not supported"),
        (("--device", "cuda", "--arch", "sm_70"), "error: arch 'sm_70': CUDA 13 does not"),
    ):
        done = relaxlm("build", tmp_path / "model", "-o", tmp_path / "out", *arguments, status=1)
        assert done.stderr.startswith(message)
    assert not (tmp_path / "out").exists()


def test_demo_shows_every_step(tmp_path: Path) -> None:
    output = relaxlm("demo", "-o", tmp_path / "demo", "--no-chat").stdout
    assert "This is a toy model that the project trained itself" in output
    for step in ("1/3 convert_weight", "2/3 gen_config", "3/3 compile", "built in", "tok/s"):
        assert step in output
    sum_reply = output[output.index("> What is 17 + 25?") :]
    assert "42" in sum_reply
    assert f"Chat with it: relaxlm chat {tmp_path / 'demo'} --model-lib" in output
