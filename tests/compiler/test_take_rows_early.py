"""Rows are chosen as early as nothing changes but the work; tests/models show that logits stay."""

import pytest
from tvm import relax, te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op, spec
from tvm_ffi import structural_equal

from relaxlm import models
from relaxlm.compiler.passes.take_rows_early import TakeRowsEarly
from relaxlm.models.layers import take_rows
from tests.expression import bindings, written_out
from tests.models.parity import tiny_config


class Example(nn.Module):
    def __init__(self) -> None:
        self.weight = nn.Parameter((6, 8))
        self.scale = nn.Parameter((8,))

    def row_by_row(self, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        gate, up = op.split(op.rms_norm(x + y, self.scale, axes=[-1]), 2, axis=-1)
        z = op.matmul(op.concat([gate, up], dim=1), op.permute_dims(self.weight))
        return take_rows(op.silu(z) * z, rows)

    def across_rows(self, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return take_rows(op.softmax(x, axis=0), rows)

    def read_elsewhere(self, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        z = x + y
        return op.concat([take_rows(z, rows), op.sum(z, axis=0, keepdims=True)], dim=0)

    def parted(self, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        gate, up = op.split(x, 2, axis=-1)
        return op.concat([take_rows(op.silu(gate), rows), op.sum(up, axis=0, keepdims=True)], dim=0)


def export(*names: str):
    model = Example()
    model.to("float32")
    x, rows = spec.Tensor(["n", 8], "float32"), spec.Tensor(["m"], "int32")
    method = {"x": x, "y": x, "rows": rows, "$": {"param_mode": "plain", "effect_mode": "none"}}
    return model.export_tvm(spec=dict.fromkeys(names, method))[0]


def test_rows_are_chosen_before_what_treats_each_by_itself() -> None:
    module = TakeRowsEarly()(export("row_by_row"))
    # Concatenation is not on the list; what it takes is computed for all rows.
    norm = "split(rms_norm(add(x, y), scale))"
    product = f"matmul(@take_rows(concat(({norm}[0], {norm}[1])), rows), permute_dims(weight))"
    assert written_out(module["row_by_row"]) == f"multiply(silu({product}), {product})"


def test_what_mixes_rows_or_is_read_elsewhere_is_computed_before() -> None:
    before = export("across_rows", "read_elsewhere")
    module = TakeRowsEarly()(before)
    for name in ("across_rows", "read_elsewhere"):
        assert written_out(module[name]) == written_out(before[name])


def test_a_part_of_a_tuple_is_chosen_from_though_another_part_is_needed_whole() -> None:
    module = TakeRowsEarly()(export("parted"))
    chosen = "silu(@take_rows(split(x)[0], rows))"
    assert written_out(module["parted"]) == f"concat(({chosen}, sum(split(x)[1])))"


def exported(raw: dict):
    model = models.create(models.load_config(raw))
    return model.export_tvm(spec=model.export_spec())[0]


def test_the_last_layer_of_a_model_sees_the_chosen_rows_only() -> None:
    for model_type in ("llama", "qwen3"):
        before = exported(tiny_config(model_type, num_hidden_layers=2))
        after = TakeRowsEarly()(before)
        assert structural_equal(after["hidden_states"], before["hidden_states"])
        rows = [
            str(value.ty.shape[0])
            for value in bindings(after["forward"]).values()
            if getattr(getattr(value, "op", None), "name", "") == "relax.matmul"
        ]
        # qkv, o, gate and up, down; then the last layer's, of which qkv is for every token; logits.
        assert rows == ["n"] * 5 + ["m"] * 4
        # One pass is enough.
        assert written_out(TakeRowsEarly()(after)["forward"]) == written_out(after["forward"])


# One of every kind of block: norms of layers, plain MLPs, side by side, norms behind, scales.
KINDS = {
    "gpt2": {"n_inner": 112, "num_key_value_heads": 4},
    "gpt_neox": {"num_key_value_heads": 4, "use_parallel_residual": False},
    "phi": {"layer_norm_eps": 1e-5, "num_key_value_heads": 4},
    "starcoder2": {"norm_epsilon": 1e-5},
    "nemotron": {"norm_eps": 1e-5, "hidden_act": "relu2"},
    "gemma2": {"hidden_act": "gelu_pytorch_tanh"},
    "gemma3_text": {"hidden_activation": "gelu_pytorch_tanh", "sliding_window_pattern": 2},
    "glm4": {"partial_rotary_factor": 0.5},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.2},
    "cohere": {"layer_norm_eps": 1e-5},
}


@pytest.mark.parametrize("model_type", KINDS)
def test_after_the_last_attention_nothing_is_computed_for_all_rows(model_type: str) -> None:
    after = TakeRowsEarly()(exported(tiny_config(model_type, **KINDS[model_type])))
    values = list(bindings(after["forward"]).values())
    operators = [getattr(getattr(value, "op", None), "name", "") for value in values]
    attention = max(i for i, name in enumerate(operators) if name == "relax.call_dps_packed")
    names = [name for name in operators[attention + 1 :] if name]
    alone = [
        name
        for name, value in zip(operators[attention + 1 :], values[attention + 1 :], strict=True)
        if name and isinstance(value.ty, relax.TensorType) and str(value.ty.shape[0]) == "n"
    ]
    assert "relax.matmul" in names
    assert alone == ["relax.reshape"]  # the heads side by side, which costs nothing


def loop_nest(*, mixes: str = ""):
    """y[i] from x[i], or from rows that depend on more than i."""

    def compute(x: te.Tensor) -> te.Tensor:
        n, size = x.shape
        if mixes == "reversed":
            return te.compute((n, size), lambda i, j: x[n - 1 - i, j])
        if mixes == "sum":
            k = te.reduce_axis((0, n), "k")
            total = te.compute((size,), lambda j: te.sum(x[k, j], axis=k))
            return te.compute((n, size), lambda i, j: x[i, j] / total[j])
        if mixes == "neighbour":
            return te.compute((n, size), lambda i, j: x[i, j] + x[tirx.max(i - 1, 0), j])
        if mixes == "folded":
            doubled = te.compute((2 * n, size), lambda i, j: x[i // 2, j])
            return te.compute((n, size), lambda i, j: doubled[2 * i, j] + doubled[2 * i + 1, j])
        if mixes == "transposed":
            return te.compute((n, n), lambda i, j: x[j, 0] + x[i, 0])
        return te.compute((n, size), lambda i, j: x[i, j] * x[i, 0])

    class Model(nn.Module):
        def forward(self, x: Tensor, rows: Tensor) -> Tensor:
            return take_rows(op.tensor_expr_op(compute, "nest", [x]), rows)

    method = {"x": spec.Tensor(["n", 8], "float32"), "rows": spec.Tensor(["m"], "int32")}
    method |= {"$": {"param_mode": "plain", "effect_mode": "none"}}
    return Model().export_tvm(spec={"forward": method})[0]


def test_loop_nests_that_keep_rows_apart_are_told_from_those_that_mix_them() -> None:
    module = TakeRowsEarly()(loop_nest())
    assert written_out(module["forward"]) == "@nest(@take_rows(x, rows))"
    for mixes in ("reversed", "sum", "neighbour", "transposed", "folded"):
        module = TakeRowsEarly()(loop_nest(mixes=mixes))
        assert written_out(module["forward"]) == "@take_rows(@nest(x), rows)", mixes
