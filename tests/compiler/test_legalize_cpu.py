"""Exponentials in plain operations against float64 NumPy, and loop nests that go row by row."""

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax, te
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op, spec

from relaxlm.compiler.passes.legalize_cpu import legalize_cpu
from relaxlm.compiler.passes.schedule_cpu import schedule_cpu
from relaxlm.compiler.target import resolve_device

TARGET = resolve_device("cpu").tvm_target(2)
ROWS, COLUMNS = 7, 96


def lowered(function: Callable[..., Tensor], *shapes: tuple, dtype: str = "float32"):
    """A module with one function of tensors of these shapes; "n" stands for `ROWS`."""

    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return function(x, y)

    names = dict(zip(("x", "y"), (spec.Tensor(list(s), dtype) for s in shapes), strict=True))
    method = {**names, "$": {"param_mode": "none", "effect_mode": "none"}}
    module, _ = Model().export_tvm(spec={"forward": method})
    with TARGET:
        return tvm.transform.Sequential(
            [
                legalize_cpu(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                schedule_cpu(),
            ]
        )(module)


def run(module: tvm.IRModule, *arrays: np.ndarray) -> np.ndarray:
    vm = relax.VirtualMachine(tvm.compile(module, target=TARGET), tvm.cpu())
    return vm["forward"](*map(tvm.runtime.tensor, arrays)).numpy()


def loops(module: tvm.IRModule) -> list[str]:
    """The scheduled loop nests, as text."""
    return [f.script() for f in module.functions.values() if isinstance(f, tvm.tirx.PrimFunc)]


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.filterwarnings("ignore:overflow")
def test_exponentials_match_numpy() -> None:
    """One compiled function for all of them: the rows of the result are theirs."""

    def everything(x: Tensor, y: Tensor) -> Tensor:
        parts = [op.exp(x), op.sigmoid(x), op.tanh(x), op.silu(x), op.gelu(x, approximate="tanh")]
        return op.concat(parts, dim=0)

    module = lowered(everything, (1, 4096), (1,))
    assert not any("T.exp(" in text or "T.tanh(" in text for text in loops(module))
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-87, 88, 1024), rng.uniform(-3, 3, 3072)]).astype("float32")
    x[:2], x[-4:] = (-700, 700), (0, 1e-6, -3e-4, 0.1)
    x = x[None]
    exp, sigmoid, tanh, silu, gelu = run(module, x, np.zeros(1, "float32"))
    x = x[0].astype("float64")
    np.testing.assert_array_equal(exp[:2], [0, np.inf])
    np.testing.assert_allclose(exp[2:], np.exp(x[2:]), rtol=1.2e-7)
    # What is left of e ** x where float32 ends differs: 0, or numbers without all digits.
    np.testing.assert_allclose(sigmoid, 1 / (1 + np.exp(-x)), rtol=3e-7, atol=1e-37)
    np.testing.assert_allclose(tanh, np.tanh(x), rtol=3e-7)
    np.testing.assert_allclose(silu, x / (1 + np.exp(-x)), rtol=4e-7, atol=1e-35)
    np.testing.assert_allclose(gelu, gelu_tanh(x), rtol=5e-6, atol=1e-15)


def test_what_is_no_number_stays_none() -> None:
    module = lowered(lambda x, y: op.exp(x), (1, 16), (1,))
    x = np.full((1, 16), np.nan, "float32")
    x[0, :2] = (np.inf, -np.inf)
    out = run(module, x, np.zeros(1, "float32"))
    np.testing.assert_array_equal(out[0, :2], [np.inf, 0])
    assert np.isnan(out[0, 2:]).all()


def test_other_dtypes_are_left_to_tvm() -> None:
    module = lowered(lambda x, y: op.exp(x), ("n", 8), (1,), dtype="float16")
    assert any("T.exp(" in text for text in loops(module))


def variance(x: Tensor) -> Tensor:
    """A row's spread around its mean, in two sums of which the second needs the first."""

    def compute(x: te.Tensor) -> te.Tensor:
        n, size = x.shape
        j, k = te.reduce_axis((0, size), "j"), te.reduce_axis((0, size), "k")
        mean = te.compute((n,), lambda i: te.sum(x[i, j], axis=j), name="mean")
        share = tvm.tirx.const(COLUMNS, "float32")

        def centred(i, c):
            return x[i, c] - mean[i] / share

        spread = te.compute(
            (n,), lambda i: te.sum(centred(i, k) * centred(i, k), axis=k), name="spread"
        )
        return te.compute(x.shape, lambda i, c: centred(i, c) / spread[i], name="out")

    return op.tensor_expr_op(compute, "variance", [x])


def test_sums_over_rows_are_made_side_by_side_in_one_loop_over_rows() -> None:
    module = lowered(lambda x, y: variance(x), ("n", COLUMNS), (1,))
    [text] = loops(module)
    assert text.count("T.parallel(") == 1
    assert text.count("T.vectorized(") == 4  # two sums, each set to 0 first
    x = np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype("float32") + 3
    wide = x.astype("float64")
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / (centred**2).sum(-1, keepdims=True)
    np.testing.assert_allclose(
        run(module, x, np.zeros(1, "float32")), expected, rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("columns", [COLUMNS, 7], ids=["whole", "odd"])
def test_norms_of_heads(columns: int) -> None:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return op.rms_norm(x, weight, axes=-1, epsilon=0.1)

    module = lowered(norm, ("n", 3, columns), (columns,))
    rng = np.random.default_rng(2)
    x, weight = (rng.standard_normal(s).astype("float32") for s in ((ROWS, 3, columns), columns))
    wide = x.astype("float64")
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.1) * weight
    np.testing.assert_allclose(run(module, x, weight), expected, rtol=1e-6, atol=1e-7)


def test_rows_that_need_all_others_are_not_brought_together() -> None:
    """Or the sums over columns would be made anew for every row."""

    def shares(x: Tensor, y: Tensor) -> Tensor:
        def compute(x: te.Tensor) -> te.Tensor:
            n, size = x.shape
            k = te.reduce_axis((0, n), "k")
            total = te.compute((size,), lambda c: te.sum(x[k, c], axis=k), name="total")
            return te.compute(x.shape, lambda i, c: x[i, c] / total[c], name="shares")

        return op.tensor_expr_op(compute, "shares", [x])

    module = lowered(shares, ("n", COLUMNS), (1,))
    [text] = loops(module)
    assert text.count("T.parallel(") == 2
    x = np.random.default_rng(3).uniform(1, 2, (ROWS, COLUMNS)).astype("float32")
    expected = x / x.astype("float64").sum(0)
    np.testing.assert_allclose(run(module, x, np.zeros(1, "float32")), expected, rtol=1e-6)
