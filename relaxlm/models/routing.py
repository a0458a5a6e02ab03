"""Which experts a token passes: the operators that a router is made of.

Scores are [n, experts] float32. Whatever they are, even NaN, the numbers of experts that come out
are in range: kernels use them as addresses.
"""

from tvm import te, tirx
from tvm.ir import Expr
from tvm.relax.frontend.nn import Tensor, op

# Attribute of functions that search: what they do, for targets with kernels of their own.
ROUTING = "relaxlm.routing"


def _before(value: Expr, number: Expr, other: Expr, other_number: Expr) -> Expr:
    """Whether a score comes before another one: it is larger, or as large with a lower number."""
    tied = tirx.And(value == other, number < other_number)
    return tirx.Or(value > other, tied)


def choose(scores: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """The `each` largest of every row of [n, E] float32, the largest first.

    Of equal ones the first is taken; NaN is not taken as long as there is anything else. Each is
    the largest of those that come after the one before it, so the work is `each` looks at a row.

    Returns:
        Their values [n, each] float32 and places [n, each] int32.
    """
    experts = int(scores.shape[1])
    lowest, nobody = tirx.const(float("-inf"), "float32"), tirx.const(experts, "int32")

    def combine(left: tuple[Expr, Expr], right: tuple[Expr, Expr]) -> tuple[Expr, Expr]:
        first = _before(*left, *right)
        return tirx.Select(first, left[0], right[0]), tirx.Select(first, left[1], right[1])

    largest = te.comm_reducer(combine, lambda *_: (lowest, nobody), "largest")

    def compute(p: te.Tensor) -> list[te.Tensor]:
        n = p.shape[0]

        def best(place: int) -> tuple[te.Tensor, te.Tensor]:
            e = te.reduce_axis((0, experts), "e")

            def candidate(i: Expr) -> tuple[Expr, Expr]:
                counts = p[i, e] == p[i, e]
                if found:
                    value, number = found[-1]
                    counts = tirx.And(counts, _before(value[i], number[i], p[i, e], e.var))
                return (
                    tirx.Select(counts, p[i, e], lowest),
                    tirx.Select(counts, e.var.astype("int32"), nobody),
                )

            return te.compute((n,), lambda i: largest(candidate(i), axis=e), name=f"best{place}")

        found: list[tuple[te.Tensor, te.Tensor]] = []
        for place in range(each):
            found.append(best(place))

        def number(i, j):
            result = found[-1][1][i]
            for place in reversed(range(each - 1)):
                result = tirx.Select(j == place, found[place][1][i], result)
            return tirx.Min(result, tirx.const(experts - 1, "int32"))

        chosen = te.compute((n, each), number, name="chosen_experts")
        return [te.compute((n, each), lambda i, j: p[i, chosen[i, j]], name="scores"), chosen]

    attrs = {ROUTING: f"choose {each}"}
    return op.tensor_expr_op(compute, "choose_experts", [scores], attrs=attrs)


def pick(scores: Tensor, chosen: Tensor) -> Tensor:
    """The scores [n, each] of the chosen experts [n, each], of [n, E]."""

    def compute(p: te.Tensor, chosen: te.Tensor) -> te.Tensor:
        return te.compute(chosen.shape, lambda i, j: p[i, chosen[i, j]], name="expert_scores")

    return op.tensor_expr_op(compute, "expert_scores", [scores, chosen])


def limit_to_groups(
    scores: Tensor, groups: int, kept: int, best: int = 1, otherwise: float = 0.0
) -> Tensor:
    """The scores of the experts in the `kept` best groups, and `otherwise` for all others.

    Args:
        scores: [n, E] float32, in groups of E / groups.
        best: a group is as good as the sum of so many of its best experts, 1 or 2.
        otherwise: less than any score.
    """
    each = int(scores.shape[1]) // groups
    lowest = tirx.const(float("-inf"), "float32")

    def combine(left: tuple[Expr, Expr], right: tuple[Expr, Expr]) -> tuple[Expr, Expr]:
        second = tirx.Max(tirx.Min(left[0], right[0]), tirx.Max(left[1], right[1]))
        return tirx.Max(left[0], right[0]), second

    two = te.comm_reducer(combine, lambda *_: (lowest, lowest), "best_two")

    def compute(scores: te.Tensor) -> te.Tensor:
        n, e = scores.shape[0], te.reduce_axis((0, each), "e")
        if best == 1:
            value = te.compute(
                (n, groups), lambda i, g: te.max(scores[i, g * each + e], axis=e), name="best"
            )
        else:
            first, second = te.compute(
                (n, groups),
                lambda i, g: two((scores[i, g * each + e], lowest), axis=e),
                name="best_two",
            )
            value = te.compute((n, groups), lambda i, g: first[i, g] + second[i, g], name="best")
        other = te.reduce_axis((0, groups), "other")
        ranks = te.compute(
            (n, groups),
            lambda i, g: te.sum(
                _before(value[i, other], other.var, value[i, g], g).astype("int32"), axis=other
            ),
            name="group_ranks",
        )
        return te.compute(
            scores.shape,
            lambda i, e: tirx.Select(
                ranks[i, e // each] < kept, scores[i, e], tirx.const(otherwise, "float32")
            ),
            name="limit_to_groups",
        )

    attrs = {ROUTING: f"limit {groups} {kept} {best} {otherwise}"}
    return op.tensor_expr_op(compute, "limit_to_groups", [scores], attrs=attrs)
