"""What `relaxlm doctor` finds out: versions, processor, devices, compilers, cache, and a self-test.

Everything that needs TVM runs in a process of its own (`relaxlm.compiler.self_test`): a TVM that
does not fit this machine can end its process, and doctor has to say so rather than end with it.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from relaxlm.errors import ToolchainError
from relaxlm.files import format_bytes
from relaxlm.runtime.memory import available_memory, total_memory
from relaxlm.versions import (
    PINNED,
    RELAXLM_VERSION,
    installed_version,
    pip_command,
    version_problems,
)

LIBRARIES = ("jinja2", "ml_dtypes", "numpy", "pydantic", "rich", "tokenizers", "typer")
OPTIONAL_LIBRARIES = {"torch": "test", "transformers": "test"}  # and the extra that installs it

SELF_TEST = [sys.executable, "-m", "relaxlm.compiler.self_test"]
SELF_TEST_SECONDS = 300

# Extensions that decide which kernels a processor gets, best first.
TELLING_FEATURES = (
    *("avx512fp16", "avx512bf16", "avx512vnni", "avx512f", "avxvnni", "avx2", "fma", "f16c"),
    *("sve2", "sve", "i8mm", "bf16", "dotprod", "fullfp16", "neon"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report. `broken`: relaxlm can't work; `absent`: a part of it can't."""

    section: str
    name: str
    value: str
    status: Literal["ok", "absent", "broken"] = "ok"
    advice: str = ""


def examine(self_test: bool = True) -> Iterator[Finding]:
    """Every finding, as soon as it is known; the self-test, which takes seconds, comes last."""
    yield from versions()
    yield from processor()
    yield from devices()
    yield from compilers()
    yield from cache()
    if self_test and not version_problems():
        yield from tvm_findings(run_self_test())


def versions() -> Iterator[Finding]:
    section = "versions"
    system = f"{platform.system()} {platform.machine()}"
    yield Finding(section, "Python", f"{platform.python_version()} ({system})")
    yield Finding(section, "relaxlm", RELAXLM_VERSION)
    for name, wanted in PINNED.items():
        found = installed_version(name)
        if found == wanted:
            yield Finding(section, name, found)
        else:
            value = f"{found or 'not installed'}, expected {wanted}"
            yield Finding(section, name, value, "broken", pip_command())
    for name in LIBRARIES:
        if found := installed_version(name):
            yield Finding(section, name, found)
        else:
            advice = f"{sys.executable} -m pip install {name}"
            yield Finding(section, name, "not installed", "broken", advice)
    for name, extra in OPTIONAL_LIBRARIES.items():
        if found := installed_version(name):
            yield Finding(section, name, found)
        else:
            advice = f"needed by `relaxlm verify`: pip install relaxlm[{extra}]"
            yield Finding(section, name, "not installed", "absent", advice)


def processor() -> Iterator[Finding]:
    from relaxlm.runtime.cpu import architecture, host_cpu_features
    from relaxlm.runtime.threads import VARIABLE, usable_cores

    section = "processor"
    yield Finding(section, "name", _processor_name())
    features = host_cpu_features()
    telling = [name for name in TELLING_FEATURES if name in features]
    if telling:
        yield Finding(section, "extensions", " ".join(telling))
    else:
        value = f"none known of {architecture()}"
        advice = "libraries are compiled for the plainest processor of this kind"
        yield Finding(section, "extensions", value, "absent", advice)
    yield Finding(section, "physical cores", f"{usable_cores()} usable")
    default = f"not set: relaxlm takes {usable_cores()}"
    yield Finding(section, VARIABLE, os.environ.get(VARIABLE) or default)
    yield Finding(section, "memory", _memory())


def devices() -> Iterator[Finding]:
    """The GPUs that their driver reports; whether TVM can use them is the self-test's to say."""
    from relaxlm.runtime.cuda import gpus
    from relaxlm.runtime.gpu import PLAIN_GPUS, why_missing

    found = gpus()
    if not found:
        yield Finding("devices", "cuda", "no NVIDIA GPU", "absent")
    for number, gpu in enumerate(found):
        yield Finding("devices", f"cuda:{number}", f"{gpu.name}, {gpu.arch}")
    for kind in PLAIN_GPUS:
        missing = why_missing(kind)
        yield Finding("devices", kind, missing or "usable", "absent" if missing else "ok")


def compilers() -> Iterator[Finding]:
    """The programs that make libraries of what TVM generates, and what each is needed for."""
    from relaxlm.compiler.cross import zig_linker
    from relaxlm.compiler.cuda import find_nvcc
    from relaxlm.compiler.link import find_linker
    from relaxlm.compiler.platforms import this_platform
    from relaxlm.compiler.rocm import bitcode_folder, find_lld

    section, here = "compilers", this_platform()
    try:
        linker = find_linker().command if here.has_linker else zig_linker(here).zig
        yield Finding(section, "C linker", _version(linker))
    except ToolchainError as error:
        yield Finding(section, "C linker", "not usable", "broken", str(error))
    try:
        yield Finding(section, "nvcc", _version([str(find_nvcc())]))
    except ToolchainError:
        advice = "needed to compile for --device cuda: pip install relaxlm[cuda]"
        yield Finding(section, "nvcc", "not found", "absent", advice)
    if command := zig():
        yield Finding(section, "zig", _version(command))
    else:
        advice = "needed to link for other systems: pip install ziglang"
        yield Finding(section, "zig", "not found", "absent", advice)
    try:
        value = f"{bitcode_folder()} and {' '.join(find_lld())}"
        yield Finding(section, "ROCm bitcode", value)
    except ToolchainError:
        advice = "needed to compile for --device rocm: install rocm-device-libs and lld"
        yield Finding(section, "ROCm bitcode", "not found", "absent", advice)
    if emcc := shutil.which("emcc"):
        yield Finding(section, "emcc", _version([emcc]))
    else:
        yield Finding(section, "emcc", "not found", "absent", "needed to link for browsers (.wasm)")


def zig() -> list[str] | None:
    if find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang"]
    program = shutil.which("zig")
    return [program] if program else None


def _version(command: Sequence[str]) -> str:
    """The version that a compiler prints of itself, and where it is."""
    argument = "version" if "zig" in command[-1] else "--version"
    try:
        result = subprocess.run(
            [*command, argument], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run: {error}"
    # "g++ (Debian 12.2.0-14+deb12u1) 12.2.0": the distribution's number is in the parentheses.
    number = re.search(r"\d+\.\d+[.\d]*", re.sub(r"\(.*?\)", "", result.stdout))
    return f"{number[0] if number else 'version unknown'} ({' '.join(command)})"


def cache() -> Iterator[Finding]:
    """Where libraries that were compiled on first use are kept, and what they take."""
    from relaxlm.runtime.jit import cache_folder

    folder = cache_folder()
    files = [file for file in folder.rglob("*") if file.is_file()]
    size = format_bytes(sum(file.stat().st_size for file in files))
    value = f"{size} in {len(files)} files" if files else "empty"
    yield Finding("cache", "libraries", f"{value} ({folder})")


def run_self_test() -> dict[str, Any]:
    """Run `relaxlm.compiler.self_test` in a process of its own and return what it printed.

    Returns:
        Its facts, or {"error": why there are none}.
    """
    try:
        result = subprocess.run(
            SELF_TEST,
            capture_output=True,
            text=True,
            timeout=SELF_TEST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {SELF_TEST_SECONDS} seconds"}
    if result.returncode < 0:
        return {"error": f"ended by {signal.Signals(-result.returncode).name}"}
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        return {"error": lines[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def tvm_findings(facts: dict[str, Any]) -> Iterator[Finding]:
    """What `run_self_test` returned, as findings."""
    if error := facts.get("error"):
        yield Finding("TVM", "self-test", "failed", "broken", error)
        return
    yield Finding("TVM", "LLVM", f"{facts['llvm']}, tunes for {facts['processor']}")
    yield Finding("TVM", "threads", str(facts["threads"]))
    for number, memory in enumerate(facts["cuda_memory"]):
        yield Finding("TVM", f"cuda:{number}", f"usable, {format_bytes(memory)} of memory")
    largest_error, allowed = facts["largest_error"], facts["tolerance"]
    if largest_error > allowed:
        value = f"wrong results: off by {largest_error:.1e}, allowed is {allowed:.0e}"
        advice = "please report this with the output of `relaxlm doctor --json`"
        yield Finding("TVM", "self-test", value, "broken", advice)
    else:
        value = (
            f"one layer compiled in {facts['compile_s']:.1f} s, run in {facts['run_ms']:.1f} ms, "
            f"off by {largest_error:.1e}"
        )
        yield Finding("TVM", "self-test", value)


def _processor_name() -> str:
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory() -> str:
    total, available = total_memory(), available_memory()
    if total is None:
        return "unknown"
    text = format_bytes(total)
    return text if available is None else f"{text}, {format_bytes(available)} available"
