"""Finds the `Tuning` that is fastest for a model's matrices on this machine.

Candidates are measured in turns, on weights that lie in memory and not in the cache, and weighted
as a step weighs them: each matrix as often as the model has it. What isn't clearly faster than the
default is not taken, so that two runs end with the same parameters unless the machine differs.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from relaxlm.compiler.kernels import tuning
from relaxlm.compiler.kernels.cpu_rounded import rounded_matmul_kernel, supports
from relaxlm.compiler.kernels.isa import Isa, dot_products
from relaxlm.compiler.kernels.packed import FEW
from relaxlm.compiler.kernels.rounding import Rounding
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.tuning import Tuning
from relaxlm.compiler.request import CompileRequest
from relaxlm.errors import ConfigError
from relaxlm.models import parameter_specs
from relaxlm.runtime import tvm_runtime

AHEAD = (1024, 2048, 4096, 8192, 16384)
TASK_ROWS = (128, 256, 512, 1024)
# Of a long prompt.
ROWS = 1024
# A candidate has to be this much faster than the default.
CLEARLY = 1.02
# Bytes of weights that are read before any of them is read again.
RESIDENT = 256 << 20
LEAST_ROUNDS = 5

Report = Callable[[str], None]
_Shapes = Mapping[tuple[StoredMatrix, int], int]  # matrix and rows of x -> how often


@dataclass(frozen=True)
class Sample:
    """One measurement: a matrix [n, k] by `rows` of x."""

    parameter: str
    value: int
    n: int
    k: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class Found:
    """What a search ended with, and all that it measured."""

    tuning: Tuning
    samples: list[Sample]

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(sample) for sample in self.samples]


class Search:
    """Of one model's matrices on this machine's CPU.

    Args:
        request: of the model.
        seconds: that each comparison takes.
        report: told of every comparison.

    Raises:
        ConfigError: the preset's matrices have no kernels with parameters here.
    """

    def __init__(self, request: CompileRequest, seconds: float, report: Report) -> None:
        self.seconds, self.report = seconds, report
        self.target = request.device.tvm_target(request.options.opt_level)
        isa = dot_products(self.target)
        matrices = Counter[StoredMatrix]()
        specs = parameter_specs(request.config)
        tied = not any(spec.role == "lm_head" for spec in specs)
        for spec in specs:
            if spec.role in ("linear", "embedding" if tied else "lm_head"):
                n, k = spec.shape
                quant = getattr(request.scheme, spec.role)
                matrix = StoredMatrix(n, k, quant, request.scheme.dtype)
                matrices[matrix] += 1
                if spec.role != "linear":
                    self.head = matrix
        self.matrices = {m: count for m, count in matrices.items() if isa and supports(m, isa)}
        if isa is None or not self.matrices:
            raise ConfigError(
                f"nothing to tune: {request.scheme.name} has no kernels with parameters on this CPU"
            )
        self.isa: Isa = isa
        self._samples: list[Sample] = []

    def run(self) -> Found:
        """Search one parameter after the other."""
        one = {(matrix, 1): count for matrix, count in self.matrices.items()}
        best = self._fastest("ahead", Tuning(), AHEAD, one)
        if self.isa == "amx":
            # A prompt passes everything but the head.
            many = {(m, ROWS): count for (m, _), count in one.items() if m != self.head}
            best = self._fastest("task_rows", best, TASK_ROWS, many)
        return Found(best, self._samples)

    def _fastest(
        self, parameter: str, start: Tuning, values: Sequence[int], shapes: _Shapes
    ) -> Tuning:
        """`start` with one parameter at its best."""
        candidates = {value: replace(start, **{parameter: value}) for value in values}
        total = dict.fromkeys(values, 0.0)
        for (matrix, rows), count in shapes.items():
            for value, seconds in self._compare(parameter, matrix, rows, candidates).items():
                total[value] += count * seconds
        fastest = min(total, key=total.__getitem__)
        default = getattr(start, parameter)
        return candidates[fastest if total[default] > CLEARLY * total[fastest] else default]

    def _compare(
        self, parameter: str, matrix: StoredMatrix, rows: int, candidates: dict[int, Tuning]
    ) -> dict[int, float]:
        """Seconds of one product by candidate."""
        import tvm

        functions = {}
        for value, candidate in candidates.items():
            with tuning.use(candidate), self.target:
                kernel = rounded_matmul_kernel(matrix, self.isa)
            functions[f"candidate_{value}"] = kernel.with_attr(
                "global_symbol", f"candidate_{value}"
            )
        library = tvm.compile(tvm.IRModule(functions), target=self.target)
        inputs = _Inputs(matrix, self.isa, rows)
        calls = [(lambda kernel=library[name]: inputs.run(kernel)) for name in functions]
        seconds = [found / inputs.copies for found in _in_turns(calls, self.seconds)]
        for value, found in zip(candidates, seconds, strict=True):
            self._samples.append(Sample(parameter, value, matrix.n, matrix.k, rows, found))
        best = min(seconds)
        self.report(
            f"{parameter} [{matrix.n}, {matrix.k}], {rows} rows of x:  "
            + "  ".join(
                f"{value}: {best / found:.2f}"
                for value, found in zip(candidates, seconds, strict=True)
            )
        )
        return dict(zip(candidates, seconds, strict=True))


class _Inputs:
    """Of a kernel: several copies of the weights, and rows of zeros, which take as long as any."""

    def __init__(self, matrix: StoredMatrix, isa: Isa, rows: int) -> None:
        assert matrix.quant is not None
        rng = np.random.default_rng(0)
        words = rng.integers(0, 2**32, matrix.word_shape, np.uint32)
        if matrix.quant.bits == 4:
            words &= np.uint32(0xEEEEEEEE)  # 15 is no code
        scale = np.full(matrix.scale_shape, 0.01, matrix.dtype)
        # Many rows take long, and use what they have read many times.
        wanted = RESIDENT if rows <= FEW else 0
        self.copies = max(1, wanted // (words.nbytes + scale.nbytes))
        self.weights = [(_tensor(words), _tensor(scale)) for _ in range(self.copies)]
        self.x = _tensor(np.zeros((rows, Rounding(matrix.k, isa).row_words), np.int32))
        self.out = _tensor(np.zeros((rows, matrix.n), np.float32))

    def run(self, kernel: Any) -> None:
        """Multiply with every copy."""
        for words, scale in self.weights:
            kernel(self.x, words, scale, self.out)


def _in_turns(calls: Sequence[Callable[[], None]], seconds: float) -> list[float]:
    """Median seconds of each call."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < LEAST_ROUNDS:
        for call, samples in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
    return [statistics.median(samples) for samples in times]


def _tensor(array: np.ndarray) -> Any:
    """A copy at an address that kernels take."""
    room = np.empty(array.nbytes + 4096, np.uint8)
    start = -room.ctypes.data % 4096
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return tvm_runtime.share(copy)
