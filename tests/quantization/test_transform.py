"""The IR transform of a scheme: what becomes of parameters, and that it computes the same."""

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op, spec
from tvm_ffi import structural_equal

from relaxlm.models.weights import ParameterSpec
from relaxlm.quantization.groupwise import FLOAT_DTYPES
from relaxlm.quantization.schemes import SCHEMES, get_scheme
from relaxlm.quantization.transform import DEQUANTIZE, QuantizeParameters, format_tag, read_tag
from tests.expression import bindings, written_out

HIDDEN, OUT, VOCAB = 50, 7, 11  # rows that end inside a group and inside a word
SPECS = [
    ParameterSpec("table.weight", (VOCAB, HIDDEN), "embedding", ()),
    ParameterSpec("up.weight", (OUT, HIDDEN), "linear", ()),
    ParameterSpec("up.bias", (OUT,), "vector", ()),
]


class Small(nn.Module):
    """An embedding that is used twice, as in models with tied embeddings, and a linear layer."""

    def __init__(self) -> None:
        self.table = nn.Embedding(VOCAB, HIDDEN)
        self.up = nn.Linear(HIDDEN, OUT, bias=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return op.concat([self.up(x), op.matmul(x, op.permute_dims(self.table.weight))], dim=1)

    def embed(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def small_module(dtype: str = "float32") -> tvm.IRModule:
    model = Small()
    model.to(dtype)
    method = {"ids": spec.Tensor(["n"], "int32"), "$": {"param_mode": "plain"}}
    method["$"]["effect_mode"] = "none"
    module, _ = model.export_tvm(spec={"forward": method, "embed": method})
    return module


def quantized(scheme: str, dtype: str = "float32") -> tvm.IRModule:
    return QuantizeParameters(SPECS, get_scheme(scheme), dtype)(small_module(dtype))


def test_a_parameter_becomes_what_its_scheme_stores_and_a_dequantize_where_it_is_used() -> None:
    assert written_out(small_module()["forward"]) == (
        "concat((add(matmul(take(table.weight, ids), permute_dims(up.weight)), up.bias), "
        "matmul(take(table.weight, ids), permute_dims(table.weight))))"
    )
    table = "@dequantize(table.q_weight, table.q_scale)"
    up = "@dequantize(up.q_weight, up.q_scale)"
    assert written_out(quantized("q4f16_1")["forward"]) == (
        f"concat((add(matmul(take({table}, ids), permute_dims({up})), astype(up.bias)), "
        f"matmul(take({table}, ids), permute_dims({table}))))"
    )
    assert written_out(quantized("q4f16_2")["forward"]) == (
        f"concat((add(matmul(take(astype(table.weight), ids), permute_dims({up})), "
        "astype(up.bias)), matmul(take(astype(table.weight), ids), "
        "permute_dims(astype(table.weight)))))"
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parameters_have_the_names_shapes_and_dtypes_of_the_scheme(scheme: str, dtype: str) -> None:
    module = quantized(scheme, dtype)
    stored = {
        name: expected
        for parameter in SPECS
        for name, expected in get_scheme(scheme).storage(parameter).items()
    }
    for name in ("forward", "embed"):
        function = module[name]
        assert int(function.attrs["num_input"]) == 1
        found = {
            param.name: (tuple(map(int, param.ty.shape)), str(param.ty.dtype))
            for param in function.params[1:]
        }
        assert found == stored, name
        assert str(function.ret_ty.dtype) == dtype  # activations are as before


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_parameter_is_converted_once_in_a_function_however_often_it_is_used(scheme: str) -> None:
    converted = [
        value.args[1].fields[0].name if value.op.name == "relax.call_tir" else value.args[0].name
        for value in bindings(quantized(scheme)["forward"]).values()
        if isinstance(value, relax.Call) and value.op.name in ("relax.call_tir", "relax.astype")
    ]
    assert len(converted) == len(set(converted))


def test_the_format_of_a_dequantize_can_be_read_from_the_ir() -> None:
    for scheme in SCHEMES.values():
        formats = {scheme.linear, scheme.embedding} - {None}
        module = quantized(scheme.name)
        tags = {
            str(function.attrs[DEQUANTIZE])
            for _, function in module.functions_items()
            if function.attrs and DEQUANTIZE in function.attrs
        }
        assert {read_tag(tag) for tag in tags} == formats
        assert {format_tag(quant) for quant in formats if quant} == tags


def run(module: tvm.IRModule, ids: np.ndarray, params: list[np.ndarray]) -> np.ndarray:
    """Compile with TVM's own passes only, and call."""
    machine = relax.VirtualMachine(tvm.compile(module, target="llvm"), tvm.cpu())
    arguments = [tvm.runtime.tensor(array) for array in (ids, *params)]
    return machine["forward"](*arguments).numpy()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_both_sides_compute_the_same(scheme: str) -> None:
    rng = np.random.default_rng(9)
    floats, stored = [], []
    for parameter in SPECS:
        value = rng.standard_normal(parameter.shape).astype(np.float32)
        quant = get_scheme(scheme).for_role(parameter.role)
        if quant is None:
            stored.append(value.astype(FLOAT_DTYPES[get_scheme(scheme).dtype]))
            floats.append(stored[-1].astype(np.float32))
        else:
            arrays = quant.quantize(value)
            stored += arrays.values()
            floats.append(quant.dequantize(arrays, parameter.shape))
    ids = np.array([3, 0, 10, 3], np.int32)
    before, after = run(small_module(), ids, floats), run(quantized(scheme), ids, stored)
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", ["q4f16_1", "q0f16"])
def test_a_second_run_is_refused(scheme: str) -> None:
    with pytest.raises(ValueError, match="has QuantizeParameters run already") as raised:
        QuantizeParameters(SPECS, get_scheme(scheme), "float32")(quantized(scheme))
    first = {
        "q4f16_1": 'embed: parameter table.q_weight of type R.Tensor((11, 8), dtype="uint32")',
        "q0f16": 'embed: parameter table.weight of type R.Tensor((11, 50), dtype="float16")',
    }
    assert str(raised.value) == (
        f"{first[scheme]} is not a parameter of the model in float32; "
        "has QuantizeParameters run already?"
    )


def test_where_nothing_is_to_do_a_second_run_changes_nothing() -> None:
    once = quantized("q0f32")
    assert structural_equal(once, small_module())
    assert structural_equal(QuantizeParameters(SPECS, get_scheme("q0f32"), "float32")(once), once)


def test_a_parameter_of_another_model_is_refused() -> None:
    specs = [*SPECS[:1], ParameterSpec("up.weight", (OUT, HIDDEN + 1), "linear", ()), SPECS[2]]
    with pytest.raises(ValueError, match=r"^embed: parameter up\.weight of type R\.Tensor"):
        QuantizeParameters(specs, get_scheme("q4f16_1"), "float32")(small_module())
