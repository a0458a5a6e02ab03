"""Which instruction-set extensions this processor has, under LLVM's names.

A library compiled for one CPU ends in an illegal instruction on another that lacks an extension.
So a library lists the features that its code may use, and whoever loads it compares the list with
`host_cpu_features()`. This must work where no compiler is installed, hence from what the operating
system reports, not from LLVM. A feature that cannot be determined counts as missing.

Only extensions that a compiler or relaxlm's kernels use are tracked (`X86_FEATURES`,
`ARM_FEATURES`). AMX needs a permission from the operating system, too: `host_cpu_features` asks for
it, once for the process, and lists AMX only where it was given. `UNUSABLE` names extensions that
LLVM would use if a processor's name implied them, and for which this module knows no reliable test;
the compiler turns them off.

Linux clears a flag in /proc/cpuinfo when the kernel does not save that extension's registers, so
flags are what a program may use, not only what the silicon has. The lists of all cores are
intersected: a thread can move.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

# LLVM's name -> the name among /proc/cpuinfo's flags.
X86_FEATURES: dict[str, str] = {
    "sse3": "pni",
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "sse4a": "sse4a",
    "popcnt": "popcnt",
    "cx16": "cx16",
    "sahf": "lahf_lm",
    "movbe": "movbe",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "lzcnt": "abm",
    "tbm": "tbm",
    "prfchw": "3dnowprefetch",
    "gfni": "gfni",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "fma4": "fma4",
    "xop": "xop",
    "f16c": "f16c",
    "avxvnni": "avx_vnni",
    "avxvnniint8": "avx_vnni_int8",
    "avxvnniint16": "avx_vnni_int16",
    "avxifma": "avx_ifma",
    "avxneconvert": "avx_ne_convert",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
}
ARM_FEATURES: dict[str, str] = {
    "neon": "asimd",
    "fp-armv8": "fp",
    "fullfp16": "asimdhp",
    "fp16fml": "asimdfhm",
    "dotprod": "asimddp",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "lse": "atomics",
    "rdm": "asimdrdm",
    "crc": "crc32",
    "rcpc": "lrcpc",
    "jsconv": "jscvt",
    "complxnum": "fcma",
    "sve": "sve",
    "sve2": "sve2",
}
UNUSABLE: tuple[str, ...] = (
    *("avx10.1", "avx10.2", "avx512vp2intersect", "egpr", "ccmp", "ndd", "nf", "push2pop2"),
    *("ppx", "zu", "cf", "amx-fp16"),
)

# What macOS calls them, in the output of `sysctl hw.optional machdep.cpu`.
_MACOS_ARM = {
    "neon": "AdvSIMD",
    "fp-armv8": "floatingpoint",
    "fullfp16": "arm.FEAT_FP16",
    "fp16fml": "arm.FEAT_FHM",
    "dotprod": "arm.FEAT_DotProd",
    "i8mm": "arm.FEAT_I8MM",
    "bf16": "arm.FEAT_BF16",
    "lse": "arm.FEAT_LSE",
    "rdm": "arm.FEAT_RDM",
    "crc": "armv8_crc32",
    "rcpc": "arm.FEAT_LRCPC",
    "jsconv": "arm.FEAT_JSCVT",
    "complxnum": "arm.FEAT_FCMA",
}
_MACOS_X86 = {
    "sse3": "SSE3",
    "ssse3": "SSSE3",
    "sse4.1": "SSE4.1",
    "sse4.2": "SSE4.2",
    "popcnt": "POPCNT",
    "cx16": "CX16",
    "sahf": "LAHF",
    "movbe": "MOVBE",
    "bmi": "BMI1",
    "bmi2": "BMI2",
    "lzcnt": "LZCNT",
    "prfchw": "PREFETCHW",
    "avx": "AVX1.0",
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx512f": "AVX512F",
    "avx512bw": "AVX512BW",
    "avx512cd": "AVX512CD",
    "avx512dq": "AVX512DQ",
    "avx512vl": "AVX512VL",
}
# Windows' IsProcessorFeaturePresent knows few names. Every x86 processor with AVX2 that Windows
# runs on has the rest of x86-64-v3, too; of AVX-512 it reports the foundation alone.
_WINDOWS_X86 = {
    13: ("sse3",),
    14: ("cx16", "sahf"),  # of 64-bit processors, Windows 8.1 and later take those that have both
    36: ("ssse3",),
    37: ("sse4.1",),
    38: ("sse4.2", "popcnt"),
    39: ("avx",),
    40: ("avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe"),
}
_WINDOWS_ARM = {
    18: ("neon", "fp-armv8"),
    31: ("crc",),
    34: ("lse", "rdm"),
    43: ("dotprod",),
    44: ("jsconv",),
    45: ("rcpc",),
}


def architecture(machine: str | None = None) -> str:
    """LLVM's name of this machine's architecture: `x86_64`, `aarch64`, or what the system says."""
    name = (machine or platform.machine()).lower()
    return {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}.get(name, name)


def system() -> str:
    """The operating system: `sys.platform`, and "android" where that says "linux"."""
    return "android" if hasattr(sys, "getandroidapilevel") else sys.platform


def tracked_features(arch: str | None = None) -> frozenset[str]:
    """The features that a library may list for an architecture; empty for an unknown one."""
    return frozenset(
        {"x86_64": X86_FEATURES, "aarch64": ARM_FEATURES}.get(arch or architecture(), {})
    )


def found_features(system: str, arch: str) -> frozenset[str]:
    """Those that this module can find on a machine, if it has them, by what its system reports."""
    if system == "darwin":
        return frozenset(_MACOS_ARM if arch == "aarch64" else _MACOS_X86)
    if system == "win32":
        table = _WINDOWS_ARM if arch == "aarch64" else _WINDOWS_X86
        return frozenset(name for names in table.values() for name in names)
    return tracked_features(arch)


@functools.cache
def host_cpu_features() -> frozenset[str]:
    """The tracked features that programs may use on this machine now."""
    arch = architecture()
    if sys.platform == "darwin":
        return macos_features(_sysctl(), arch)
    if sys.platform == "win32":
        return _windows_features(arch)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    features = linux_features(text, arch)
    if "amx-tile" in features and not _allow_tiles():
        return frozenset(name for name in features if not name.startswith("amx"))
    return features


def _allow_tiles() -> bool:
    """Ask Linux to save AMX's tile registers for this process's threads, old and new ones."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def missing_features(required: Iterable[str]) -> tuple[str, ...]:
    """Those of `required` that this machine lacks, sorted."""
    return tuple(sorted(set(required) - host_cpu_features()))


def linux_features(cpuinfo: str, arch: str) -> frozenset[str]:
    """The tracked features that every core in the text of /proc/cpuinfo has."""
    names = {"x86_64": X86_FEATURES, "aarch64": ARM_FEATURES}.get(arch, {})
    key = "flags" if arch == "x86_64" else "Features"
    cores = [
        set(line.partition(":")[2].split())
        for line in cpuinfo.splitlines()
        if line.partition(":")[0].strip() == key
    ]
    if not cores:
        return frozenset()
    everywhere = set.intersection(*cores)
    return frozenset(llvm for llvm, flag in names.items() if flag in everywhere)


def macos_features(sysctl: Mapping[str, str], arch: str) -> frozenset[str]:
    """The tracked features that macOS reports (`hw.optional.*`, `machdep.cpu.*`)."""
    if arch == "aarch64":
        return frozenset(
            llvm for llvm, key in _MACOS_ARM.items() if sysctl.get(f"hw.optional.{key}") == "1"
        )
    flags: set[str] = set()
    for key in ("features", "leaf7_features", "extfeatures"):
        flags.update(sysctl.get(f"machdep.cpu.{key}", "").split())
    return frozenset(llvm for llvm, flag in _MACOS_X86.items() if flag in flags)


def _sysctl() -> dict[str, str]:
    try:
        text = subprocess.run(
            ["/usr/sbin/sysctl", "hw.optional", "machdep.cpu"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _windows_features(arch: str) -> frozenset[str]:
    present = ctypes.windll.kernel32.IsProcessorFeaturePresent  # type: ignore[attr-defined,unused-ignore]
    table = _WINDOWS_ARM if arch == "aarch64" else _WINDOWS_X86
    return frozenset(name for code, names in table.items() if present(code) for name in names)
