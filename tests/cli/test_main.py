"""The program itself: names, exit codes and what is printed. Commands have tests of their own."""

import os
import signal
import subprocess
import sys
import textwrap
import types
from enum import Enum
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from relaxlm import versions
from relaxlm.cli import main as program
from relaxlm.errors import ConfigError

ROOT = Path(__file__).parents[2]


class Color(Enum):
    deep_red = "deep_red"


def make_thing(
    raises: Annotated[str, typer.Option(help="What to raise.")] = "",
    model_lib: Annotated[str, typer.Option("--model-lib")] = "",
    color: Annotated[Color | None, typer.Option()] = None,
) -> None:
    """Make [a] thing of *.files, in a sentence too long for one line of the commands' table."""
    if raises == "config":
        raise ConfigError("config.json: hidden_size = 'x' is wrong")
    if raises == "os":
        Path("no-such-folder/file").read_bytes()
    if raises == "bug":
        raise KeyError("q_proj")
    if raises == "interrupt":
        raise KeyboardInterrupt
    if raises == "exit":
        raise typer.Exit(5)
    print(f"lib={model_lib} color={color and color.value}")


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("relaxlm.cli.make_thing")
    module.__dict__["make_thing"] = make_thing
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(program, "COMMANDS", ("make_thing",))
    monkeypatch.delenv("RELAXLM_DEBUG", raising=False)


def run(*arguments: str):
    """The result of a command line in this process: exit_code, stdout, stderr."""
    return CliRunner().invoke(program.app, list(arguments), prog_name="relaxlm")


def run_program(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "relaxlm", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        **options,
    )


@pytest.mark.parametrize("name", ["make_thing", "make-thing"])
@pytest.mark.parametrize("option", ["--model-lib", "--model_lib"])
@pytest.mark.parametrize("color", ["deep_red", "deep-red"])
def test_hyphens_do_for_underscores(name, option, color):
    result = run(name, option, "a-b_c.so", "--color", color)
    assert (result.exit_code, result.stdout) == (0, "lib=a-b_c.so color=deep_red\n")


def test_help_lists_commands_with_the_first_line_of_their_docstrings_as_written():
    result = run("--help")
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    assert shown.endswith(
        "make_thing Make [a] thing of *.files, in a sentence too long for one line of the "
        "commands' table."
    )


def test_without_arguments_the_help_is_shown():
    assert "Usage: relaxlm" in run().output


def test_an_unknown_command_is_answered_with_a_similar_one():
    result = run("mke_thing")
    assert result.exit_code == 2
    assert "No such command 'mke_thing'" in result.stderr
    assert "make_thing" in result.stderr


def test_an_unknown_option_is_a_usage_error():
    result = run("make_thing", "--nothing")
    assert result.exit_code == 2
    assert "No such option: --nothing" in result.stderr


def test_an_error_of_ours_is_one_line_and_exit_code_1():
    result = run("make_thing", "--raises", "config")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: config.json: hidden_size = 'x' is wrong\n"


def test_a_file_that_is_not_there_is_exit_code_1():
    result = run("make_thing", "--raises", "os")
    assert result.exit_code == 1
    assert result.stderr == ("error: [Errno 2] No such file or directory: 'no-such-folder/file'\n")


@pytest.mark.parametrize("error", ["config", "os", "bug"])
def test_debug_shows_the_stack_trace(error, monkeypatch):
    # The option sets the variable, for processes that a command starts; monkeypatch takes it back.
    monkeypatch.setenv("RELAXLM_DEBUG", "0")
    result = run("--debug", "make_thing", "--raises", error)
    assert isinstance(result.exception, (ConfigError, OSError, KeyError))
    monkeypatch.setenv("RELAXLM_DEBUG", "1")
    result = run("make_thing", "--raises", error)
    assert isinstance(result.exception, (ConfigError, OSError, KeyError))


def test_a_bug_says_how_to_see_its_stack_trace(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["relaxlm", "make_thing", "--raises", "bug"])
    with pytest.raises(SystemExit) as exit:
        program.main()
    assert exit.value.code == 70
    assert capsys.readouterr().err == (
        "error: relaxlm did not foresee this: KeyError: 'q_proj'\n"
        "Please report it with its stack trace, which `relaxlm --debug COMMAND ...` or "
        "RELAXLM_DEBUG=1 shows.\n"
    )


def test_an_interrupt_is_exit_code_130():
    assert run("make_thing", "--raises", "interrupt").exit_code == 130


def test_a_command_chooses_its_exit_code():
    assert run("make_thing", "--raises", "exit").exit_code == 5


def test_another_tvm_ffi_stops_a_command_but_not_doctor(monkeypatch):
    monkeypatch.setitem(versions.PINNED, "apache-tvm-ffi", "0.1.99")
    versions.check_versions.cache_clear()
    result = run("make_thing")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "error: apache-tvm-ffi is 0.1.14.post1, expected 0.1.99: relaxlm 0.1.0 works with"
    )

    module = types.ModuleType("relaxlm.cli.doctor")
    module.__dict__["doctor"] = make_thing
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(program, "COMMANDS", ("doctor",))
    assert run("doctor").exit_code == 0


def test_version_names_relaxlm_and_tvm():
    result = run_program("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (
        "relaxlm 0.1.0 (apache-tvm 0.27.0.post1, apache-tvm-ffi 0.1.14.post1)\n"
    )


def test_help_imports_nothing_heavy():
    code = """
        import sys
        from relaxlm.cli.main import app
        try:
            app(["--help"])
        except SystemExit:
            pass
        heavy = {"tvm", "tvm_ffi", "numpy", "torch", "transformers", "tokenizers", "pydantic"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT)


def test_every_command_is_a_function_of_its_own_file(monkeypatch):
    monkeypatch.undo()
    for name in program.COMMANDS:
        result = run(name, "--help")
        assert result.exit_code == 0, result.output
        assert f"Usage: relaxlm {name} " in result.stdout


LONG_COMMAND = """
import sys, time, types
from relaxlm.cli import main as program

def endless() -> None:
    "Print for ever."
    print("started", flush=True)
    while True:
        print("more", flush=True)
        time.sleep(0.01)

sys.modules["relaxlm.cli.endless"] = types.SimpleNamespace(endless=endless)
program.COMMANDS = ("endless",)
sys.argv = ["relaxlm", "endless"]
program.main()
"""


def start_endless() -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_COMMAND],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    return process


def test_a_closed_pipe_ends_a_command_quietly():
    with start_endless() as process:
        process.stdout.close()
        assert process.wait(timeout=30) == 1
        assert process.stderr.read() == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for other processes")
def test_ctrl_c_ends_a_command_quietly():
    with start_endless() as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == ""
