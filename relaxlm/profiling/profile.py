"""Where the time of a step goes: per kernel and per layer, with what each has to read and compute.

Bytes are those of weights, cache, recurrent states and other tensors that a kernel must touch once,
whatever it really does; operations are the multiplications and additions of matrices, attention
and recurrences. Time outside kernels is that of a step nobody watches less that of its kernels: the
virtual machine's own work, Python's, and the copying of inputs and logits.
"""

import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import ml_dtypes  # noqa: F401  teaches NumPy the names bfloat16 and float8_e4m3fn
import numpy as np

from relaxlm.models import load_config, parameter_specs
from relaxlm.profiling.instrument import Argument, Call, Instrument
from relaxlm.profiling.session import Session
from relaxlm.profiling.work import is_scan_state, scan_operations
from relaxlm.runtime.metadata import LibraryMetadata

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_WARM_UP = 2
# Tokens that the steps before the rounds of a decoding profile append: of warming up, of recording
# and of the round that is under way.
ROOM = _WARM_UP + 2
_PACKED = re.compile(r"\.(q_)?(weight|scale|bias)$")


@dataclass
class Part:
    """A kernel, or a layer.

    Attributes:
        name: the kernel's, or the layer's.
        on: which parameters a kernel works on, without the layer; "" for those that have none.
        calls: in one step.
        seconds: of all of them.
        nbytes, operations: of all of them.
    """

    name: str
    on: str
    calls: int = 0
    seconds: float = 0.0
    nbytes: int = 0
    operations: int = 0


OfRounds = Callable[[Sequence[float]], float]


@dataclass
class StepProfile:
    """One kind of step.

    Attributes:
        title: what it is.
        tokens: new ones, of all its sequences.
        seconds: of the whole step, unwatched; the median of the rounds, or what else was asked for.
        kernels: the longest first.
        layers: in order; calls before and after them are "before" and "after".
        outside: seconds outside kernels.
    """

    title: str
    tokens: int
    seconds: float
    kernels: list[Part] = field(default_factory=list)
    layers: list[Part] = field(default_factory=list)
    outside: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def profile_prefill(
    session: Session, tokens: int, rounds: int, of_rounds: OfRounds = statistics.median
) -> StepProfile:
    """Profile the first chunk of a prompt.

    Args:
        of_rounds: makes one time of those of all rounds, for the step and for each call; `min`
            where other programs disturb.

    Raises:
        ContextOverflowError: longer than the library's chunk.
    """
    return _profile(
        session,
        f"prompt of {tokens} tokens",
        [(0, tokens)],
        lambda: session.prefill(tokens),
        rounds,
        of_rounds,
    )


def profile_decode(
    session: Session,
    context: int,
    batch: int,
    rounds: int,
    of_rounds: OfRounds = statistics.median,
) -> StepProfile:
    """Profile one step of `batch` sequences with `context` tokens each.

    Args:
        of_rounds: as of `profile_prefill`.
    """
    title = f"decode after {context} tokens" + (f", {batch} sequences" if batch > 1 else "")
    session.prepare(context, batch)
    # Later steps find a little more in the cache.
    return _profile(session, title, [(context, 1)] * batch, session.step, rounds, of_rounds)


def _profile(
    session: Session,
    title: str,
    sequences: Sequence[tuple[int, int]],
    step: Callable[[], object],
    rounds: int,
    of_rounds: OfRounds,
) -> StepProfile:
    instrument = Instrument(session.executor)
    for _ in range(_WARM_UP):
        step()
    with instrument.record() as calls:
        step()
    whole, watched = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        whole.append(time.perf_counter() - start)
        with instrument.measure() as seconds:
            step()
        assert len(seconds) == len(calls), "a step differs from the one before"
        watched.append(seconds)
    taken = [of_rounds(values) for values in zip(*watched, strict=True)]
    tokens, info = sum(new for _, new in sequences), session.executor.metadata
    return summarize(info, title, tokens, sequences, calls, taken, of_rounds(whole))


def summarize(
    info: LibraryMetadata,
    title: str,
    tokens: int,
    sequences: Sequence[tuple[int, int]],
    calls: Sequence[Call],
    seconds: Sequence[float],
    whole: float,
) -> StepProfile:
    """Add calls up.

    Args:
        sequences: (tokens in the cache before, new tokens) of each.
        seconds: of each call.
        whole: seconds of the whole step, unwatched.
    """
    costs = _Costs(info, sequences)
    kernels: dict[tuple[str, str], Part] = {}
    layers: dict[str, Part] = {}
    layer, last = "before", str(info.kv_cache.num_layers - 1)
    for call, taken in zip(calls, seconds, strict=True):
        nbytes, operations = costs.of(call)
        layer = _layer(call, layer, last)
        on = _on(call)
        for part in (
            kernels.setdefault((call.kernel, on), Part(call.kernel, on)),
            layers.setdefault(layer, Part(layer, "")),
        ):
            part.calls += 1
            part.seconds += taken
            part.nbytes += nbytes
            part.operations += operations
    ordered = sorted(kernels.values(), key=lambda part: -part.seconds)
    outside = max(0.0, whole - sum(seconds))
    return StepProfile(title, tokens, whole, ordered, list(layers.values()), outside)


class _Costs:
    """Bytes and operations of a call."""

    def __init__(self, info: LibraryMetadata, sequences: Sequence[tuple[int, int]]) -> None:
        config = load_config(info.model_config_json)
        self._matrices = {
            spec.name.removesuffix("weight"): spec
            for spec in parameter_specs(config)
            if len(spec.shape) == 2
        }
        self._page_size = info.kv_cache.page_size
        self._cached = sum(before + new for before, new in sequences)
        self._new = sum(new for _, new in sequences)
        pairs = sum(new * before + new * (new + 1) // 2 for before, new in sequences)
        # A product with a key and one with a value: a multiplication and an addition each.
        self._attention = 4 * config.num_attention_heads * config.head_dim * pairs
        self._cache_names = {tensor.name for tensor in info.kv_cache.tensors}
        self._state_names = {tensor.name for tensor in info.state.tensors}
        self._sequences = len(sequences)

    def of(self, call: Call) -> tuple[int, int]:
        *_, result = call.arguments
        matrix = next((m for m in map(self._matrix, call.arguments) if m is not None), None)
        # Token ids, where a product has rows of numbers.
        looks_up = matrix is not None and len(call.arguments[0].shape) == 1
        appends = "append" in call.kernel
        attends = not appends and any(a.name in self._cache_names for a in call.arguments)
        nbytes, operations = 0, self._attention if attends else 0
        for argument in call.arguments:
            if argument.name in self._cache_names:
                tokens = self._new if appends else self._cached
                nbytes += _nbytes(argument) // (argument.shape[0] * self._page_size) * tokens
            elif argument.name in self._state_names:  # of each sequence read, and written
                nbytes += _nbytes(argument) // argument.shape[0] * 2 * self._sequences
                if is_scan_state(argument.name):
                    operations += scan_operations(argument.shape[1:]) * self._new
            elif (looks_up and self._matrix(argument) is not None) or (
                argument.shape[1:] == result.shape[1:] and argument.shape[0] > result.shape[0]
            ):  # only the rows that become the result
                nbytes += _nbytes(argument) // argument.shape[0] * result.shape[0]
            else:
                nbytes += _nbytes(argument)
        if matrix is not None and not looks_up:
            operations += 2 * math.prod(matrix.shape) * result.shape[0]
        return nbytes, operations

    def _matrix(self, argument: Argument) -> Any:
        """The specification of the matrix that a parameter is (a part of), if it is one."""
        if not argument.name or len(argument.shape) != 2:  # a bias has the name of its matrix
            return None
        return self._matrices.get(_PACKED.sub(".", argument.name))


def _layer(call: Call, before: str, last: str) -> str:
    for argument in call.arguments:
        if found := _LAYER.search(argument.name):
            return found[1]
        if argument.name:  # the embedding, the last norm, the head
            return "after" if before in (last, "after") else "before"
    return before


def _on(call: Call) -> str:
    names = [_PACKED.sub("", a.name) for a in call.arguments if a.name]
    names = [_LAYER.sub(".", name).lstrip(".").removeprefix("model.layers.") for name in names]
    return ", ".join(dict.fromkeys(name.removeprefix("model.") for name in names))


def _nbytes(argument: Argument) -> int:
    return math.prod(argument.shape) * np.dtype(argument.dtype).itemsize
