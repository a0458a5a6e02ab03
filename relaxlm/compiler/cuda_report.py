"""What nvcc and ptxas say of kernels: registers, shared memory and spills, or what is wrong.

ptxas prints the registers, the stack and the shared memory that a kernel declares. Most kernels
declare none and are launched with it ("dynamic" shared memory), of which ptxas knows nothing;
`DynamicSharedMemory` takes that from TVM's IR, where it is still a buffer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import tvm

from relaxlm.compiler.target import arch_number

# Characters of a faulty line that an error message quotes.
_QUOTED = 100


@dataclass(frozen=True)
class KernelReport:
    """What one kernel takes on one architecture.

    Sizes in bytes: `shared` per block, static and dynamic together; the others per thread.
    """

    kernel: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int = 0

    @property
    def spills(self) -> int:
        """Bytes that do not fit into registers and go to memory and back."""
        return self.spill_stores + self.spill_loads

    def __str__(self) -> str:
        spills = f", spills {self.spill_stores}/{self.spill_loads} B" if self.spills else ""
        stack = f", stack {self.stack} B" if self.stack else ""
        return f"{self.arch} {self.kernel}: {self.registers} registers{stack}{spills}"


_PTXAS = re.compile(
    r"Compiling entry function '(?P<kernel>[^']+)' for '(?P<arch>sm_\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<more>[^\n]*)",
    re.DOTALL,
)


def parse_ptxas(log: str) -> list[KernelReport]:
    """Read the output of `ptxas -v`: one report per kernel and architecture, oldest first."""
    reports = []
    for found in _PTXAS.finditer(log):
        shared = re.search(r"(\d+) bytes smem", found["more"])
        reports.append(
            KernelReport(
                kernel=found["kernel"],
                arch=found["arch"],
                registers=int(found["registers"]),
                stack=int(found["stack"]),
                spill_stores=int(found["stores"]),
                spill_loads=int(found["loads"]),
                shared=int(shared[1]) if shared else 0,
            )
        )
    return sorted(reports, key=lambda report: (arch_number(report.arch), report.kernel))


def worst_first(reports: list[KernelReport]) -> list[KernelReport]:
    """Kernels that spill first, the most at the top; then by registers. Archs stay together."""
    worst: dict[str, tuple[int, int]] = {}
    for report in reports:
        spills, registers = worst.get(report.kernel, (0, 0))
        worst[report.kernel] = (max(spills, report.spills), max(registers, report.registers))

    def place(report: KernelReport) -> tuple:
        spills, registers = worst[report.kernel]
        return (-spills, -registers, report.kernel, arch_number(report.arch))

    return sorted(reports, key=place)


@tvm.ir.instrument.pass_instrument
class DynamicSharedMemory:
    """Notes the bytes of dynamic shared memory that kernels are launched with.

    In the pass context while TVM generates code.

    Attributes:
        bytes: kernel -> bytes per block.
    """

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def run_after_pass(self, module: Any, info: Any) -> None:
        if info.name != "tirx.SplitHostDevice":
            return
        for name, function in module.functions_items():
            attributes = getattr(function, "attrs", None) or {}
            if "tirx.use_dyn_shared_memory" in attributes.get("tirx.kernel_launch_params", ()):
                self.bytes[name.name_hint] = _dynamic_bytes(function)

    def add_to(self, reports: list[KernelReport]) -> list[KernelReport]:
        """The reports with the shared memory of the launch in `shared`."""
        return [replace(r, shared=r.shared + self.bytes.get(r.kernel, 0)) for r in reports]


def _dynamic_bytes(kernel: tvm.tirx.PrimFunc) -> int:
    """MergeSharedMemoryAllocations has put all of it into one buffer outside every loop."""
    waiting, total = [kernel.body], 0
    while waiting:
        node = waiting.pop()
        if isinstance(node, tvm.tirx.AllocBuffer) and node.buffer.scope() == "shared.dyn":
            itemsize = tvm.runtime.DataType(node.buffer.dtype).itemsize
            total += math.prod(int(extent) for extent in node.buffer.shape) * itemsize
        waiting.extend(getattr(node, "seq", ()))
        if (body := getattr(node, "body", None)) is not None:
            waiting.append(body)
    assert total, "a kernel that is launched with shared memory allocates none"
    return total


@dataclass(frozen=True)
class Fault:
    """The first thing that a CUDA compiler complains of, and how many more there are.

    Attributes:
        kernel: in which it is, or the device function; "" if that is not known.
        code: the faulty line, "" if it is not one of the source.
    """

    message: str
    kernel: str = ""
    line: int = 0
    code: str = ""
    more: int = 0

    def __str__(self) -> str:
        place = f" (line {self.line}: {self.code})" if self.code else ""
        others = f", and {self.more} more" if self.more else ""
        return f"{self.message}{place}{others}"


# nvcc's front end, with the lines that follow until the next complaint; ptxas on a kernel, on a
# line of the PTX it was given, and on something that has no line.
_FRONT_END = re.compile(r"^\S+\.cu\((\d+)\): (?:catastrophic )?error(?: #\d+)?: (.+)$", re.M)
_OF_KERNEL = re.compile(r"^ptxas \w+\s*: Entry function '(\w+)' (.+)$", re.M)
_OF_PTX = re.compile(
    r"^ptxas \S+?(?:\.compute_(\w+))?\.ptx, line (\d+); (?:error|fatal)\s*: (.+)$", re.M
)
_UNRESOLVED = re.compile(r"^ptxas fatal\s*: (Unresolved extern function '(\w+)')$", re.M)


def find_fault(output: str, source: str, ptx: Callable[[str], str]) -> Fault | None:
    """The first error in what nvcc printed, and the kernel that it is in; None if there is none.

    Args:
        source: the file that nvcc was given.
        ptx: "80" -> what nvcc makes of the source before it runs ptxas; "" for any architecture.
    """
    lines = source.splitlines()
    if found := list(_FRONT_END.finditer(output)):
        number, message = int(found[0][1]), found[0][2].strip()
        end = found[1].start() if len(found) > 1 else len(output)
        # An error inside a template names those who use it, the outermost last.
        users = re.findall(r"\bat line (\d+)", output[found[0].end() : end])
        kernel = _function_at(lines, int(users[-1]) if users else number)
        code = lines[number - 1].strip() if number <= len(lines) else ""
        return Fault(message, kernel, number, _shortened(code), len(found) - 1)
    if match := _OF_KERNEL.search(output):
        return Fault(match[2].strip(), match[1])
    if found := list(_OF_PTX.finditer(output)):
        text = ptx(found[0][1]).splitlines()
        number = int(found[0][2])
        code = text[number - 1].strip() if number <= len(text) else ""
        kernel = _entry_at(text, number)
        others = sum(other[1] == found[0][1] for other in found[1:])
        return Fault(f"{found[0][3].strip()} in `{_shortened(code)}`", kernel, more=others)
    if match := _UNRESOLVED.search(output):
        text = ptx("").splitlines()
        calls = (
            number
            for number, line in enumerate(text, 1)
            if re.search(rf"\b{match[2]}\b", line) and ".extern" not in line
        )
        return Fault(match[1], _entry_at(text, next(calls, 0)))
    return None


def _function_at(lines: list[str], number: int) -> str:
    """The kernel or device function in which a line (counted from 1) lies; "" if in none."""
    names = re.compile(
        r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(|__device__[^;=(]*?\b(\w+)\("
    )
    for line in reversed(lines[:number]):
        if found := names.search(line):
            return found[1] or found[2]
    return ""


def _entry_at(lines: list[str], number: int) -> str:
    """The kernel in which a line of PTX (counted from 1) lies."""
    for line in reversed(lines[:number]):
        if found := re.search(r"\.entry (\w+)", line):
            return found[1]
    return ""


def _shortened(code: str) -> str:
    return code if len(code) <= _QUOTED else code[: _QUOTED - 3] + "..."
