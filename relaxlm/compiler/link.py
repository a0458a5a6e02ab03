"""Links a compiled module into a shared library.

TVM writes object files; making a `.so` of them needs a C compiler or a linker from the system.
TVM looks for one itself, and without one fails with a TypeError about None; here the search is
explicit and its failure says what to install. Any linker does: the objects come from LLVM, and
what stays undefined (libm's functions, one function of libtvm_ffi) is in the process that loads
the library.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from relaxlm.errors import ToolchainError

COMPILERS = ("g++", "gcc", "clang++", "clang", "c++", "cc")
LINKERS = ("ld.lld", "ld")


class LinksObjects(Protocol):
    """What `export_library` needs."""

    def link(self, output: Path, objects: Sequence[str | Path]) -> None: ...


class Tar:
    """Puts object files into an archive, for a linker somewhere else."""

    def link(self, output: Path, objects: Sequence[str | Path]) -> None:
        with tarfile.open(output, "w") as archive:
            for path in map(Path, objects):
                archive.add(path, arcname=path.name)


@dataclass(frozen=True)
class Linker:
    """A command that makes shared libraries, and whether it is a compiler driver or a plain ld."""

    command: tuple[str, ...]
    is_compiler: bool

    def link(self, output: Path, objects: Sequence[str | Path]) -> None:
        """Make a shared library of object files.

        Raises:
            ToolchainError: the command failed; its first line of complaint is in the message.
        """
        command = [*self.command, "-shared"]
        if self.is_compiler:
            command.append("-fPIC")
        if sys.platform == "darwin":
            command += ["-undefined", "dynamic_lookup"]
        command += ["-o", str(output), *map(str, objects)]
        if self.is_compiler:
            command.append("-lm")
        run_tool(command, f"link {output.name}")


def find_linker() -> Linker:
    """The program that `$CXX` or `$CC` names, else the first compiler, zig or linker found.

    Raises:
        ToolchainError: the variable names no program, or there is nothing to link with.
    """
    for variable in ("CXX", "CC"):
        words = shlex.split(os.environ.get(variable, ""))
        if words:
            if shutil.which(words[0]) is None:
                raise ToolchainError(
                    f"{variable}={os.environ[variable]}: there is no program '{words[0]}'; "
                    f"set {variable} to a C or C++ compiler, or unset it"
                )
            return Linker(tuple(words), is_compiler=True)
    for name in COMPILERS:
        if path := shutil.which(name):
            return Linker((path,), is_compiler=True)
    if path := shutil.which("zig"):
        return Linker((path, "cc"), is_compiler=True)
    if importlib.util.find_spec("ziglang") is not None:
        return Linker((sys.executable, "-m", "ziglang", "cc"), is_compiler=True)
    for name in LINKERS:
        if path := shutil.which(name):
            return Linker((path,), is_compiler=False)
    raise ToolchainError(
        "no C compiler or linker was found to make a shared library with (looked for $CXX, $CC, "
        f"{', '.join(COMPILERS)}, zig, {', '.join(LINKERS)}); install one, for example with "
        "`apt install gcc` or `pip install ziglang`"
    )


def export_library(
    executable: Any,
    output: Path,
    linker: LinksObjects | None = None,
    check: Callable[[Path], object] = lambda path: None,
    objects: Sequence[Path] = (),
) -> None:
    """Write a compiled module as a library, or as a `.tar` of its object files.

    The library appears under its name only when it is complete.

    Args:
        executable: what `tvm.compile` returned.
        output: the file to write; missing parent folders are made.
        linker: the result of `find_linker` if None. A `.tar` needs none.
        check: raises if the file, which has another name until then, is not to be used.
        objects: files to link besides those of the module.

    Raises:
        ToolchainError: there is no linker, or it failed.
    """
    if output.suffix == ".tar":
        linker = Tar()
    linker = linker or find_linker()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.stem}.{os.getpid()}{output.suffix}")

    def fcompile(name: str, own: Sequence[str], **_: Any) -> None:
        linker.link(Path(name), [*own, *objects])

    fcompile.object_format = "o"  # type: ignore[attr-defined]  # what TVM asks a linker function
    try:
        executable.export_library(str(partial), fcompile=fcompile)
        check(partial)
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


def run_tool(command: Sequence[str], purpose: str, **options: Any) -> str:
    """Run a tool of the toolchain and return what it printed.

    Args:
        purpose: completes "failed to ...", for the message.
        options: for `subprocess.run`, such as `cwd`.

    Raises:
        ToolchainError: it cannot be started, or exits with another status than 0.
    """
    try:
        result = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            **options,
        )
    except OSError as error:
        raise ToolchainError(f"{command[0]} failed to {purpose}: {error.strerror}") from error
    if result.returncode != 0:
        raise ToolchainError(
            f"{command[0]} failed to {purpose} (status {result.returncode}): "
            + first_error(result.stdout),
            result.stdout,
        )
    return result.stdout


def first_error(output: str) -> str:
    """The first line of a tool's output that speaks of an error, else its first line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # "ptxas fatal" and a linker's "undefined reference" come without the word "error".
    for words in (("error",), ("fatal", "undefined", "no such file", "cannot find")):
        for line in lines:
            if any(word in line.lower() for word in words) and "warning" not in line:
                return line
    return lines[0] if lines else "it printed nothing"
