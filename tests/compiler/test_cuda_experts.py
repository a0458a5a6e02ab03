"""Experts' matrices on GPUs against float64 NumPy, run by the emulation."""

import numpy as np
import pytest

from relaxlm.compiler.kernels.cuda_experts import expert_kernel, plan_kernel
from relaxlm.quantization.groupwise import FLOAT_DTYPES
from relaxlm.quantization.schemes import SCHEMES
from tests import reference
from tests.compiler.cuda_emulation import CudaEmulation, needs_compiler
from tests.compiler.test_cuda_matmul import ERROR, SHARED, Stored, normal

EXPERTS, EACH = 5, 2
PRESETS = {
    name: order
    for name, order in zip(
        [name for name in SCHEMES if not name.endswith(("_0", "_2"))],
        ["forward", "reverse", "random"] * 4,
        strict=False,
    )
}


def choices(tokens: int) -> np.ndarray:
    """Different experts for every token; nobody takes the last one."""
    rng = np.random.default_rng(tokens)
    return np.stack([rng.permutation(EXPERTS - 1)[:EACH] for _ in range(tokens)]).astype("int32")


@needs_compiler
@pytest.mark.parametrize("preset", PRESETS)
def test_every_row_meets_its_own_expert_and_others_are_not_read(preset: str) -> None:
    scheme = SCHEMES[preset]
    n, k = 24, 100 if preset == "q4f16_1" else 96
    stored = Stored(scheme, (EXPERTS, n, k))
    for array in stored.arrays[-1:]:  # the scales, or the values themselves
        array[EXPERTS - 1] = np.nan
    with CudaEmulation(PRESETS[preset]) as cuda:
        plan_of, product = cuda.build_all(
            [
                plan_kernel(stored.format, EXPERTS, SHARED),
                expert_kernel(stored.format, EXPERTS, SHARED),
            ]
        )
        # One token; few rows of each expert; more, for every kind of tile.
        cases = [(1, EACH), (1, 1), (7, EACH), (30, 1), (60, EACH)]
        for tokens, repeat in cases + ([(400, EACH)] if preset == "q4f16_1" else []):
            chosen = choices(tokens)
            rows = chosen.size
            x = normal((rows // repeat, k), scheme.dtype)
            plan = np.full(1 + 4 * rows, -(2**30), np.int32)
            out = np.full((rows, n), np.nan, FLOAT_DTYPES[scheme.dtype])
            plan_of(chosen, plan)
            product(x, chosen, plan, *stored.arrays, out)
            experts = chosen.reshape(-1)
            expected = np.einsum(
                "rk,rnk->rn", np.repeat(x.astype(np.float64), repeat, 0), stored.values[experts]
            )
            assert reference.relative_error(out, expected) < ERROR[scheme.dtype], (tokens, repeat)


@needs_compiler
@pytest.mark.parametrize("order", ["forward", "random"])
def test_a_plan_has_every_row_once_in_tiles_of_one_expert(order: str) -> None:
    scheme = SCHEMES["q4f16_1"]
    experts = 70  # several for a lane
    format = Stored(scheme, (1, 8, 32)).format
    rng = np.random.default_rng(0)
    with CudaEmulation(order) as cuda:
        plan_of = cuda.build(plan_kernel(format, experts, SHARED))
        for tokens, tile in ((2, 8), (90, 8), (300, 32), (700, 64)):
            chosen = rng.integers(0, experts, (tokens, 3)).astype("int32") // 2 * 2
            plan = np.full(1 + 4 * chosen.size, -1, np.int32)
            plan_of(chosen, plan)
            flat = chosen.reshape(-1)
            rows, tiles = plan[1 : 1 + flat.size], plan[1 + flat.size :].reshape(-1, 3)[: plan[0]]
            np.testing.assert_array_equal(np.sort(rows), np.arange(flat.size))
            for expert, first, count in tiles:
                assert 0 < count <= tile
                assert (flat[rows[first : first + count]] == expert).all()
            # Together the tiles are all rows, in order, and none could be saved.
            np.testing.assert_array_equal(np.cumsum([0, *tiles[:-1, 2]]), tiles[:, 1])
            assert tiles[:, 2].sum() == flat.size
            assert len(tiles) == sum(-(-(flat == e).sum() // tile) for e in range(experts))
