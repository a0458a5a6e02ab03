"""Streams a checkpoint, block of rows by block of rows, into the MLC weight container."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from relaxlm.errors import CheckpointError, WeightsError
from relaxlm.files import format_bytes
from relaxlm.models.weights import ParameterSpec, Source, found_in
from relaxlm.quantization.checkpoint import Checkpoint, shorten
from relaxlm.quantization.container import ALIGNMENT, SHARD_BYTES, ContainerWriter
from relaxlm.quantization.conversion_report import (
    ConversionReport,
    ParameterError,
    current_memory,
    peak_memory,
)
from relaxlm.quantization.decoded_tensors import decode_tensors
from relaxlm.quantization.groupwise import (
    BLOCK_ELEMENTS,
    FLOAT_DTYPES,
    GroupQuant,
    block_rows,
    cast,
)
from relaxlm.quantization.prequantized import refuse_by_files, refuse_by_tensors
from relaxlm.quantization.schemes import Scheme
from relaxlm.quantization.stored_tensor import StoredTensor

# (bytes of the checkpoint that are done, bytes in total, parameter being converted)
Progress = Callable[[int, int, str], None]

# The temporary arrays of one block in one thread, and Python with NumPy.
_BLOCK_MEMORY = 48 * BLOCK_ELEMENTS
_BASE_MEMORY = 64 << 20


def convert_weights(
    source: Path,
    scheme: Scheme,
    output: Path,
    specs: Sequence[ParameterSpec],
    ignored: Sequence[str] = (),
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a Hugging Face folder's weights: `plan_conversion`, then `ConversionPlan.run`."""
    return plan_conversion(source, scheme, output, specs, ignored).run(progress)


def plan_conversion(
    source: Path,
    scheme: Scheme,
    output: Path,
    specs: Sequence[ParameterSpec],
    ignored: Sequence[str] = (),
) -> "ConversionPlan":
    """Check a conversion as far as headers and sizes tell, before any work is done.

    Args:
        source: a Hugging Face folder, or the config.json in it.
        output: the folder to write to; other files in it stay.
        specs: the model's parameters.
        ignored: fnmatch patterns of tensors that may stay unused.

    Raises:
        CheckpointError: no readable float weights, or not those of this model.
        WeightsError: `output` cannot be where it is, or its disk is too full.
    """
    _check_output(_folder(source), output)
    checkpoint = open_float_checkpoint(source)
    specs = _fitting(checkpoint, specs, ignored)
    position = {name: i for i, name in enumerate(checkpoint.tensors)}
    parameters = [_Parameter.of(spec, scheme, checkpoint) for spec in specs]
    parameters.sort(key=lambda parameter: position[parameter.tensors[0].name])
    plan = ConversionPlan(scheme, output, tuple(parameters))
    plan.check_disk_space()
    return plan


def open_float_checkpoint(source: Path) -> Checkpoint:
    """List the weights of a Hugging Face folder, or of the folder of a config.json.

    Raises:
        CheckpointError: there are none that can be read, or they are quantized in a way that
            `decoded_tensors` does not know.
    """
    folder = _folder(source)
    refuse_by_files(folder)
    checkpoint = Checkpoint.open(folder)
    tensors = decode_tensors(folder, checkpoint.tensors)
    refuse_by_tensors(tensors)
    return Checkpoint(folder, checkpoint.files, tensors)


def _folder(source: Path) -> Path:
    return source.parent if source.is_file() else source


@dataclass(frozen=True)
class _Parameter:
    """A parameter with the tensors it is made of, and what it is stored as.

    `columns` is the length of a row: what shares scales if it is quantized, or comes from one row
    of an expert's matrix, else everything after the first axis.
    """

    spec: ParameterSpec
    quant: GroupQuant | None
    tensors: tuple[StoredTensor, ...]
    stored: dict[str, tuple[tuple[int, ...], str]]
    columns: int

    @classmethod
    def of(cls, spec: ParameterSpec, scheme: Scheme, checkpoint: Checkpoint) -> "_Parameter":
        quant = scheme.for_role(spec.role)
        tensors = tuple(checkpoint.tensors[source.name] for source in spec.sources)
        assert sum(source.size for source in spec.sources) == math.prod(spec.shape), spec
        by_row = quant is not None or spec.role == "expert"
        columns = spec.shape[-1] if by_row else math.prod(spec.shape[1:])
        return cls(spec, quant, tensors, scheme.storage(spec), columns)

    @property
    def source_bytes(self) -> int:
        # Of several parameters' tensor, their share.
        pairs = zip(self.spec.sources, self.tensors, strict=True)
        return sum(tensor.nbytes * source.size // tensor.size for source, tensor in pairs)

    @property
    def block_bytes(self) -> int:
        """The most memory that converting a block of rows takes besides what is stored."""
        return _BLOCK_MEMORY + max(
            # Elements in another order are read, and copied into order, all at once.
            (8 * math.prod(source.part_shape) for source in self.spec.sources if source.view),
            default=0,
        )

    @property
    def stored_bytes(self) -> int:
        return sum(math.prod(s) * _numpy_dtype(d).itemsize for s, d in self.stored.values())

    def empty(self) -> dict[str, np.ndarray]:
        """The arrays to fill, by the name they are stored under."""
        return {n: np.empty(shape, _numpy_dtype(d)) for n, (shape, d) in self.stored.items()}

    def blocks(self) -> Iterator[tuple[Source, StoredTensor, int, int, int]]:
        """Rows to convert at a time: source, tensor, first, past the last, first in the whole."""
        before = 0
        for source, tensor in zip(self.spec.sources, self.tensors, strict=True):
            rows = source.size // max(1, self.columns)
            # Elements in another order are read all at once.
            step = block_rows(self.columns) if source.view is None else max(1, rows)
            for first in range(0, rows, step):
                yield source, tensor, first, min(first + step, rows), before + first
            before += rows

    def convert(
        self,
        arrays: dict[str, np.ndarray],
        source: Source,
        tensor: StoredTensor,
        first: int,
        last: int,
        row: int,
    ) -> "_Converted":
        """Convert rows first .. last of a source into `arrays`, from row `row` on."""
        if source.view is None:
            before = (source.index or 0) * source.size
            read = tensor.read(before + first * self.columns, before + last * self.columns)
        elif source.index is None:
            read = tensor.read(0, tensor.size).reshape(tensor.shape)
        else:
            read = tensor.part(source.index)
        if source.is_changed:
            read = source.part_values(read)
        values = read.reshape(-1, self.columns)
        total = _Converted(tensor.nbytes * values.size // tensor.size, 0.0, 0.0, 0.0)
        step = block_rows(self.columns)
        for start in range(0, len(values), step):
            block = values[start : start + step]
            total += self._store(arrays, block, row + start, tensor.name)
        return total

    def _store(
        self, arrays: dict[str, np.ndarray], values: np.ndarray, row: int, name: str
    ) -> "_Converted":
        """Convert rows into `arrays`, from row `row` on; what was read is not counted."""
        if self.quant is not None:
            parts = {name.rpartition(".")[2]: array for name, array in arrays.items()}
            decoded = self.quant.write_rows(parts, row, values, name)
        else:
            (array,) = arrays.values()
            stored = cast(values, array.dtype.name, name)
            array.reshape(-1, self.columns)[row : row + len(stored)] = stored
            if np.can_cast(values.dtype, stored.dtype, "safe"):
                return _Converted(0, 0.0, 0.0, 0.0)
            decoded = stored.astype(np.float32)
        wide = np.dtype(np.float64 if values.dtype == np.float64 else np.float32)
        exact = values.astype(wide)
        error = decoded - exact
        largest = float(np.abs(error).max(initial=0))
        return _Converted(0, _sum_of_squares(error), _sum_of_squares(exact), largest)


@dataclass(frozen=True)
class _Converted:
    """Of some rows."""

    source_bytes: int
    error_squares: float
    value_squares: float
    max_error: float

    def __add__(self, other: "_Converted") -> "_Converted":
        return _Converted(
            self.source_bytes + other.source_bytes,
            self.error_squares + other.error_squares,
            self.value_squares + other.value_squares,
            max(self.max_error, other.max_error),
        )


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion that has been checked; `run` does it. Sizes are in bytes."""

    scheme: Scheme
    output: Path
    parameters: tuple[_Parameter, ...]  # in writing order, which is the checkpoint's

    @property
    def source_bytes(self) -> int:
        """What will be read of the checkpoint."""
        return sum(parameter.source_bytes for parameter in self.parameters)

    @property
    def source_parameters(self) -> int:
        """Weights in the model."""
        return sum(math.prod(parameter.spec.shape) for parameter in self.parameters)

    @property
    def stored_bytes(self) -> int:
        """All tensors as stored."""
        return sum(parameter.stored_bytes for parameter in self.parameters)

    @property
    def memory_estimate(self) -> int:
        """What this process has now, the largest parameter as stored, a shard, and some blocks."""
        largest = max((parameter.stored_bytes for parameter in self.parameters), default=0)
        block = max((parameter.block_bytes for parameter in self.parameters), default=0)
        before = current_memory() or _BASE_MEMORY
        return before + largest + SHARD_BYTES + block * _thread_count()

    @property
    def disk_estimate(self) -> int:
        """All tensors with padding, and the indexes."""
        tensors = sum(len(parameter.stored) for parameter in self.parameters)
        return self.stored_bytes + tensors * (ALIGNMENT + 2 * 400) + 4096

    def check_disk_space(self) -> int:
        """Bytes free where the output goes.

        Raises:
            WeightsError: fewer than are needed. A container that will be replaced is there until
                the end, so its space does not count.
        """
        absolute = self.output.absolute()
        existing = next(path for path in (absolute, *absolute.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < self.disk_estimate:
            raise WeightsError(
                f"{self.output}: converting to {self.scheme.name} writes "
                f"{format_bytes(self.disk_estimate)}, and its disk has {format_bytes(free)} free"
            )
        return free

    def run(self, progress: Progress | None = None) -> ConversionReport:
        """Convert everything.

        Raises:
            CheckpointError: a tensor with NaN, infinity or a value beyond the scheme's dtype. The
                output then has what it had before.
        """
        started = time.perf_counter()
        done, errors = 0, []

        def advance(parameter: _Parameter, nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, self.source_bytes, parameter.spec.name)

        with ContainerWriter(self.output) as writer, ThreadPoolExecutor(_thread_count()) as threads:
            try:
                for parameter in self.parameters:
                    arrays = parameter.empty()
                    errors.append(_fill(parameter, arrays, threads, advance))
                    for name in parameter.stored:
                        writer.add(name, arrays.pop(name))
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
            writer.finish(self.source_parameters)
        return ConversionReport(
            self.scheme.name,
            self.source_bytes,
            self.stored_bytes,
            self.source_parameters,
            writer.shard_count,
            time.perf_counter() - started,
            peak_memory(),
            tuple(errors),
        )


def _fill(
    parameter: _Parameter,
    arrays: dict[str, np.ndarray],
    threads: ThreadPoolExecutor,
    advance: Callable[[_Parameter, int], None],
) -> ParameterError:
    """Convert all blocks of a parameter; results are added up in order, whoever is first."""
    total = _Converted(0, 0.0, 0.0, 0.0)
    for block in threads.map(lambda job: parameter.convert(arrays, *job), parameter.blocks()):
        total += block
        advance(parameter, block.source_bytes)
    reference = total.value_squares
    relative = math.sqrt(total.error_squares / reference) if reference else 0.0
    spec = parameter.spec
    return ParameterError(spec.name, spec.shape, parameter.stored_bytes, total.max_error, relative)


def _sum_of_squares(rows: np.ndarray) -> float:
    """Of [r, c] values; the few additions in float32 are far more exact than is ever printed."""
    total = float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))
    return total if math.isfinite(total) else float(np.square(rows, dtype=np.float64).sum())


def _check_output(folder: Path, output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise WeightsError(f"{output} is a file, expected a folder to write to")
    if folder.resolve() in (output.resolve(), *output.resolve().parents):
        raise WeightsError(
            f"{output} lies in the checkpoint's own folder {folder}; choose an output outside it"
        )


def _fitting(
    checkpoint: Checkpoint, specs: Sequence[ParameterSpec], ignored: Sequence[str]
) -> list[ParameterSpec]:
    """The parameters with their sources under the checkpoint's own names, if all are there."""
    specs = found_in(specs, checkpoint.tensors)
    sources = {source.name: source for spec in specs for source in spec.sources}
    missing = [name for name in sources if name not in checkpoint.tensors]
    twice = [
        f"{name} and {other}"
        for name, source in sources.items()
        for other in source.other_names
        if name in checkpoint.tensors and other in checkpoint.tensors
    ]
    wanted = {name for source in sources.values() for name in (*source.names, *source.twins)}
    unused = [
        name
        for name in checkpoint.tensors
        if name not in wanted and not any(fnmatchcase(name, pattern) for pattern in ignored)
    ]
    misshapen = [
        f"{name}: {list(checkpoint.tensors[name].shape)}, expected {list(source.shape)}"
        for name, source in sources.items()
        if name in checkpoint.tensors and checkpoint.tensors[name].shape != source.shape
    ]
    kinds = (
        ("missing", missing),
        ("under two names", twice),
        ("unused", unused),
        ("of another shape", misshapen),
    )
    faults = [f"{len(names)} {kind} ({shorten(names)})" for kind, names in kinds if names]
    if faults:
        raise CheckpointError(
            f"{checkpoint.folder}: checkpoint does not fit the model: {', '.join(faults)}. "
            f"{_advice(specs, missing, sources)}"
        )
    for name in sources:
        checkpoint.tensors[name].check_readable()
    for source in sources.values():
        _check_twins(checkpoint, source)
    return specs


def _advice(
    specs: Sequence[ParameterSpec], missing: Sequence[str], sources: Mapping[str, Source]
) -> str:
    """What a user may look at, for an error that names the missing tensors."""
    others = {s.name for spec in specs if spec.role != "lm_head" for s in spec.sources}
    if missing and others.isdisjoint(missing):
        advice = (
            'If the embedding is the head, too, set "tie_word_embeddings" to true in config.json; '
            "else the folder lacks the head of a language model"
        )
    else:
        advice = "Is config.json from the same revision?"
    if missing and (tried := sources[missing[0]].other_names):
        advice += f" (sought {missing[0]} also as {', '.join(tried)})"
    return advice


def _check_twins(checkpoint: Checkpoint, source: Source) -> None:
    """Raise CheckpointError if a tensor that is tied to this one differs from it."""
    tensor = checkpoint.tensors[source.name]
    for name in source.twins:
        twin = checkpoint.tensors.get(name)
        if twin is None or (twin.file, twin.offset) == (tensor.file, tensor.offset):
            continue
        step = BLOCK_ELEMENTS
        same = twin.shape == tensor.shape and all(
            np.array_equal(tensor.read(i, end), twin.read(i, end))
            for i in range(0, tensor.size, step)
            for end in (min(i + step, tensor.size),)
        )
        if not same:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} differs from {source.name}, and config.json says "
                'that they are one (tie_word_embeddings). Set "tie_word_embeddings" to false in '
                "config.json if the head is meant, or delete the tensor that is not"
            )


def _numpy_dtype(name: str) -> np.dtype:
    return FLOAT_DTYPES.get(name) or np.dtype(name)


def _thread_count() -> int:
    """Enough to keep a disk busy; more would only take memory."""
    return min(4, os.cpu_count() or 1)
