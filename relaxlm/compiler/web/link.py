"""Links a compiled module and TVM's runtime into one WebAssembly module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from relaxlm.compiler.link import run_tool
from relaxlm.compiler.web.runtime import find_emcc, runtime_objects
from relaxlm.errors import LibraryError
from relaxlm.runtime.library import parse_metadata
from relaxlm.runtime.metadata import LibraryMetadata

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


# The custom section with what a library says of itself: to be read before it is started, which
# one for WebGPU can only be when there is a GPU.
METADATA_SECTION = "relaxlm"


@dataclass(frozen=True)
class WasmLinker:
    """Emscripten, the objects that each module is linked with, and what it says of itself."""

    emcc: tuple[str, ...]
    objects: tuple[Path, ...]
    metadata: str

    @staticmethod
    def find(metadata: str, starting: Callable[[], None] = lambda: None) -> WasmLinker:
        """The installed emscripten, with TVM's runtime compiled by it.

        Args:
            metadata: the content of METADATA_SECTION.
            starting: called before the runtime is compiled, which takes minutes, once.

        Raises:
            ToolchainError: there is no emscripten, or it failed.
        """
        emcc = find_emcc()
        return WasmLinker(emcc, runtime_objects(emcc, starting), metadata)

    def link(self, output: Path, objects: Sequence[str | Path]) -> None:
        """Make a module of object files and the runtime.

        Raises:
            ToolchainError: emscripten failed.
        """
        inputs = [*map(str, self.objects), *map(str, objects)]
        command = [*self.emcc, *_MODULE, "-o", str(output), *inputs]
        run_tool(command, f"link {output.name}")
        with output.open("ab") as file:
            file.write(custom_section(METADATA_SECTION, self.metadata.encode()))


def read_metadata(library: Path) -> LibraryMetadata:
    """What a library for browsers says of itself.

    Raises:
        LibraryError: no such file, no library for browsers, or one of another release.
    """
    if not library.is_file():
        raise LibraryError(f"{library}: no such library")
    module = library.read_bytes()
    at, found = 8, None
    while module.startswith(b"\0asm") and at < len(module):
        kind = module[at]
        size, start = _read_leb128(module, at + 1)
        at = start + size
        if kind == 0:
            length, start = _read_leb128(module, start)
            if module[start : start + length] == METADATA_SECTION.encode():
                found = module[start + length : at]
    if found is None:
        raise LibraryError(
            f"{library} is no library for browsers; make one with `relaxlm compile --device webgpu`"
        )
    return parse_metadata(found.decode(), library)


def custom_section(name: str, content: bytes) -> bytes:
    """A section that engines pass over, to stand behind all others of a module."""
    text = name.encode()
    body = _leb128(len(text)) + text + content
    return b"\0" + _leb128(len(body)) + body


def _read_leb128(module: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    number = shift = 0
    while True:
        number |= (module[at] & 127) << shift
        shift += 7
        at += 1
        if module[at - 1] < 128:
            return number, at


def _leb128(number: int) -> bytes:
    """An unsigned number as WebAssembly has it: 7 bits a byte, the low ones first."""
    found = bytearray()
    while number >= 128:
        found.append(number % 128 + 128)
        number //= 128
    return bytes([*found, number])
