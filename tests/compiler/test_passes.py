"""The lowering passes: what they make of the IR, and that a second run changes nothing.

That the compiled model still computes the same is shown by tests/models/test_parity.py and
test_quantized_parity.py, for every architecture, preset and cache format.
"""

import pytest
import tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op, spec
from tvm_ffi import structural_equal

from relaxlm import models
from relaxlm.compiler.passes.lower_embedding import LowerEmbedding
from relaxlm.compiler.passes.lower_matmul_cpu import LowerMatmulCPU
from relaxlm.compiler.passes.lower_paged_attention import LowerPagedAttention
from relaxlm.compiler.pipeline import (
    ATTENTION,
    Lowering,
    compute_dtype,
    lowering_passes,
    memory_passes,
)
from relaxlm.quantization.kv_cache import KV_FORMATS, get_kv_format
from relaxlm.quantization.schemes import SCHEMES, get_scheme
from relaxlm.quantization.transform import DEQUANTIZE
from tests.expression import bindings, written_out
from tests.models.parity import tiny_config
from tests.quantization.test_transform import quantized

# Few shapes of matrices, because parsing their kernels takes most of the time.
SIZES = {"hidden_size": 72, "intermediate_size": 64}
SMALL = tiny_config("llama", **SIZES, num_hidden_layers=1)
PLAIN = tiny_config("llama", **SIZES)
# Two layers with windows of their own: 0 and 19.
RAW = tiny_config("qwen2", **SIZES, use_sliding_window=True, sliding_window=19, max_window_layers=1)


def lowering(raw: dict = PLAIN, scheme: str = "q4f16_1", kv_format: str = "f32", kind: str = "cpu"):
    config = models.load_config(raw)
    specs = models.create(config).parameter_specs()
    return Lowering(config, specs, get_scheme(scheme), get_kv_format(kv_format), kind)


def lowered(
    plan: Lowering, until: str | None = None, target: tvm.target.Target | None = None
) -> tvm.IRModule:
    """A model after the passes up to and with `until`; None for all of them."""
    model = models.create(plan.config, compute_dtype(plan.kind, plan.scheme))
    module, _ = model.export_tvm(spec=model.export_spec())
    with target or tvm.target.Target({"kind": "llvm"}):
        for step in lowering_passes(plan):
            module = step(module)
            if step.info.name == until:
                break
    return module


def operators(module: tvm.IRModule) -> set[str]:
    """Names of the Relax operators that a module calls."""
    return {
        value.op.name
        for _, function in module.functions_items()
        if isinstance(function, relax.Function)
        for value in bindings(function).values()
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op)
    }


def names(module: tvm.IRModule) -> list[str]:
    return [name.name_hint for name in module.get_global_vars()]


# LowerEmbedding


def test_an_embedding_is_read_by_the_row_in_whatever_form_it_is_stored() -> None:
    expected = {
        "q4f16_1": "@embedding_lookup(ids, table.q_weight, table.q_scale)",
        "q4f16_2": "@embedding_lookup(ids, table.weight)",  # float16, cast row by row
        "q0f32": "@embedding_lookup(ids, table.weight)",
    }
    for scheme, text in expected.items():
        module = LowerEmbedding()(quantized(scheme))
        assert written_out(module["embed"]) == text
        assert str(module["embed"].ret_ty) == str(quantized(scheme)["embed"].ret_ty)


def test_a_tied_embedding_is_dequantized_as_a_head_only() -> None:
    module = LowerEmbedding()(quantized("q4f16_1"))
    lookup = "@embedding_lookup(ids, table.q_weight, table.q_scale)"
    table, up = (f"@dequantize({name}.q_weight, {name}.q_scale)" for name in ("table", "up"))
    assert written_out(module["forward"]) == (
        f"concat((add(matmul({lookup}, permute_dims({up})), astype(up.bias)), "
        f"matmul({lookup}, permute_dims({table}))))"
    )


class Taken(nn.Module):
    """Takes that are no lookups of an embedding."""

    def __init__(self) -> None:
        self.weight = nn.Parameter((5, 6))

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        columns = op.take(self.weight, ids, axis=1)
        return op.concat([columns, op.take(op.add(x, x), ids, axis=1)], dim=0)

    def rows(self, ids: Tensor, x: Tensor) -> Tensor:
        return op.take(op.add(x, x), ids, axis=0)


def test_other_takes_stay_as_they_are() -> None:
    model = Taken()
    model.to("float32")
    method = {"ids": spec.Tensor(["n"], "int32"), "x": spec.Tensor([5, 6], "float32")}
    method["$"] = {"param_mode": "plain", "effect_mode": "none"}
    module, _ = model.export_tvm(spec={"forward": method, "rows": method})
    assert structural_equal(LowerEmbedding()(module), module)


# LowerMatmulCPU


def test_a_matrix_is_multiplied_in_its_stored_form() -> None:
    expected = {
        "q4f16_0": ("up.q_weight, up.q_scale", "table.q_weight, table.q_scale"),
        "q3f16_1": ("up.q_weight, up.q_scale", "table.q_weight, table.q_scale"),
        "q4f16_2": ("up.q_weight, up.q_scale", "table.weight"),
        "q0bf16": ("up.weight", "table.weight"),
        "q0f32": ("up.weight", "table.weight"),
    }
    for scheme, (up, table) in expected.items():
        module = LowerMatmulCPU()(LowerEmbedding()(quantized(scheme)))
        x = f"@embedding_lookup(ids, {table})"
        bias = "up.bias" if scheme == "q0f32" else "astype(up.bias)"
        assert written_out(module["forward"]) == (
            f"concat((add(@matmul({x}, {up}), {bias}), @matmul({x}, {table})))"
        )


class Multiplied(nn.Module):
    """Products that are not activations times a stored matrix."""

    def __init__(self) -> None:
        self.weight = nn.Parameter((6, 6))

    def forward(self, x: Tensor) -> Tensor:
        scores = op.matmul(x, op.permute_dims(x))  # of activations alone
        plain = op.matmul(x, self.weight)  # not transposed
        return op.matmul(
            scores, op.matmul(plain, op.permute_dims(op.add(self.weight, self.weight)))
        )


def test_other_products_stay_as_they_are() -> None:
    model = Multiplied()
    model.to("float32")
    method = {"x": spec.Tensor(["n", 6], "float32")}
    method["$"] = {"param_mode": "plain", "effect_mode": "none"}
    module, _ = model.export_tvm(spec={"forward": method})
    assert structural_equal(LowerMatmulCPU()(module), module)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_weight_is_ever_written_out_as_a_dense_float_matrix_on_a_cpu(scheme: str) -> None:
    raw = {**SMALL, "tie_word_embeddings": scheme == "q4f16_0"}
    plan = lowering(raw, scheme)
    module = lowered(plan, until="LowerMatmulCPU")
    assert not {"relax.matmul", "relax.permute_dims", "relax.take"} & operators(module)
    for name, function in module.functions_items():
        assert DEQUANTIZE not in (function.attrs or {}), name

    weights = {parameter.shape for parameter in plan.specs if len(parameter.shape) > 1}
    weights |= {shape[::-1] for shape in weights}
    for name, function in lowered(plan).functions_items():
        if isinstance(function, relax.Function):
            for value in bindings(function).values():
                shapes = value.ty.shape if isinstance(value.ty, relax.TensorType) else None
                if isinstance(value, relax.Call) and all(
                    isinstance(extent, tvm.tirx.IntImm) for extent in shapes or ()
                ):
                    assert tuple(map(int, shapes or ())) not in weights, (name, value)


# LowerPagedAttention


def test_the_model_is_the_same_for_every_cache_format_until_attention_is_lowered() -> None:
    first, *others = (
        lowered(lowering(kv_format=name), until="QuantizeParameters") for name in KV_FORMATS
    )
    assert all(structural_equal(first, other) for other in others)
    assert "@relaxlm.paged_attention(cache, " in written_out(first["forward"])


@pytest.mark.parametrize(
    ("kv_format", "kind"),
    [
        *((name, kind) for name in ("bfloat16", "float8_e4m3") for kind in ("cpu", "cuda")),
        ("float16", "gpu"),  # of which some have no other 16 bits
    ],
)
def test_the_cache_becomes_tables_and_page_tensors(kv_format: str, kind: str) -> None:
    plan = lowering(kv_format=kv_format, kind=kind)
    before = lowered(plan, until="QuantizeParameters")
    module = lowered(plan, until="LowerPagedAttention")
    tables = ["slots", "row_offsets", "page_offsets", "page_ids", "kv_lengths", "dropped"]
    ends = {"forward": ["logit_positions"], "embeddings": ["rows"], "hidden_states": []}
    for name, rows in ends.items():
        function, count = module[name], int(module[name].attrs["num_input"])
        inputs = ["input_ids", "positions", *tables, *rows, "kv"]
        assert [param.name for param in function.params[:count]] == inputs
        old = before[name]
        parameters = list(old.params)[int(old.attrs["num_input"]) :]
        assert [param.name for param in function.params[count:]] == [p.name for p in parameters]
        assert str(function.ret_ty) == str(old.ret_ty)

    pages = module["copy_pages"].params[0].ty.fields
    expected = [(tensor.page_shape, tensor.dtype) for tensor in plan.page_tensors()] * 2
    found = [(tuple(map(int, list(page.shape)[1:])), str(page.dtype)) for page in pages]
    assert found == expected  # of two layers
    assert len(expected) == (8 if kv_format == "float8_e4m3" else 4)


def test_layers_share_kernels_where_their_attention_is_the_same() -> None:
    for raw, kernels in ((PLAIN, 1), (RAW, 2)):
        module = lowered(lowering(raw), until="LowerPagedAttention")
        found = [name for name in names(module) if name.startswith("paged_attention")]
        assert len(found) == kernels, found
        assert [name for name in names(module) if name.startswith("append")] == ["append_to_pages"]


def test_copies_go_through_every_tensor_of_every_layer() -> None:
    module = lowered(lowering(kv_format="fp8"), until="LowerPagedAttention")
    copies = ", ".join(f"@copy(kv[{i}], sources, targets)" for i in range(8))
    assert written_out(module["copy_pages"]) == f"({copies})"


# ShareTensors


def test_layers_use_the_same_tensors() -> None:
    made = []
    for layers in (3, 5):
        plan = lowering({**SMALL, "num_hidden_layers": layers})
        module = tvm.transform.Sequential(memory_passes())(lowered(plan))
        calls = [
            value
            for value in bindings(module["forward"]).values()
            if isinstance(value, relax.Call)
            and value.op == tvm.ir.Op.get("relax.memory.alloc_tensor")
        ]
        made.append(len(calls))
        assert len({str(call.args) for call in calls}) == len(calls)
    assert made[0] == made[1] > 5


# ScheduleCPU


def test_what_has_no_kernel_of_its_own_runs_on_all_threads() -> None:
    module = lowered(lowering(SMALL))
    loops = {
        name.name_hint: function.script()
        for name, function in module.functions_items()
        if isinstance(function, tvm.tirx.PrimFunc)
    }
    for name in ("embedding_lookup", "rope_cos", "rope_sin", "take_rows"):
        assert "T.parallel(" in loops[name], name


# All of them


@pytest.mark.parametrize("scheme", ["q0f16", "q4f16_0", "q4f16_1"])
def test_a_second_run_changes_nothing(scheme: str) -> None:
    plan = lowering(scheme=scheme, kv_format="fp8")
    module = lowered(plan, until="LowerMatmulCPU")
    attention = LowerPagedAttention(plan.config, plan.kv_format, ATTENTION["cpu"])
    for again in (LowerEmbedding(), LowerMatmulCPU(), attention):
        assert structural_equal(again(module), module), again.info.name
