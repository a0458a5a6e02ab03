"""Operating systems and processors that libraries are compiled for, this machine's or others.

`PLATFORMS` is the table behind `--device linux-arm64` and its kind. What links for them is zig,
which brings the C libraries of all of them along (`compiler/cross.py`). Importing this module costs
nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Any

from relaxlm.errors import ConfigError
from relaxlm.runtime import cpu

# Portable levels of the x86-64 psABI, and of what the kernels here use beyond them.
_LEVEL_2 = ("cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3")
_LEVEL_3 = (*_LEVEL_2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_LEVEL_4 = (*_LEVEL_3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
_VNNI = (*_LEVEL_4, "avx512vnni")
_AMX = (*_VNNI, "avx512bf16", "amx-bf16", "amx-int8", "amx-tile")
# The first versions of ARM's 64-bit architecture with dot products, and with matrices of bytes.
_ARM = ("fp-armv8", "neon")
_ARM_DOT = (*_ARM, "crc", "dotprod", "fullfp16", "lse", "rdm")
CPU_LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "x86-64-v2": _LEVEL_2,
        "x86-64-v3": _LEVEL_3,
        "x86-64-v3+avxvnni": (*_LEVEL_3, "avxvnni"),
        "x86-64-v4": _LEVEL_4,
        "x86-64-v4+vnni": _VNNI,
        "x86-64-v4+vnni+bf16": (*_VNNI, "avx512bf16"),
        "x86-64-v4+amx": _AMX,
    },
    "aarch64": {
        "armv8-a": _ARM,
        "armv8.2-a+dotprod": _ARM_DOT,
        "armv8.6-a": (*_ARM_DOT, "bf16", "complxnum", "i8mm", "jsconv", "rcpc"),
    },
}

# The levels that differ in their fastest kernels: what `--arch portable` stands for. Nothing is
# gained by SVE, whose vectors have no size that kernels could be laid out for; of x86-64-v4 alone,
# which few processors have, dot products are those of x86-64-v3.
PORTABLE = "portable"
_PORTABLE = {
    "x86_64": tuple(level for level in CPU_LEVELS["x86_64"] if level != "x86-64-v4"),
    "aarch64": tuple(CPU_LEVELS["aarch64"]),
}


@dataclass(frozen=True)
class Platform:
    """An operating system on one kind of processor.

    Attributes:
        cpu: LLVM's name of the architecture, as `runtime/cpu.py` uses it.
        system: `sys.platform` there; "ios" and "android" for themselves.
        suffixes: of libraries' file names. ".tar" holds object files, for another linker.
        triple: LLVM's name of the platform. zig: zig's, None where it cannot link.
        level: of `CPU_LEVELS`, which code may use if nothing else is asked for; None for a
            processor whose extensions are not tracked.
        attributes: further ones of LLVM's target.
    """

    name: str
    cpu: str
    system: str
    suffixes: tuple[str, ...]
    triple: str = ""
    zig: str | None = None
    level: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def is_here(self) -> bool:
        """Whether it is this machine's, and its libraries can be loaded."""
        return (self.cpu, self.system) == (cpu.architecture(), cpu.system())

    @property
    def has_linker(self) -> bool:
        """Whether this machine's own tools link for it.

        On Windows none of them does: what is undefined there has to be listed with the library
        that has it.
        """
        return self.is_here and self.system != "win32"

    @property
    def is_static(self) -> bool:
        """Whether programs have libraries linked into them, and load none."""
        return ".a" in self.suffixes

    @property
    def runs_python(self) -> bool:
        """Whether relaxlm's runtime could be there, and choose among a library's versions."""
        return self.system in ("linux", "darwin", "win32") and self.level is not None


def _linux(name: str, arch: str, zig: str, level: str | None, **attributes: Any) -> Platform:
    return Platform(
        name, arch, "linux", (".so", ".tar"), f"{arch}-linux-gnu", zig, level, attributes
    )


# macOS 11, the oldest that the wheels of TVM run on.
def _macos(name: str, arch: str, triple: str, level: str) -> Platform:
    return Platform(name, arch, "darwin", (".dylib", ".tar"), triple, f"{arch}-macos.11.0", level)


PLATFORMS: dict[str, Platform] = {
    platform.name: platform
    for platform in (
        # glibc 2.28, the oldest that the wheels of TVM run with.
        _linux("linux-x86_64", "x86_64", "x86_64-linux-gnu.2.28", "x86-64-v3"),
        _linux("linux-arm64", "aarch64", "aarch64-linux-gnu.2.28", "armv8-a"),
        replace(
            _linux(
                "linux-riscv64",
                "riscv64",
                "riscv64-linux-gnu.2.35",
                None,
                mattr=["+m", "+a", "+f", "+d", "+c"],
                mabi="lp64d",
            ),
            suffixes=(".so",),  # object files alone would convert halves wrongly: `riscv_half.py`
        ),
        Platform(
            "android-arm64",
            "aarch64",
            "android",
            (".so", ".tar"),
            "aarch64-linux-android",
            "aarch64-linux-musl",
            "armv8-a",
        ),
        _macos("macos-arm64", "aarch64", "arm64-apple-macos", "armv8.2-a+dotprod"),
        _macos("macos-x86_64", "x86_64", "x86_64-apple-macos", "x86-64-v3"),
        Platform(
            "windows-x86_64",
            "x86_64",
            "win32",
            (".dll", ".tar"),
            # The other one expects the start-up code of Microsoft's compiler.
            "x86_64-pc-windows-gnu",
            "x86_64-windows-gnu",
            "x86-64-v3",
        ),
        Platform(
            "ios", "aarch64", "ios", (".a", ".tar"), "arm64-apple-ios", None, "armv8.2-a+dotprod"
        ),
    )
}

# What a browser is to code.
WEB = Platform("browsers", "wasm32", "web", (".wasm",), "wasm32-unknown-unknown-wasm")


def this_platform() -> Platform:
    """The one this machine is."""
    for platform in PLATFORMS.values():
        if platform.is_here:
            return platform
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    name = f"{cpu.system()}-{cpu.architecture()}"
    return Platform(name, cpu.architecture(), cpu.system(), (suffix, ".tar"))


def portable_levels(platform: Platform) -> tuple[str, ...]:
    """What `--arch portable` stands for, from the plainest level on.

    Levels are left out that the runtime could not find on that operating system, and, on macOS,
    those plainer than every Mac that it runs on.
    """
    levels = CPU_LEVELS.get(platform.cpu, {})
    needed = set(levels.get(platform.level or "", ())) if platform.system == "darwin" else set()
    found = cpu.found_features(platform.system, platform.cpu)
    return tuple(
        level for level in _PORTABLE.get(platform.cpu, ()) if needed <= set(levels[level]) <= found
    )


def features_of(platform: Platform, arch: str) -> tuple[str, ...]:
    """The extensions that code for a level or a processor may use, under LLVM's names, sorted.

    Args:
        arch: a level of `CPU_LEVELS`, or a name that LLVM has for a processor, for which this
            imports TVM.

    Raises:
        ConfigError: neither.
    """
    levels = CPU_LEVELS.get(platform.cpu, {})
    if arch in levels:
        return tuple(sorted(levels[arch]))
    if not levels:
        raise ConfigError(f"arch '{arch}': {platform.name} has one architecture; leave it out")
    from tvm.target import Target, codegen

    generic = {"kind": "llvm", "mtriple": platform.triple}
    known = [str(name) for name in codegen.llvm_get_cpu_archlist(Target(generic))]
    if arch not in known:
        raise ConfigError(
            f"arch '{arch}' is not known for {platform.name}; expected {', '.join(levels)}, or one "
            f"of LLVM's processors: {', '.join(sorted(known))}"
        )
    processor = Target({**generic, "mcpu": arch})
    return tuple(
        sorted(
            feature
            for feature in cpu.tracked_features(platform.cpu)
            if codegen.target_has_features(feature, processor)
        )
    )
