"""Libraries share the kernels that are equal, and no others."""

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import emit, tensor
from relaxlm.compiler.target import resolve_device
from tests import shared_kernels

SQUARE = "define float @{name}(float %x) alwaysinline {{ %y = fmul float %x, %x ret float %y }}"
DOUBLE = "define float @{name}(float %x) alwaysinline {{ %y = fadd float %x, %x ret float %y }}"


def kernel(text: str, name: str, size: int = 4) -> tirx.PrimFunc:
    def body() -> None:
        x, y = tensor("x", (size,), "float32"), tensor("y", (size,), "float32")
        with T.serial(size) as i:
            T.buffer_store(y, T.call_pure_extern("float32", name, x[i]), [i])

    return emit(body, [text.format(name=name)])


def built(**functions: tirx.PrimFunc) -> relax.VirtualMachine:
    """A library whose function `main` puts the results of its kernels behind each other."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4,), "float32"))
    with builder.function("main", [x]):
        results = [
            builder.emit(relax.call_tir(builder.add_func(f, name), [x], x.ty))
            for name, f in functions.items()
        ]
        builder.emit_func_output(builder.emit(relax.op.concat(results)))
    with shared_kernels.shared_kernels():
        executable = relax.build(builder.finalize(), resolve_device("cpu").tvm_target())
    return relax.VirtualMachine(executable, tvm.cpu())


def run(machine: relax.VirtualMachine) -> np.ndarray:
    return machine["main"](tvm.runtime.tensor(np.float32([1, 3, 4, 5]))).numpy()


def test_an_equal_kernel_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    build = tirx.build

    def watched(module: tvm.IRModule, *given, **named) -> tvm.runtime.Module:
        compiled.extend(name.name_hint for name in module.get_global_vars())
        return build(module, *given, **named)

    monkeypatch.setattr(tirx, "build", watched)
    monkeypatch.setattr(shared_kernels, "_kernels", shared_kernels.OrderedDict())
    first = built(one=kernel(SQUARE, "square"), two=kernel(DOUBLE, "double"))
    np.testing.assert_array_equal(run(first), [1, 9, 16, 25, 2, 6, 8, 10])
    assert {"one", "two"} <= set(compiled)
    compiled.clear()
    # Of the same name, but not equal.
    second = built(one=kernel(SQUARE, "square"), two=kernel(SQUARE, "other"))
    np.testing.assert_array_equal(run(second), [1, 9, 16, 25] * 2)
    assert "two" in compiled and "one" not in compiled
    np.testing.assert_array_equal(run(first), [1, 9, 16, 25, 2, 6, 8, 10])


def test_what_would_be_mixed_up_in_one_module_is_found() -> None:
    with pytest.raises(AssertionError, match="two functions same"):
        built(one=kernel(SQUARE, "same"), two=kernel(DOUBLE, "same"))
