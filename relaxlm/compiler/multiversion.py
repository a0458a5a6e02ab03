"""Compiles one library with several versions of a model's code, for CPUs with more extensions each.

Each version is a library of its own, with the kernels that suit its CPU and metadata that say so.
The plainest one carries the others as read-only data (`runtime/multiversion.py`), in an object file
that is linked with its own: so signatures and tools that strip symbols leave them as they are, and
a loader that knows nothing of them runs the plainest. Weights are read as they are stored, so all
versions use one folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import tvm_ffi

from relaxlm.compiler.build import CompiledModel, Progress, compile_model
from relaxlm.compiler.cuda_report import KernelReport
from relaxlm.compiler.options import check_opt
from relaxlm.compiler.target import DeviceTarget
from relaxlm.runtime.metadata import LibraryMetadata
from relaxlm.runtime.multiversion import Version, pack

if TYPE_CHECKING:
    from relaxlm.compiler.request import CompileRequest

# Of all stages, the share of compiling; the rest is linking.
_COMPILING = 0.95


@dataclass
class CompiledVersions:
    """Compiled models in memory that become one library, from the plainest on.

    Attributes:
        device: the first one's, and what the others are.
    """

    models: Sequence[CompiledModel]
    device: DeviceTarget

    @property
    def metadata(self) -> LibraryMetadata:
        """What the version says of itself that takes the most memory."""
        return max((model.metadata for model in self.models), key=lambda info: info.step_bytes)

    @property
    def seconds(self) -> dict[str, float]:
        """Compile time by stage, "x86-64-v3: lower"."""
        return {
            _stage(model.device, stage): spent
            for model in self.models
            for stage, spent in model.seconds.items()
        }

    @property
    def kernels(self) -> list[KernelReport]:
        """Of CUDA, for which no library has versions."""
        return [report for model in self.models for report in model.kernels]

    def save(self, output: Path, progress: Progress = lambda stage, share: None) -> None:
        """Write the library. Raises as `CompiledModel.save` does."""
        self.device.check_output(output)
        plainest, *others = self.models
        with TemporaryDirectory() as folder:
            packed: list[tuple[Version, bytes]] = []
            for model in others:
                progress(_stage(model.device, "link"), _COMPILING)
                path = Path(folder) / f"{len(packed)}{output.suffix}"
                model.save(path)
                packed.append((_version(model.device), path.read_bytes()))
            progress("link", _COMPILING)
            data = Path(folder) / "versions.o"
            write_object(data, pack(_version(plainest.device), packed), plainest.device)
            plainest.save(output, progress, [data])


def compile_versions(
    request: CompileRequest,
    debug_dump: Path | None = None,
    progress: Progress = lambda stage, share: None,
) -> CompiledVersions:
    """Compile every version of a request; takes what `compile_model` takes, and raises as it does.

    Args:
        debug_dump: gets a folder for each version.
    """
    parts = (request, *request.further)
    for part in parts:  # before the long work
        check_opt(part.options, part.scheme, part.device)
    models = []
    # The first one's metadata name all of them.
    devices = (request.device, *request.device.further)
    for i, (part, device) in enumerate(zip(parts, devices, strict=True)):

        def tell(stage: str, share: float, i: int = i, device: DeviceTarget = device) -> None:
            progress(_stage(device, stage), _COMPILING * (i + share) / len(parts))

        dump = debug_dump / device.arch[0] if debug_dump else None
        arguments = (part.config, part.raw, part.scheme, device, part.options, dump, tell)
        models.append(compile_model(*arguments))
    return CompiledVersions(models, request.device)


def _stage(device: DeviceTarget, stage: str) -> str:
    return f"{device.arch[0]}: {stage}"


def _version(device: DeviceTarget) -> Version:
    return Version(device.arch[0], device.cpu_features)


def write_object(path: Path, data: bytes, device: DeviceTarget) -> None:
    """An object file with read-only data under a public name, which linkers therefore keep."""
    target = {"kind": "llvm", "mtriple": device.platform.triple, **device.platform.attributes}
    make = tvm_ffi.get_global_func("codegen.codegen_blob")
    make(data, False, json.dumps(target), "relaxlm_versions").write_to_file(str(path), "o")
