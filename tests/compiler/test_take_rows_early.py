"""Rows are chosen as early as nothing changes but the work; tests/models show that logits stay."""

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


def test_the_last_layer_of_a_model_sees_the_chosen_rows_only() -> None:
    for model_type in ("llama", "qwen3"):
        config = models.load_config(tiny_config(model_type, num_hidden_layers=2))
        model = models.create(config)
        before, _ = model.export_tvm(spec=model.export_spec())
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
