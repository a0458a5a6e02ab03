"""Routing on GPUs: kernels against NumPy, run by the emulation, and where they are put."""

import numpy as np
import pytest
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, spec
from tvm_ffi import structural_equal

from relaxlm.compiler.passes.lower_routing import KERNELS, LowerRouting
from relaxlm.models.routing import choose, limit_to_groups
from tests.compiler.cuda_emulation import CudaEmulation, needs_compiler
from tests.expression import written_out


@needs_compiler
@pytest.mark.parametrize("kind", KERNELS)
def test_the_largest_are_chosen_the_first_among_equals(kind: str) -> None:
    choose_kernel = KERNELS[kind].choose_kernel
    rng, nan, inf = np.random.default_rng(0), np.nan, np.inf
    many = rng.permutation(9 * 70).reshape(9, 70).astype("float32")
    many[3] = rng.integers(0, 4, 70)  # ties
    many[4:7] -= 300  # of either sign
    many[5, 1:9:2], many[5, 2:9:2], many[5, 9:] = 0.0, -0.0, -1e-40
    few = np.float32(
        [[1, 4, 2, 4], [3, 2, 3, 2], [nan, 5, nan, 1], [nan] * 4, [-inf, nan, -inf, 2]]
    )
    with CudaEmulation("random") as cuda:
        kernels = cuda.build_all([choose_kernel(70, 5), choose_kernel(4, 3)])
        for kernel, scores, each in zip(kernels, (many, few), (5, 3), strict=True):
            n = len(scores)
            values, places = np.full((n, each), 7, "float32"), np.full((n, each), 7, "int32")
            kernel(scores, values, places)
            # NaN comes last, and then there are no places but the last.
            order = np.argsort(-scores, axis=1, kind="stable")[:, :each]
            there = ~np.isnan(np.take_along_axis(scores, order, 1))
            expected = np.where(there, order, scores.shape[1] - 1)
            np.testing.assert_array_equal(places, expected)
            np.testing.assert_array_equal(values, np.take_along_axis(scores, expected, 1))


@needs_compiler
@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize(("experts", "groups", "kept", "best"), [(24, 3, 2, 2), (320, 8, 3, 1)])
def test_only_the_best_groups_keep_their_scores(
    kind: str, experts: int, groups: int, kept: int, best: int
) -> None:
    limit_kernel = KERNELS[kind].limit_kernel
    scores = np.random.default_rng(1).standard_normal((6, experts)).astype("float32")
    scores[2] = 0.5  # all alike: the first groups
    limited = np.full_like(scores, 7)
    with CudaEmulation("reverse") as cuda:
        cuda.build(limit_kernel(experts, groups, kept, best, -2.0))(scores, limited)
    by_group = scores.reshape(6, groups, -1)
    worth = np.sort(by_group, axis=-1)[..., -best:].sum(-1)
    order = np.argsort(-worth, axis=1, kind="stable")
    stays = np.argsort(order, axis=1) < kept
    np.testing.assert_array_equal(
        limited, np.where(stays[..., None], by_group, -2).reshape(scores.shape)
    )


class Router(nn.Module):
    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return choose(limit_to_groups(scores, 4, 2, best=2, otherwise=-1.0), 3)


@pytest.mark.parametrize("kind", KERNELS)
def test_both_searches_get_kernels_of_their_own(kind: str) -> None:
    method = {"scores": spec.Tensor(["n", 16], "float32")}
    method["$"] = {"param_mode": "plain", "effect_mode": "none"}
    module, _ = Router().export_tvm(spec={"forward": method})
    lowered = LowerRouting(kind)(module)
    both = "@choose_experts(@limit_to_groups(scores))"
    text = f"({both}[0], {both}[1])"
    assert written_out(lowered["forward"]) == text == written_out(module["forward"])
    functions = [str(name.name_hint) for name in lowered.get_global_vars()]
    assert sorted(functions) == ["choose_experts1", "forward", "limit_to_groups1"]
    assert structural_equal(LowerRouting(kind)(lowered), lowered)
