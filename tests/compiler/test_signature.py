"""The parameters of a step: pages of the layers that attend, states of those that recur."""

from typing import cast

import pytest
from tvm import relax

from relaxlm.compiler.build import _planned_layers
from relaxlm.compiler.kernels.attention import PageTensor
from relaxlm.compiler.passes.signature import PagedSignature
from relaxlm.models.config import DecoderConfig, StateTensor

KEYS, VALUES = PageTensor("k", (2, 16, 16), "float16"), PageTensor("v", (2, 8, 16), "float16")
SHIFT, SCAN = StateTensor("shift", (64,), "float16"), StateTensor("scan", (4, 8, 16))


class Layers:
    """A configuration, as far as it says what layers keep: (a)ttention, (r)ecurrent or (b)oth."""

    def __init__(self, kinds: str) -> None:
        self.kinds, self.num_hidden_layers = kinds, len(kinds)

    def has_pages(self, layer: int) -> bool:
        return self.kinds[layer] in "ab"

    def layer_states(self, layer: int) -> tuple[StateTensor, ...]:
        return {"a": (), "r": (SHIFT, SCAN), "b": (SCAN,)}[self.kinds[layer]]


def config(kinds: str) -> DecoderConfig:
    return cast(DecoderConfig, Layers(kinds))


def test_each_layer_finds_its_own_tensors() -> None:
    made = PagedSignature(config("rabr"), (KEYS, VALUES))
    assert made.page_index == {1: 0, 2: 2}
    assert made.state_index == {
        (0, "shift"): 0,
        (0, "scan"): 1,
        (2, "scan"): 2,
        (3, "shift"): 3,
        (3, "scan"): 4,
    }

    def types(kinds: relax.TupleType) -> list[tuple]:
        first = [t.shape[0].name for t in kinds.fields]
        rest = [(*map(int, list(t.shape)[1:]), str(t.dtype)) for t in kinds.fields]
        return [(name, *extents) for name, extents in zip(first, rest, strict=True)]

    keys, values = ("pages", 2, 16, 16, "float16"), ("pages", 2, 8, 16, "float16")
    assert types(made.page_type()) == [keys, values] * 2
    shift, scan = ("state_slots", 64, "float16"), ("state_slots", 4, 8, 16, "float32")
    assert types(made.state_type()) == [shift, scan, scan, shift, scan]


def test_without_layers_of_a_kind_there_are_no_tensors_of_it() -> None:
    attending, recurrent = (PagedSignature(config(kinds), (KEYS,)) for kinds in ("aa", "rr"))
    assert len(attending.page_type().fields) == 2 and not attending.state_tensors
    assert len(recurrent.page_type().fields) == 0 and len(recurrent.state_type().fields) == 4


def test_tensors_that_a_model_does_not_use_as_its_configuration_says_are_a_mistake() -> None:
    made = PagedSignature(config("ar"), (KEYS, VALUES))
    made.kv = relax.Var("kv", made.page_type())
    made.states = relax.Var("states", made.state_type())

    def body(pages: list[int], states: list[int]) -> relax.Function:
        builder = relax.BlockBuilder()
        with builder.function("forward", [made.kv, made.states]):
            for var, items in ((made.kv, pages), (made.states, states)):
                for i in items:
                    last = builder.emit(relax.TupleGetItem(var, i))
            builder.emit_func_output(last)
        return builder.finalize()["forward"]

    made._check_complete(body([0, 1], [1, 0]))
    for pages, states, what in (([0], [0, 1], "kv"), ([0, 1], [0, 1, 1], "states")):
        with pytest.raises(AssertionError, match=f"{what}: the configuration has 2 tensors"):
            made._check_complete(body(pages, states))


@pytest.mark.parametrize(
    ("kinds", "planned"),
    [("aaaaaaaa", 3), ("aa", 2), ("rrra" * 3, 8), ("rrrrrrarrr", 7), ("rrrr", 3)],
)
def test_memory_is_planned_up_to_where_kinds_of_layers_repeat(kinds: str, planned: int) -> None:
    assert _planned_layers(config(kinds)) == planned
