"""Products with experts' matrices against float64 NumPy, for every format and any routing."""

import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels.cpu_experts import MANY, expert_kernel
from relaxlm.compiler.kernels.isa import NEEDS, Isa
from relaxlm.compiler.kernels.vector import VectorUnit
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.schemes import SCHEMES
from relaxlm.runtime.cpu import missing_features
from tests.compiler.test_cpu_matmul import NUMPY, UNITS, build, native_unit
from tests.compiler.test_packed import rounded

EACH = 3
PRESETS = [name for name in SCHEMES if not name.endswith("_0")]
# Fewer outputs than a task takes, and several tasks with a rest; rows shorter than a vector, and
# with rests of a vector and of a group.
SHAPES = [(4, 3, 24), (5, 67, 330)]


def run(
    preset: str,
    shape: tuple[int, int, int],
    repeat: int,
    unit: VectorUnit,
    arch: str = "native",
    isa: Isa | None = None,
):
    """A function of x, chosen and a float weight that gives the product and the weight as kept."""
    scheme = SCHEMES[preset]
    quant = scheme.linear
    kernel = build({"f": expert_kernel(shape, quant, scheme.dtype, EACH, repeat, unit, isa)}, arch)[
        "f"
    ]

    def product(x: np.ndarray, chosen: np.ndarray, weight: np.ndarray, damage=None):
        dtype = NUMPY.get(scheme.dtype, scheme.dtype)
        stored = quant.quantize(weight) if quant else {"weight": weight.astype(dtype)}
        kept = quant.dequantize(stored, shape) if quant else stored["weight"]
        arrays = [array.copy() for array in stored.values()]
        if damage is not None:
            arrays[-1][damage] = np.nan  # the scales, or the values themselves
        # An output that the kernel leaves out must show.
        out = np.full((chosen.size, shape[1]), np.nan, np.float32)
        tensors = [tvm.runtime.tensor(array) for array in (x, chosen, *arrays, out)]
        kernel(*tensors)
        return tensors[-1].numpy(), kept.astype(np.float64)

    return product


def expected(x: np.ndarray, chosen: np.ndarray, kept: np.ndarray, repeat: int) -> np.ndarray:
    rows = np.repeat(x.astype(np.float64), repeat, axis=0)
    return np.einsum("rnk,rk->rn", kept[chosen.reshape(-1)], rows)


def routings(rng: np.random.Generator, experts: int) -> dict[str, np.ndarray]:
    """One token; several, some experts without; all to one; enough for every size of tile."""
    some = np.stack([rng.permutation(experts - 1)[:EACH] for _ in range(5)])
    many = np.stack([rng.permutation(experts)[:EACH] for _ in range(21)])
    one = np.full((7, EACH), experts - 1)
    first = rng.permutation(experts)[None, :EACH]
    return {"first": first, "some": some, "one": one, "many": many}


def values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (rng.uniform(0.2, 1, shape) * rng.choice([-1, 1], shape)).astype(np.float32)


def check(product, shape: tuple[int, int, int], repeat: int) -> None:
    rng = np.random.default_rng(0)
    weight = values(rng, shape)
    for name, chosen in routings(rng, shape[0]).items():
        chosen = chosen.astype(np.int32)
        x = values(rng, (chosen.size // repeat, shape[2]))
        unchosen = sorted(set(range(shape[0])) - set(chosen.flat))
        # What nobody chose is not read: NaN there would be everywhere.
        out, kept = product(x, chosen, weight, unchosen)
        reference = expected(x, chosen, kept, repeat)
        scale = np.sqrt(shape[2])
        np.testing.assert_allclose(out / scale, reference / scale, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_products_for_every_format(preset: str, shape: tuple[int, int, int]) -> None:
    check(run(preset, shape, EACH, native_unit()), shape, EACH)


def test_rows_of_their_own() -> None:
    check(run("q4f16_1", SHAPES[1], 1, native_unit()), SHAPES[1], 1)


@pytest.mark.parametrize("arch", ["x86-64-v2", "x86-64-v3"])
def test_products_with_vectors_of_older_cpus(arch: str) -> None:
    if missing := missing_features(resolve_device("cpu", arch).cpu_features):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    check(run("q4f16_1", SHAPES[1], EACH, UNITS[arch], arch), SHAPES[1], EACH)


def test_a_row_does_not_depend_on_the_others() -> None:
    rng = np.random.default_rng(1)
    shape = SHAPES[1]
    product = run("q4f16_1", shape, EACH, native_unit())
    weight, x = values(rng, shape), values(rng, (21, shape[2]))
    chosen = routings(rng, shape[0])["many"].astype(np.int32)
    together, _ = product(x, chosen, weight)
    for i in range(len(x)):
        alone, _ = product(x[i : i + 1], chosen[i : i + 1], weight)
        np.testing.assert_array_equal(alone, together[i * EACH : (i + 1) * EACH])


@pytest.mark.parametrize(
    ("preset", "shape", "repeat"),
    # Rests of a task, of a panel and of a group; a task of two panels; fewer outputs than a panel.
    [("q4f16_1", (5, 67, 330), EACH), ("q4bf16_1", (5, 96, 1120), 1), ("q8f16_1", (5, 19, 224), 1)],
    ids=str,
)
def test_experts_with_many_rows_round_them(preset: str, shape: tuple, repeat: int) -> None:
    if missing := missing_features(NEEDS["avx512"]):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    rng = np.random.default_rng(2)
    product, weight = run(preset, shape, repeat, native_unit(), isa="avx512"), values(rng, shape)
    mixed = set()
    for name, chosen in routings(rng, shape[0]).items():
        chosen = chosen.astype(np.int32)
        x = values(rng, (chosen.size // repeat, shape[2]))
        out, kept = product(x, chosen, weight)
        codes, scales = rounded(x)
        whole = (codes * scales[..., None]).reshape(len(x), -1)[:, : shape[2]]
        many = np.bincount(chosen.flat, minlength=shape[0])[chosen.reshape(-1)] >= MANY
        mixed |= set(many)
        for given, rows in ((whole, many), (x, ~many)):
            reference = expected(given, chosen, kept, repeat)[rows]
            terms = expected(np.abs(given), chosen, np.abs(kept), repeat)[rows]
            assert (np.abs(out[rows] - reference) <= 1e-6 * terms).all(), name
    assert mixed == {False, True}
