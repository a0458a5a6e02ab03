"""Writes the table of docs/targets.md: compiles a tiny model for every target and looks what comes.

    .venv-test/bin/python -m tools.targets_table

A column says yes only for what this run has done. Where a target is linked by a tool that is not
here, its row says which.
"""

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from relaxlm.compiler.request import CompileRequest
from relaxlm.compiler.target import REFUSED
from relaxlm.errors import RelaxLMError
from relaxlm.runtime import cpu
from relaxlm.runtime.library import Library
from tests.tiny_model import CONFIG

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "targets.md"
START, END = "<!-- targets: start -->", "<!-- targets: end -->"
HEADER = (
    "| `--device` | file | generates | links | loads here | tested | needs there |",
    "|---|---|---|---|---|---|---|",
)
WHEEL = "the wheels of TVM and tvm-ffi"
NO_WHEEL = "a runtime of TVM, of which there is no wheel"


@dataclass(frozen=True)
class Row:
    """What is known of a target besides what this run finds out."""

    device: str
    tested: str
    needs: str


ROWS = (
    Row("cpu", "all tests", WHEEL),
    Row("cpu:x86-64-v2", "kernels against NumPy", WHEEL),
    Row("cpu:x86-64-v3", "kernels against NumPy", WHEEL),
    Row("cpu:x86-64-v4", "kernels against NumPy", WHEEL),
    Row("cpu:portable", "logits, each version that runs here", WHEEL),
    Row("cpu:znver4", "machine code and symbols", WHEEL),
    Row("linux-arm64", "symbols", WHEEL),
    Row("linux-arm64:portable", "logits in qemu, each version", WHEEL),
    Row("linux-riscv64", "logits in qemu", NO_WHEEL),
    Row("android-arm64", "symbols", NO_WHEEL),
    Row("macos-arm64", "symbols, signature, memory of the file", WHEEL),
    Row("macos-x86_64", "symbols, memory of the file", NO_WHEEL),
    Row("windows-x86_64", "symbols", WHEEL),
    Row("windows-x86_64:portable", "logits and a reply in Wine, each version", WHEEL),
    Row("ios", "archive", "an app with TVM's runtime linked in"),
    Row("cuda:sm_80,sm_90", "replies on a stand-in for the driver; nvcc", f"{WHEEL}, libcudart 13"),
    Row("metal", "logits in emulation", f"{WHEEL}, on macOS on ARM"),
    Row("metal:ios", "none", "an app with TVM's runtime linked in"),
    Row("opencl", "logits in emulation, and by PoCL", f"{NO_WHEEL}; an OpenCL driver"),
    Row("opencl:android-arm64", "none", f"{NO_WHEEL}; an OpenCL driver"),
    Row("rocm:gfx90a", "machine code, and what it takes", f"{NO_WHEEL}; AMD's driver"),
    Row("rocm:gfx1100", "machine code, and what it takes", f"{NO_WHEEL}; AMD's driver"),
    Row("webgpu", "logits in Node.js, the demo in Chromium", "a browser with WebGPU"),
    Row("wasm", "the demo's tokens in node", "a browser or node"),
)


def measured(row: Row, source: Path, folder: Path) -> str:
    """The row's line."""
    cells = {"generates": "no", "links": "no", "loads": "no"}
    file, note = "", ""
    try:
        request = CompileRequest.read(
            source, "q4f16_1", row.device, overrides="prefill_chunk_size=64;max_batch_size=4"
        )
        file = request.device.suffix
        compiled = request.compile()
        cells["generates"] = "yes"
        library = folder / f"library{file}"
        compiled.save(library)
        cells["links"] = "yes"
        runs = request.device.platform.is_here and request.device.kind == "cpu"
        if runs and not cpu.missing_features(request.device.cpu_features):
            Library.load(library)
            cells["loads"] = "yes"
        library.unlink()
    except RelaxLMError as error:
        note = f" ({str(error).splitlines()[0].split(':')[0][:80]})"
    columns = [cells["generates"], cells["links"] + note, cells["loads"], row.tested, row.needs]
    return f"| `{row.device}` | `{file}` | " + " | ".join(columns) + " |"


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "model"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(CONFIG))
        lines = []
        for row in ROWS:
            lines.append(measured(row, source, Path(place)))
            print(lines[-1], flush=True)
    for device, reason in REFUSED.items():
        lines.append(f"| `{device}` | | no | | | refused: {reason} | |")
    table = "\n".join([START, "", *HEADER, *lines, "", END])
    page = PAGE.read_text("utf-8")
    PAGE.write_text(re.sub(f"{START}.*{END}", lambda _: table, page, flags=re.S), "utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}" + ("" if shutil.which("nvcc") else "; nvcc is missing"))


if __name__ == "__main__":
    main()
