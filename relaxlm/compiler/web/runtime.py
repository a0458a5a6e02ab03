"""TVM's runtime for WebAssembly, compiled once per machine from the installed wheels' sources.

The wheels of TVM and tvm-ffi carry the runtime's sources, and all headers but nine; `headers/` has
relaxlm's own in their place. Three objects come of it, which every library for browsers is linked
with. They are kept in the user's cache, under a digest of all that they are made of.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from relaxlm.compiler.link import run_tool
from relaxlm.errors import ToolchainError
from relaxlm.files import cache_folder
from relaxlm.versions import PINNED

HEADERS = Path(__file__).parent / "headers"

# In tvm/web/emcc; each includes the parts of the runtime that it needs.
UNITS = ("wasm_runtime", "tvmjs_support", "webgpu_runtime")
# Parts of `wasm_runtime` that relaxlm's libraries and driver have no use for: a fifth of its code.
OMITTED = (
    "3rdparty/tvm-ffi/src/ffi/testing/testing.cc",
    "src/runtime/extra/contrib/sort/sort.cc",
    "src/runtime/vm/attn_backend.cc",
    "src/runtime/vm/kv_state.cc",
    "src/runtime/vm/paged_kv_cache.cc",
    "src/runtime/vm/rnn_state.cc",
)
# With exceptions, an error of the runtime is an error in JavaScript, with its text; without, it
# ends the program. The runtime only starts kernels: small code is worth more than fast code.
FLAGS = ("-Os", "-std=c++17", "-fwasm-exceptions", "-Wno-ignored-attributes")
INCLUDED = (
    ".",
    "include",
    "3rdparty/tvm-ffi/include",
    "3rdparty/tvm-ffi/3rdparty/dlpack/include",
    "3rdparty/compiler-rt",
)


def find_emcc() -> tuple[str, ...]:
    """The command that runs emscripten's compiler: `$EMCC`, else `emcc`.

    Raises:
        ToolchainError: there is no such program.
    """
    words = tuple(shlex.split(os.environ.get("EMCC", ""))) or ("emcc",)
    if shutil.which(words[0]) is None:
        raise ToolchainError(
            f"libraries for browsers are linked with emscripten, and there is no program "
            f"'{words[0]}'; install it, for example with `apt install emscripten`, or set EMCC to "
            "its compiler"
        )
    return words


def runtime_objects(
    emcc: Sequence[str], starting: Callable[[], None] = lambda: None
) -> tuple[Path, ...]:
    """The compiled units; made now, in about two minutes, if they are not in the cache.

    Args:
        starting: called before they are made.

    Raises:
        ToolchainError: emscripten failed, or a wheel lacks the sources.
    """
    folder = cache_folder() / "wasm-runtime" / _digest(emcc)
    objects = tuple(folder / f"{unit}.o" for unit in UNITS)
    if not folder.is_dir():
        starting()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=folder.parent) as place:
            tree, made = Path(place) / "tree", Path(place) / "objects"
            made.mkdir()
            assemble(tree)
            with ThreadPoolExecutor() as pool:
                # All are waited for; the first failure is raised.
                list(pool.map(lambda unit: _compile(emcc, tree, unit, made / f"{unit}.o"), UNITS))
            try:
                made.rename(folder)
            except OSError:  # another process was quicker
                if not folder.is_dir():
                    raise
    return objects


def assemble(tree: Path) -> None:
    """Lay out the runtime's sources in a new folder as its files include one another.

    Raises:
        ToolchainError: a wheel lacks them.
    """
    for package, place, names in (
        ("tvm", ".", ("src", "web/emcc", "include")),
        ("tvm_ffi", "3rdparty/tvm-ffi", ("src", "include", "3rdparty")),
    ):
        installed = package_folder(package)
        for name in names:
            if not (installed / name).is_dir():
                raise ToolchainError(
                    f"{installed} has no folder {name}, and TVM's runtime for browsers is made of "
                    "it; install the released wheel again: pip install --force-reinstall "
                    + " ".join(f"{name}=={version}" for name, version in PINNED.items())
                )
            shutil.copytree(installed / name, tree / place / name)
    shutil.copytree(HEADERS, tree, dirs_exist_ok=True)
    unit = tree / "web" / "emcc" / "wasm_runtime.cc"
    text = unit.read_text(encoding="utf-8")
    for part in OMITTED:
        text = text.replace(f'#include "{part}"\n', "")
    unit.write_text(text, encoding="utf-8")


def package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _compile(emcc: Sequence[str], tree: Path, unit: str, output: Path) -> None:
    # By relative paths, which messages of the runtime show.
    include = [f"-I{path}" for path in INCLUDED]
    command = [*emcc, *FLAGS, *include, "-c", "-o", str(output), f"web/emcc/{unit}.cc"]
    run_tool(command, f"compile {unit}.cc of TVM's runtime for browsers", cwd=tree)


def _digest(emcc: Sequence[str]) -> str:
    """Of everything that decides what the objects are."""
    version = run_tool([*emcc, "--version"], "tell its version").partition("\n")[0]
    state = hashlib.sha256(repr((version, FLAGS, UNITS, OMITTED, sorted(PINNED.items()))).encode())
    for file in sorted(HEADERS.rglob("*.h")):
        state.update(f"{file.relative_to(HEADERS)}\0".encode() + file.read_bytes())
    return state.hexdigest()[:32]
