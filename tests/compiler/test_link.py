import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from relaxlm.compiler import link
from relaxlm.compiler.link import Linker, export_library, find_linker, first_error, run_tool
from relaxlm.errors import ToolchainError

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="about ELF shared libraries")


def program(folder: Path, name: str, script: str = "exit 0") -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture(autouse=True)
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of one folder, without compilers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for variable in ("CXX", "CC"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(link.importlib.util, "find_spec", lambda name: None)
    return folder


def test_environment_variables_come_first(
    empty_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(empty_path, "g++")
    program(empty_path, "ccache")
    monkeypatch.setenv("CC", "g++")
    assert find_linker() == Linker(("g++",), is_compiler=True)
    monkeypatch.setenv("CXX", "ccache 'my compiler' -m64")
    assert find_linker() == Linker(("ccache", "my compiler", "-m64"), is_compiler=True)


def test_an_environment_variable_that_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "icpc -fast")
    with pytest.raises(ToolchainError) as caught:
        find_linker()
    assert str(caught.value) == (
        "CXX=icpc -fast: there is no program 'icpc'; set CXX to a C or C++ compiler, or unset it"
    )


def test_search_order(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ld", "ld.lld"):
        path = program(empty_path, name)
        assert find_linker() == Linker((str(path),), is_compiler=False)
    monkeypatch.setattr(link.importlib.util, "find_spec", lambda name: name == "ziglang" or None)
    assert find_linker() == Linker((sys.executable, "-m", "ziglang", "cc"), is_compiler=True)
    path = program(empty_path, "zig")
    assert find_linker() == Linker((str(path), "cc"), is_compiler=True)
    for name in reversed(link.COMPILERS):
        path = program(empty_path, name)
        assert find_linker() == Linker((str(path),), is_compiler=True)


def test_nothing_to_link_with() -> None:
    with pytest.raises(ToolchainError) as caught:
        find_linker()
    assert str(caught.value) == (
        "no C compiler or linker was found to make a shared library with (looked for $CXX, $CC, "
        "g++, gcc, clang++, clang, c++, cc, zig, ld.lld, ld); install one, for example with "
        "`apt install gcc` or `pip install ziglang`"
    )


@T.prim_func(s_tir=True)
def exponentials(x: T.Buffer((4,), "float32"), y: T.Buffer((4,), "float32")):
    T.func_attr({"global_symbol": "exponentials"})
    for i in T.serial(4):
        y[i] = T.exp(x[i])


@pytest.mark.parametrize("tool", ["g++", "gcc", "clang", "ld.lld", "ld"])
@needs_linux
def test_library_from_every_linker(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed")
    executable = tvm.compile(tvm.IRModule({"f": exponentials}), target={"kind": "llvm"})
    library = tmp_path / "new" / "lib.so"
    export_library(executable, library, Linker((path,), is_compiler=not tool.startswith("ld")))
    assert [file.name for file in library.parent.iterdir()] == ["lib.so"]
    x, y = (tvm.runtime.tensor(np.arange(4, dtype="float32")) for _ in range(2))
    tvm.runtime.load_module(str(library))["exponentials"](x, y)
    np.testing.assert_allclose(y.numpy(), np.exp(np.arange(4)), rtol=1e-6)


def test_a_failing_linker_leaves_nothing_behind(empty_path: Path, tmp_path: Path) -> None:
    linker = Linker((str(program(empty_path, "cc", "echo cc: fatal: no; exit 3")),), True)

    class Executable:
        def export_library(self, name: str, fcompile) -> None:
            Path(name).write_text("half")
            fcompile(name, ["a.o"], options=None)

    library = tmp_path / "lib.so"
    library.write_text("the one before")
    with pytest.raises(ToolchainError) as caught:
        export_library(Executable(), library, linker)
    assert str(caught.value).startswith(f"{empty_path}/cc failed to link .lib.")
    assert str(caught.value).endswith(".so (status 3): cc: fatal: no")
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["lib.so"]
    assert library.read_text() == "the one before"


def test_a_tool_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError) as caught:
        run_tool([str(tmp_path / "nothing")], "do it")
    assert str(caught.value) == f"{tmp_path}/nothing failed to do it: No such file or directory"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("", "it printed nothing"),
        ("hello\nworld\n", "hello"),
        (
            "k.cu(3): warning: cannot find\nk.cu(4): error: no\nk.cu(5): error: too",
            "k.cu(4): error: no",
        ),
        ("gcc: No such file or directory\nx", "gcc: No such file or directory"),
        ("In function f:\nundefined reference to `g'", "undefined reference to `g'"),
    ],
)
def test_first_error(output: str, expected: str) -> None:
    assert first_error(output) == expected
