"""What a preset keeps of a checkpoint, compared with what a converted folder holds."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relaxlm.models.weights import ParameterSpec, found_in
from relaxlm.quantization.convert import open_float_checkpoint
from relaxlm.quantization.groupwise import GroupQuant, cast, round_to
from relaxlm.quantization.schemes import Scheme
from relaxlm.runtime.params import WeightFolder

# Values converted and compared at a time.
_BLOCK_VALUES = 1 << 22
# Another converter may choose the other code where a value lies between two.
_ROUNDED_SHARE = 0.01


@dataclass(frozen=True)
class WeightDifference:
    """A parameter of a folder that is not what the preset makes of the checkpoint.

    `share` of its values differ, by up to `max_error`. `rounding`: by one step at most, and of more
    than half a step only few, as when another program has converted the checkpoint.
    """

    name: str
    share: float
    max_error: float
    rounding: bool


def has_all(state: Mapping[str, Any], specs: list[ParameterSpec]) -> bool:
    """Whether transformers keeps every tensor as the checkpoint has it.

    Where it does not, it has all experts in one tensor, for example, or other names.
    """
    return all(source.name in state for spec in found_in(specs, state) for source in spec.sources)


def checkpoint_tensors(checkpoint: Path) -> dict[str, Any]:
    """Name -> float32 torch tensor of every weight of a Hugging Face folder.

    Raises:
        CheckpointError: they cannot be read.
    """
    import torch

    opened = open_float_checkpoint(checkpoint)
    return {name: torch.from_numpy(opened.read(name).astype(np.float32)) for name in opened.names()}


def keep_weights(
    state: Mapping[str, Any],
    specs: list[ParameterSpec],
    scheme: Scheme,
    weights: WeightFolder,
) -> list[WeightDifference]:
    """Replace a checkpoint's weights, in place, by what a preset keeps of them.

    Where the folder's values differ from that by rounding only, the folder's are taken.

    Args:
        state: name in the checkpoint -> float32 torch tensor: `Reference.state` where it has all
            (`has_all`), or else `checkpoint_tensors`.
        weights: a folder with the tensors that `scheme` stores.

    Returns:
        The parameters that differ, in model order.
    """
    specs = found_in(specs, state)
    differences = []
    for spec in specs:
        stored = _Stored(spec, scheme, weights)
        different = far = 0
        largest, within_a_step = 0.0, True
        for values, rows in _blocks(spec, state):
            found = stored.found(rows)
            expected, step = stored.expected(values)
            values[...] = expected
            error = np.abs(found - expected)
            different += int(np.count_nonzero(error))
            far += int(np.count_nonzero(error > 0.5 * step))
            within_a_step &= bool((error <= 1.05 * step).all())
            largest = max(largest, float(error.max(initial=0)))
        if different:
            size = math.prod(spec.shape)
            rounding = within_a_step and far <= _ROUNDED_SHARE * size
            differences.append(WeightDifference(spec.name, different / size, largest, rounding))
            if rounding:
                for values, rows in _blocks(spec, state):
                    values[...] = stored.found(rows)
    return differences


def _blocks(spec: ParameterSpec, state: Mapping[str, Any]) -> Iterator[tuple[np.ndarray, slice]]:
    """Rows of a parameter, [r, columns], and which rows they are.

    They are the reference's own memory, or are written back to it when the next ones are taken.
    """
    columns = spec.shape[-1] if len(spec.shape) > 1 else 1
    step, before = max(1, _BLOCK_VALUES // columns), 0
    for source in spec.sources:
        tensor = state[source.name].numpy()
        rows = source.values(tensor).reshape(-1, columns)
        for start in range(0, len(rows), step):
            values = rows[start : start + step]
            yield values, slice(before + start, before + start + len(values))
        if source.is_changed:
            source.put_back(tensor, rows)
        before += len(rows)


class _Stored:
    """One parameter in the form in which the folder stores it."""

    def __init__(self, spec: ParameterSpec, scheme: Scheme, weights: WeightFolder) -> None:
        self.spec, self.dtype = spec, scheme.plain_dtype(spec.role)
        self.quant: GroupQuant | None = scheme.for_role(spec.role)
        names = scheme.storage(spec)
        self.arrays = {name.rpartition(".")[2]: weights.load(name) for name in names}
        self.as_bfloat16 = any(weights.records[name].stored_as_bfloat16 for name in names)

    def found(self, rows: slice) -> np.ndarray:
        """What the folder's rows stand for, [r, columns] float32."""
        if self.quant is None:
            (array,) = self.arrays.values()
            columns = self.spec.shape[-1] if array.ndim > 1 else 1
            return array.reshape(-1, columns)[rows].astype(np.float32)
        by_row = {
            # Of experts, [E, N, columns], rows are numbered through.
            part: array[:, rows]
            if self.quant.layout == "KN"
            else array.reshape(-1, array.shape[-1])[rows]
            for part, array in self.arrays.items()
        }
        return self.quant.dequantize(by_row, (rows.stop - rows.start, self.spec.shape[-1]))

    def expected(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | float]:
        """What the preset makes of rows of the checkpoint, and the step between its values."""
        if self.quant is None:
            kept = cast(values, self.dtype, self.spec.name).astype(np.float32)
            return (round_to(kept, "bfloat16") if self.as_bfloat16 else kept), 0.0
        arrays = self.quant.quantize(values, self.spec.name)
        # Every code one above that of zero: a step.
        one = sum(
            (self.quant.max_int + 1) << i * self.quant.bits for i in range(self.quant.per_word)
        )
        ones = {**arrays, "q_weight": np.full_like(arrays["q_weight"], one)}
        shape = values.shape
        return self.quant.dequantize(arrays, shape), self.quant.dequantize(ones, shape)
