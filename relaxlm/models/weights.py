"""Which checkpoint tensors make up which parameter."""

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Role = Literal["linear", "expert", "embedding", "lm_head", "vector", "float32"]


@dataclass(frozen=True)
class Elementwise:
    """A function of every value, as float32, and its inverse."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Source:
    """One tensor of the Hugging Face checkpoint, or a part of one.

    Attributes:
        shape: in the checkpoint.
        index: the parameter's values are those at one place of the tensor's first axis, such as an
            expert's matrix of all of them; None where the whole tensor is the parameter's.
        view: its elements (at `index`) in the order of the parameter's rows, as a view of the array
            it gets (a transposition, heads along the first axis, or some of them); None where that
            is their order.
        order: the i-th piece of the parameter is the order[i]-th along the first axis of the view.
        shift: added to every value, for norms that are stored as what they differ from 1 by.
        function: applied to every value; None for none.
        other_names: what other checkpoints of the family call it. One checkpoint has one of them.
        twins: tensors that are tied to this one. They may be there, too, with the same values, or
            instead of it.
    """

    name: str
    shape: tuple[int, ...]
    view: Callable[[np.ndarray], np.ndarray] | None = None
    order: tuple[int, ...] | None = None
    shift: float = 0.0
    function: Elementwise | None = None
    other_names: tuple[str, ...] = ()
    twins: tuple[str, ...] = ()
    index: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All that it may be called."""
        return (self.name, *self.other_names)

    def found_in(self, names: Container[str]) -> "Source":
        """The same under the first of its names or its twins' that is there; itself if none."""
        there = [name for name in (*self.names, *self.twins) if name in names]
        if not there:
            return self
        others = tuple(name for name in self.names if name != there[0])
        return replace(self, name=there[0], other_names=others)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of what `view` gets."""
        return self.shape if self.index is None else self.shape[1:]

    @property
    def size(self) -> int:
        """How many values of the tensor are the parameter's."""
        if self.view is None:
            return math.prod(self.part_shape)
        return self.view(np.broadcast_to(np.float32(0), self.part_shape)).size

    @property
    def is_changed(self) -> bool:
        return self.view is not None or self.shift != 0 or self.function is not None

    def values(self, tensor: np.ndarray) -> np.ndarray:
        """What of the parameter a tensor of the checkpoint stands for, in row-major order."""
        return self.part_values(tensor if self.index is None else tensor[self.index])

    def part_values(self, part: np.ndarray) -> np.ndarray:
        """The same of what there is at `index`, or of some rows where there is no view."""
        found = part if self.view is None else np.ascontiguousarray(self.view(part))
        if self.order is not None:
            found = found[list(self.order)]
        if self.function is not None:
            found = self.function.forward(found.astype(np.float32))
        return found + found.dtype.type(self.shift) if self.shift else found

    def put_back(self, tensor: np.ndarray, values: np.ndarray) -> None:
        """Write `values`, as `self.values` returns them, into a tensor of the checkpoint."""
        part = tensor if self.index is None else tensor[self.index]
        place = part if self.view is None else self.view(part)
        chosen = slice(None) if self.order is None else list(self.order)
        values = values - values.dtype.type(self.shift)
        if self.function is not None:
            values = self.function.inverse(values)
        place[chosen] = values.reshape(place.shape)


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the compiled model, and where its values come from.

    `shape` is [out, in] for matrices, [experts, out, in] for those of experts. `sources` are
    concatenated along axis 0 in the order given, each a whole number of its rows, or of the rows of
    an expert's matrix. `role` decides how a quantization scheme stores it; a "vector" (norm, bias,
    router) is never quantized, and "float32" is stored so by every scheme. `other_sources` are what
    it is made of in checkpoints that are cut otherwise.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    sources: tuple[Source, ...]
    other_sources: tuple[tuple[Source, ...], ...] = ()

    def found_in(self, names: Container[str]) -> "ParameterSpec":
        """The same with the sources that are there, under the names that they have there."""
        for sources in (self.sources, *self.other_sources):
            found = tuple(source.found_in(names) for source in sources)
            if all(source.name in names for source in found):
                return replace(self, sources=found, other_sources=())
        return replace(self, sources=tuple(source.found_in(names) for source in self.sources))


def found_in(specs: Sequence[ParameterSpec], names: Container[str]) -> list[ParameterSpec]:
    """The parameters with their sources under the names that a checkpoint has."""
    return [spec.found_in(names) for spec in specs]
