"""`relaxlm doctor`: what it finds, what it calls broken, and how it says so."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from relaxlm import doctor, versions
from relaxlm.cli.main import app
from relaxlm.compiler import self_test

HEALTHY = {
    "llvm": 22,
    "processor": "znver5",
    "threads": 2,
    "cuda_memory": [140 * 10**9],
    "largest_error": 3e-7,
    "tolerance": 1e-4,
    "compile_s": 1.25,
    "run_ms": 0.5,
}


@pytest.fixture(autouse=True)
def quick_self_test(monkeypatch):
    monkeypatch.setattr(doctor, "run_self_test", lambda: HEALTHY)
    monkeypatch.delenv("RELAXLM_DEBUG", raising=False)


def run(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments], prog_name="relaxlm")


def findings(*arguments: str) -> dict[str, dict]:
    """The findings of `relaxlm doctor --json` by name."""
    report = json.loads(run("--json", *arguments).stdout)
    return {finding["name"]: finding for finding in report["findings"]}


def test_a_working_installation_is_healthy():
    result = run()
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("\nrelaxlm works on this machine.\n")
    assert "  ok     apache-tvm        0.27.0.post1\n" in result.stdout
    assert (
        "  ok     self-test         one layer compiled in 1.2 s, run in 0.5 ms, off"
        in result.stdout
    )


def test_output_reads_well_in_80_columns():
    lines = run().stdout.splitlines()
    # Paths are as long as they are, and advice can be a command to copy.
    assert not [line for line in lines if len(line) > 80 and "/" not in line]
    assert "\x1b" not in run().stdout


def test_json_has_the_same_findings():
    report = json.loads(run("--json").stdout)
    assert report["healthy"] is True
    names = {(finding["section"], finding["name"]) for finding in report["findings"]}
    assert names >= {
        ("versions", "Python"),
        ("versions", "apache-tvm-ffi"),
        ("processor", "extensions"),
        ("processor", "TVM_NUM_THREADS"),
        ("devices", "metal"),
        ("devices", "opencl"),
        ("devices", "rocm"),
        ("compilers", "C linker"),
        ("compilers", "ROCm bitcode"),
        ("compilers", "nvcc"),
        ("compilers", "zig"),
        ("compilers", "emcc"),
        ("TVM", "LLVM"),
        ("TVM", "self-test"),
    }


def test_the_libraries_are_those_of_the_package_metadata():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    required = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    names = re.findall(r'^    "([A-Za-z0-9_-]+)', required, re.MULTILINE)
    assert [*versions.PINNED, *doctor.LIBRARIES] == names


def test_the_self_test_can_be_left_out(monkeypatch):
    monkeypatch.setattr(doctor, "run_self_test", lambda: pytest.fail("it ran"))
    assert "self-test" not in findings("--no-self-test")


def test_another_tvm_ffi_is_broken_and_the_pip_command_is_given(monkeypatch):
    monkeypatch.setitem(versions.PINNED, "apache-tvm-ffi", "0.1.99")
    result = run()
    assert result.exit_code == 1
    assert (
        "  BROKEN apache-tvm-ffi    0.1.14.post1, expected 0.1.99\n"
        f"                           {sys.executable} -m pip install apache-tvm==0.27.0.post1 "
        "apache-tvm-ffi==0.1.99\n"
    ) in result.stdout
    assert result.stdout.endswith("\n1 broken: apache-tvm-ffi\n")


def test_the_self_test_is_not_run_with_another_tvm(monkeypatch):
    monkeypatch.setitem(versions.PINNED, "apache-tvm", "0.99")
    monkeypatch.setattr(doctor, "run_self_test", lambda: pytest.fail("it ran"))
    assert "LLVM" not in findings()


def test_a_linker_that_is_not_there_is_broken(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = findings()["C linker"]
    assert found["status"] == "broken"
    assert found["advice"] == (
        "CXX=no-such-compiler: there is no program 'no-such-compiler'; "
        "set CXX to a C or C++ compiler, or unset it"
    )


def test_missing_compilers_say_what_they_are_for(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'cc (Some Linux 1.2-3) 4.5.6'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CXX", "CC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    found = findings()
    assert found["C linker"]["value"] == f"4.5.6 ({compiler})"
    assert found["emcc"]["status"] == "absent"
    assert found["emcc"]["advice"] == "needed to link for browsers (.wasm)"
    assert found["zig"]["advice"] == "needed to link for other systems: pip install ziglang"


def test_wrong_results_are_broken(monkeypatch):
    monkeypatch.setattr(doctor, "run_self_test", lambda: {**HEALTHY, "largest_error": 0.5})
    result = run()
    assert result.exit_code == 1
    assert "wrong results: off by 5.0e-01, allowed is 1e-04" in result.stdout


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os; os.abort()", "ended by SIGABRT"),
        ("raise OSError('no libLLVM')", "OSError: no libLLVM"),
        ("import sys; sys.exit(3)", "exit code 3"),
    ],
)
def test_a_self_test_that_ends_its_process_is_reported(monkeypatch, code, error):
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "SELF_TEST", [sys.executable, "-c", code])
    found = findings()["self-test"]
    assert (found["value"], found["status"], found["advice"]) == ("failed", "broken", error)


def test_a_self_test_that_hangs_is_reported(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "SELF_TEST", [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(doctor, "SELF_TEST_SECONDS", 0.5)
    assert findings()["self-test"]["advice"] == "no result after 0.5 seconds"


def test_the_self_test_passes_here(monkeypatch):
    monkeypatch.undo()
    found = findings()
    assert found["self-test"]["status"] == "ok", found["self-test"]
    assert re.fullmatch(r"\d+, tunes for \S+", found["LLVM"]["value"])


def test_the_self_test_notices_wrong_results(monkeypatch):
    right = self_test.reference

    def wrong(weights, ids):
        return right(weights, ids) + 1e-3 * np.arange(len(ids))[:, None]

    monkeypatch.setattr(self_test, "reference", wrong)
    facts = self_test.run()
    assert facts["largest_error"] > facts["tolerance"]


def test_the_cache_is_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("RELAXLM_CACHE", str(tmp_path))
    assert findings()["libraries"]["value"] == f"empty ({tmp_path})"
    (tmp_path / "libraries").mkdir()
    (tmp_path / "libraries" / "a.so").write_bytes(bytes(1500))
    (tmp_path / "libraries" / "b.so").write_bytes(bytes(500))
    assert findings()["libraries"]["value"] == f"2 kB in 2 files ({tmp_path})"


def test_the_thread_count_is_that_of_the_user_or_of_the_cores(monkeypatch):
    monkeypatch.setenv("TVM_NUM_THREADS", "7")
    assert findings()["TVM_NUM_THREADS"]["value"] == "7"
    monkeypatch.delenv("TVM_NUM_THREADS")
    value = findings()["TVM_NUM_THREADS"]["value"]
    assert re.fullmatch(r"not set: relaxlm takes \d+", value)


def test_the_reference_is_causal():
    shapes = {
        "model.embed_tokens.weight": (96, 64),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.layers.0.self_attn.qkv_proj.weight": (128, 64),
        "model.layers.0.self_attn.o_proj.weight": (64, 64),
        "model.layers.0.post_attention_layernorm.weight": (64,),
        "model.layers.0.mlp.gate_up_proj.weight": (192, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 96),
        "model.norm.weight": (64,),
        "lm_head.weight": (96, 64),
    }
    weights = self_test.random_weights(shapes)
    ids = np.array([3, 1, 4, 1, 5])
    whole, part = self_test.reference(weights, ids), self_test.reference(weights, ids[:3])
    np.testing.assert_allclose(whole[:3], part, rtol=1e-12)
    assert np.abs(whole[1] - whole[3]).max() > 0.1  # the same token in another place


def test_the_command_is_documented():
    page = Path(__file__).parents[2] / "docs" / "commands.md"
    assert "## doctor\n" in page.read_text(encoding="utf-8")
