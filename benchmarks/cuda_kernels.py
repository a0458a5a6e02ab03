"""What the kernels of a model ask of an NVIDIA GPU, found without one.

    python benchmarks/cuda_kernels.py --shape 8b --preset q4f16_1 --arch sm_90 --cuobjdump PATH

One layer of a model of `cuda_check_prepare.SHAPES` is compiled. For every kernel that multiplies or
attends this prints registers, shared memory, how many warps a multiprocessor has room for, and,
from the machine code, what instructions there are: loads of 16 bytes past the first-level cache,
copies to shared memory that nobody waits for, products of the tensor cores, loads and stores of
spilled registers, and all.

"In flight" is what the warps of a multiprocessor have on its way from memory at a time: with loads,
those before the loop, half of all there are; with copies, what is launched as shared memory. By
Little's law it has to be bandwidth times latency, on an H200 4.8 TB/s / 132 * 0.7 us = 25 KB.

cuobjdump is NVIDIA's, in the CUDA toolkit and in the package nvidia-cuda-cuobjdump, which needs
nvidia-cuda-nvdisasm next to it.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cuda_check_prepare import SHAPES

from relaxlm import models
from relaxlm.compiler.build import compile_model
from relaxlm.compiler.cuda_report import KernelReport
from relaxlm.compiler.options import CompileOptions
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.schemes import get_scheme


@dataclass(frozen=True)
class Multiprocessor:
    """What there is of it (CUDA C++ Programming Guide, "Technical Specifications")."""

    shared: int  # bytes
    warps: int
    registers: int = 65536
    blocks: int = 32

    def resident(self, report: KernelReport, warps: int) -> int:
        """Blocks that run at a time."""
        registers = -(-report.registers // 8) * 8 * 32 * warps
        # The driver takes 1 KB for itself.
        shared = report.shared + 1024
        limits = (self.registers // registers, self.shared // shared, self.warps // warps)
        return min(*limits, self.blocks)


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(164 << 10, 64),
    "sm_89": Multiprocessor(100 << 10, 48, blocks=24),
    "sm_90": Multiprocessor(228 << 10, 64),
    "sm_100": Multiprocessor(228 << 10, 64),
    "sm_120": Multiprocessor(100 << 10, 48, blocks=24),
}
COUNTED = {
    "loads": r"LDG\.E\.NA\S*\.128",
    "copies": "LDGSTS",
    "mma": "HMMA",
    "ldmatrix": "LDSM",
    "local": "(LDL|STL)",
}


def machine_code(fatbin: Path, cuobjdump: Path | None) -> dict[str, Counter[str]]:
    """Kernel -> instructions of each kind of COUNTED, and "all"."""
    if cuobjdump is None:
        return {}
    # It looks for nvdisasm on the path.
    path = f"{cuobjdump.parent}{os.pathsep}{os.environ['PATH']}"
    text = subprocess.run(
        [cuobjdump, "--dump-sass", fatbin],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    ).stdout
    found: dict[str, Counter[str]] = {}
    for part in text.split("Function : ")[1:]:
        counts = found.setdefault(part.split()[0], Counter())
        for line in re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@\S+ )?(\S+)", part, re.MULTILINE):
            counts["all"] += line.rstrip(";") != "NOP"
            for kind, pattern in COUNTED.items():
                counts[kind] += re.match(pattern, line) is not None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="8b", choices=sorted(SHAPES))
    parser.add_argument("--preset", default="q4f16_1")
    parser.add_argument("--arch", default="sm_90", choices=sorted(MULTIPROCESSORS))
    parser.add_argument("--cuobjdump", type=Path)
    options = parser.parse_args()
    raw = {**SHAPES[options.shape], "num_hidden_layers": 1}
    config, scheme = models.load_config(raw), get_scheme(options.preset)
    device = resolve_device("cuda", options.arch)
    with tempfile.TemporaryDirectory() as folder:
        built = compile_model(
            config, raw, scheme, device, CompileOptions.resolve(config, scheme), Path(folder)
        )
        code = machine_code(Path(folder) / "kernels.fatbin", options.cuobjdump)
        source = (Path(folder) / "kernels.cu").read_text()
    threads = {
        name: int(count)
        for count, name in re.findall(r"__launch_bounds__\((\d+)[^)]*\) (\w+)\(", source)
    }
    processor = MULTIPROCESSORS[options.arch]
    columns = ["registers", "shared", "warps", "in flight", *COUNTED, "all"]
    print(f"| kernel | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for report in built.kernels:
        if not re.search("matmul|attention", report.kernel):
            continue
        warps, counts = threads[report.kernel] // 32, code.get(report.kernel, Counter())
        blocks = processor.resident(report, warps)
        flying = blocks * report.shared
        if not counts["copies"]:
            flying = blocks * warps * 32 * 16 * counts["loads"] // 2
        cells = [report.registers, report.shared, blocks * warps, f"{flying >> 10} KB"]
        cells += [counts[kind] for kind in (*COUNTED, "all")]
        print(f"| {report.kernel} | {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
