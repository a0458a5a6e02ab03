"""Links a compiled module and TVM's runtime into one WebAssembly module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from relaxlm.compiler.link import run_tool
from relaxlm.compiler.web.runtime import find_emcc, runtime_objects

# The form of module that TVM's JavaScript runtime starts.
_MODULE = (
    # Emscripten's own optimiser, from O2 on, takes a minute for a third of the size.
    "-O1",
    "-fwasm-exceptions",
    "-Wl,--strip-all",
    "--no-entry",
    "-sSTANDALONE_WASM=1",
    "-sWASM_BIGINT=1",
    "-sALLOW_MEMORY_GROWTH=1",
    # It defines some functions itself.
    "-sERROR_ON_UNDEFINED_SYMBOLS=0",
    # Newer emscriptens would take 64 kB.
    "-sTOTAL_STACK=1MB",
)


@dataclass(frozen=True)
class WasmLinker:
    """Emscripten, and the objects that each module is linked with."""

    emcc: tuple[str, ...]
    objects: tuple[Path, ...]

    @staticmethod
    def find(starting: Callable[[], None] = lambda: None) -> WasmLinker:
        """The installed emscripten, with TVM's runtime compiled by it.

        Args:
            starting: called before the runtime is compiled, which takes minutes, once.

        Raises:
            ToolchainError: there is no emscripten, or it failed.
        """
        emcc = find_emcc()
        return WasmLinker(emcc, runtime_objects(emcc, starting))

    def link(self, output: Path, objects: Sequence[str | Path]) -> None:
        """Make a module of object files and the runtime.

        Raises:
            ToolchainError: emscripten failed.
        """
        inputs = [*map(str, self.objects), *map(str, objects)]
        command = [*self.emcc, *_MODULE, "-o", str(output), *inputs]
        run_tool(command, f"link {output.name}")
