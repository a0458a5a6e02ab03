"""Links libraries for other machines, with zig, and checks what they leave to be found there.

zig (https://ziglang.org) is a compiler and linker for all platforms with their C libraries in one
package: `pip install relaxlm[cross]`.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from relaxlm.compiler import riscv_half
from relaxlm.compiler.link import run_tool
from relaxlm.compiler.platforms import Platform
from relaxlm.errors import CompileError, ToolchainError

# What libtvm_ffi gives to the code of libraries; everything else of TVM comes through pointers that
# its loader fills in. The rest are functions of C's library, which every process has.
TVM_SYMBOLS = frozenset({"TVMFFIErrorSetRaisedFromCStrParts"})
STATIC_SYMBOLS = TVM_SYMBOLS | {
    "TVMFFIEnvModLookupFromImports",
    "TVMFFIEnvModRegisterSystemLibSymbol",
    "TVMFFIFunctionCall",
    "TVMFFIHandleInitOnce",
}
_MATHS = ("cos", "exp", "log", "nearbyint", "pow", "sin", "tanh")
C_SYMBOLS = frozenset(
    {"bzero", "memcpy", "memmove", "memset"}
    | {name + kind for name in _MATHS for kind in ("", "f")}
)
# Conversions of half precision that compilers leave to their own run-time library.
HALF_SYMBOLS = frozenset({"__extendhfsf2", "__truncsfhf2", "__truncdfhf2"})
# What macOS' loader fills in for every library.
_OF_LOADERS = frozenset({"dyld_stub_binder"})
# First parts of the names of libraries that are part of Windows.
_WINDOWS = ("kernel32", "api-ms-win-crt")


@dataclass(frozen=True)
class ZigLinker:
    """Makes libraries for one platform."""

    platform: Platform
    zig: tuple[str, ...]

    def link(self, output: Path, objects: Sequence[str | Path]) -> None:
        """Make a library of object files, and look at what it needs.

        Raises:
            ToolchainError: zig failed; its first line of complaint is in the message.
            CompileError: the library needs a function that TVM's runtime does not have there.
        """
        with TemporaryDirectory(dir=output.parent) as folder:  # zig makes more than it is asked for
            library = Path(folder) / output.name
            self._link(library, [str(path) for path in objects])
            library.replace(output)

    def _link(self, output: Path, objects: Sequence[str]) -> None:
        platform = self.platform
        purpose = f"link {output.name} for {platform.name}"
        if platform.is_static:
            run_tool([*self.zig, "ar", "rcs", str(output), *objects], purpose)
            return
        assert platform.zig is not None
        command = [*self.zig, "cc", "-target", platform.zig, "-shared", "-o", str(output), *objects]
        if platform.cpu == "riscv64":
            source = output.with_suffix(".c")
            source.write_text(riscv_half.SOURCE)
            command += ["-O2", "-fPIC", str(source)]
        if platform.system == "win32":
            command.append(str(self._import_library(output)))
        run_tool([*command, *_OPTIONS.get(platform.system, ())], purpose)
        if unknown := undefined_symbols(output) - allowed_symbols(platform):
            raise CompileError(
                f"{output.name} needs {', '.join(sorted(unknown))}, which neither TVM's runtime "
                f"nor the C library of {platform.name} has. This is a fault of relaxlm: please "
                "report it"
            )

    def _import_library(self, output: Path) -> Path:
        """Windows links against a list of what another library has."""
        definition, library = output.with_suffix(".def"), output.with_suffix(".a")
        lines = ["LIBRARY tvm_ffi.dll", "EXPORTS", *sorted(TVM_SYMBOLS)]
        definition.write_text("\n".join(lines) + "\n")
        command = [*self.zig, "dlltool", "-m", "i386:x86-64", "-d", str(definition)]
        run_tool([*command, "-l", str(library)], f"list the functions of tvm_ffi for {output.name}")
        return library


# Undefined symbols are looked up when the library is loaded. Linux' C library is in every process
# that runs TVM; to link with it, zig would compile parts of one first, for half a minute.
_WITHOUT_C = ("-nostdlib", "-Wl,--allow-shlib-undefined", "-fno-sanitize=all")
_OPTIONS = {
    "linux": _WITHOUT_C,
    # The name for programs that are linked with a library is else that of a temporary file.
    "darwin": ("-Wl,-undefined,dynamic_lookup", "-Wl,-install_name,@rpath/relaxlm.dylib"),
    # zig has no C library of Android. Pages of 16 KB are what Google Play asks for.
    "android": (*_WITHOUT_C, "-Wl,-z,max-page-size=16384"),
}


def zig_linker(platform: Platform) -> ZigLinker:
    """zig for a platform that is not this machine.

    Raises:
        ToolchainError: there is no zig.
    """
    if importlib.util.find_spec("ziglang") is not None:
        return ZigLinker(platform, (sys.executable, "-m", "ziglang"))
    if path := shutil.which("zig"):
        return ZigLinker(platform, (path,))
    raise ToolchainError(
        f"libraries for {platform.name} are linked with zig, which is not installed: "
        "pip install 'relaxlm[cross]'"
    )


def allowed_symbols(platform: Platform) -> frozenset[str]:
    """What a library may leave undefined."""
    names = (STATIC_SYMBOLS if platform.is_static else TVM_SYMBOLS) | C_SYMBOLS
    return names | HALF_SYMBOLS if platform.system in ("darwin", "ios") else names


def undefined_symbols(path: Path) -> frozenset[str]:
    """Names that a library needs from elsewhere, as C programs spell them.

    Raises:
        ToolchainError: lief, which reads libraries of all systems, is not installed.
    """
    if importlib.util.find_spec("lief") is None:
        raise ToolchainError("libraries are checked with lief: pip install 'relaxlm[cross]'")
    import lief

    lief.logging.disable()
    binary: Any = lief.parse(str(path))
    if isinstance(binary, lief.PE.Binary):
        others = [
            library
            for library in binary.imports
            if not str(library.name).lower().startswith(_WINDOWS)
        ]
        return frozenset(str(entry.name) for library in others for entry in library.entries)
    if isinstance(binary, lief.ELF.Binary):
        names = (str(symbol.name) for symbol in binary.dynamic_symbols if symbol.shndx == 0)
        return frozenset(name for name in names if name)
    names = (str(symbol.name) for symbol in binary.imported_symbols)
    return frozenset(name.removeprefix("_") for name in names if name not in _OF_LOADERS)
