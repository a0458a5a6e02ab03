"""Experts' matrices on plain GPUs against float64 NumPy, as CUDA kernels run by the emulation."""

import numpy as np
import pytest

from relaxlm.compiler.kernels.gpu_experts import FEW, WAYS, expert_kernel, plan_kernel
from relaxlm.quantization.schemes import SCHEMES
from tests import reference
from tests.compiler.cuda_emulation import CudaEmulation, needs_compiler
from tests.compiler.test_cuda_experts import EACH, EXPERTS, choices
from tests.compiler.test_cuda_matmul import ERROR, Stored, normal

pytestmark = needs_compiler


def empty_plan(rows: int, experts: int) -> list[np.ndarray]:
    """Order, tiles and counts, as `plan_types` says, and as wrong as can be."""
    shapes = [(rows,), (rows // WAYS[0].rows + experts, 3), (-(-rows // 256) + 1, experts)]
    return [np.full(shape, 2**30, "int32") for shape in shapes]


@pytest.mark.parametrize(
    ("preset", "order"),
    [
        ("q4f16_1", "forward"),
        ("q4f32_1", "reverse"),
        ("q3f16_1", "random"),
        ("q8f16_1", "random"),
        ("q0f16", "reverse"),
        ("q0f32", "forward"),
    ],
)
def test_every_row_meets_its_own_expert_and_others_are_not_read(preset: str, order: str) -> None:
    scheme = SCHEMES[preset]
    # Rests of a tile; of a group, of words, or of what a workgroup brings at a time.
    n, k = 70, {"q3f16_1": 80, "q8f16_1": 96, "q4f32_1": 104}.get(preset, 100)
    stored = Stored(scheme, (EXPERTS, n, k))
    for array in stored.arrays[-1:]:  # the scales, or the values themselves
        array[EXPERTS - 1] = np.nan
    with CudaEmulation(order) as cuda:
        kernels = [
            expert_kernel((EXPERTS, n, k), scheme.linear, scheme.dtype, scheme.dtype, EACH, repeat)
            for repeat in (1, EACH)
        ]
        plan_of, *products = cuda.build_all([plan_kernel(EXPERTS, EACH), *kernels])
        # One token; few rows; small tiles; large ones, of which experts have several.
        for tokens, repeat in ((1, EACH), (1, 1), (FEW * EXPERTS // EACH, 1), (15, EACH), (90, 1)):
            chosen = choices(tokens)
            x = normal((chosen.size // repeat, k), scheme.dtype)
            plan = empty_plan(chosen.size, EXPERTS)
            out = np.full((chosen.size, n), np.nan, x.dtype)
            plan_of(chosen, *plan)
            products[repeat > 1](x, chosen, *plan[:2], *stored.arrays, out)
            expected = np.einsum(
                "rk,rnk->rn",
                np.repeat(x.astype(np.float64), repeat, 0),
                stored.values[chosen.reshape(-1)],
            )
            assert reference.relative_error(out, expected) < ERROR[scheme.dtype], (tokens, repeat)


@pytest.mark.parametrize("order", ["forward", "random"])
def test_a_plan_has_every_row_once_in_tiles_of_one_expert(order: str) -> None:
    experts = 300  # several for a thread
    rng = np.random.default_rng(0)
    with CudaEmulation(order) as cuda:
        plan_of = cuda.build(plan_kernel(experts, 3))
        for tokens, way in ((201, WAYS[0]), (777, WAYS[0]), (801, WAYS[1]), (2600, WAYS[1])):
            chosen = rng.integers(0, experts, (tokens, 3)).astype("int32") // 3 * 3
            rows, tiles, counts = empty_plan(chosen.size, experts)
            plan_of(chosen, rows, tiles, counts)
            flat = chosen.reshape(-1)
            np.testing.assert_array_equal(rows, np.argsort(flat, kind="stable"))
            used = tiles[tiles[:, 2] != 0]
            assert (tiles[: len(used)] == used).all()
            for expert, first, count in used:
                assert 0 < count <= way.rows
                assert (flat[rows[first : first + count]] == expert).all()
            # Together the tiles are all rows, in order, and none could be saved.
            np.testing.assert_array_equal(np.cumsum([0, *used[:-1, 2]]), used[:, 1])
            assert used[:, 2].sum() == flat.size
            assert len(used) == sum(-(-(flat == e).sum() // way.rows) for e in range(experts))
            # As many are launched.
            assert len(used) <= flat.size // way.rows + min(flat.size, experts)


def test_a_kernel_reads_at_most_eight_buffers() -> None:
    linear = SCHEMES["q4f16_1"].linear
    kernel = expert_kernel((4, 8, 32), linear, "float16", "float16", 2, 2)
    assert len(kernel.params) <= 8 and len(plan_kernel(4, 2).params) <= 8
