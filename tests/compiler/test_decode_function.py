"""The function that CUDA graphs are made of does what `forward` does, in memory that stays."""

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm_ffi import structural_equal

from relaxlm.compiler.passes.add_decode import AddDecode
from relaxlm.compiler.passes.own_storage import UPPER_BOUND, OwnStorage
from relaxlm.compiler.pipeline import instruction_passes, memory_passes
from relaxlm.runtime.decode_steps import DECODE

CPU = {"kind": "llvm"}
BOUNDS = {"n": 40, "m": 5}


def module() -> tvm.IRModule:
    """y = silu(silu(x) @ w) [n, 24]; y and its first rows, as many as z has: [n, 24], [m, 24]."""
    builder = relax.BlockBuilder()
    n, m = tvm.tirx.Var("n", "int64"), tvm.tirx.Var("m", "int64")
    x = relax.Var("x", relax.TensorType((n, 16), "float32"))
    z = relax.Var("z", relax.TensorType((m, 24), "float32"))
    w = relax.Var("w", relax.TensorType((16, 24), "float32"))
    with builder.function("forward", [x, z, w], {"num_input": 2}):
        with builder.dataflow():
            product = builder.emit(relax.op.matmul(builder.emit(relax.op.nn.silu(x)), w))
            y = builder.emit(relax.op.nn.silu(product))
            total = builder.emit(relax.op.sum(y, axis=0, keepdims=True))
            out = builder.emit_output(builder.emit(relax.op.add(z, total)))
        builder.emit_func_output(out)
    with tvm.target.Target(CPU):
        return relax.transform.LegalizeOps()(builder.finalize())


def planned(mod: tvm.IRModule) -> tvm.IRModule:
    mod = AddDecode(3)(mod)
    for name, function in mod.functions_items():
        if isinstance(function, relax.Function):
            known = (function.attrs or {}).get(UPPER_BOUND, {})
            mod[name] = function.with_attr(UPPER_BOUND, {**BOUNDS, **known})
    with tvm.target.Target(CPU), tvm.transform.PassContext(opt_level=3):
        return tvm.transform.Sequential(memory_passes())(mod)


def allocated(function: relax.Function) -> list[int]:
    """Bytes of its buffers."""
    sizes = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get("relax.memory.alloc_storage"):
            (size,) = expr.args[0].values
            sizes.append(int(size))

    relax.analysis.post_order_visit(function.body, visit)
    return sizes


def test_buffers_become_an_argument_with_their_largest_sizes() -> None:
    before = planned(module())
    after = OwnStorage(DECODE)(before)
    relax.analysis.well_formed(after)
    assert structural_equal(after["forward"], before["forward"])
    assert not allocated(after[DECODE])
    # Two buffers that 3 rows share with others, and the 3 rows that go out.
    assert allocated(after[f"{DECODE}_storage"]) == [4 * 3 * 24] * 3
    assert after[DECODE].params[-1].name == "storage"


def test_it_computes_the_same_and_in_the_same_place() -> None:
    with tvm.target.Target(CPU):
        lowered = tvm.transform.Sequential(instruction_passes())(planned(module()))
        executable = relax.build(
            lowered, tvm.target.Target(CPU), relax_pipeline=tvm.transform.Sequential([])
        )
    machine = relax.VirtualMachine(executable, tvm.cpu())
    storage, rng, addresses = machine[f"{DECODE}_storage"](), np.random.default_rng(2), set()
    for n, m in ((1, 1), (3, 3), (2, 3)):
        arrays = [rng.normal(0, 1, shape).astype("float32") for shape in ((n, 16), (m, 24))]
        x, z = (tvm.runtime.tensor(array) for array in arrays)
        w = tvm.runtime.tensor(rng.normal(0, 1, (16, 24)).astype("float32"))
        expected = machine["forward"](x, z, w).numpy()
        result = machine[DECODE](x, z, w, storage)
        np.testing.assert_array_equal(result.numpy(), expected)
        addresses.add(np.from_dlpack(result).ctypes.data)
    assert len(addresses) == 1


@pytest.mark.parametrize("step", [AddDecode(3), OwnStorage(DECODE)])
def test_a_second_run_changes_nothing(step: tvm.transform.Pass) -> None:
    once = step(planned(module()))
    assert structural_equal(step(once), once)


def test_without_the_function_nothing_is_done() -> None:
    mod = module()
    assert structural_equal(OwnStorage(DECODE)(mod), mod)
