"""The experts with the largest scores on CPUs: what `models/routing.choose` says, in vectors.

A row is looked at twice for each place: for the largest of the scores that come after the one of
the place before, and for the first expert that has it.
"""

import functools
import math

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import emit, length, scratch, tensor
from relaxlm.compiler.kernels.cpu_elementwise import for_each_row, span
from relaxlm.compiler.kernels.vector import VectorUnit, reduce_max, splat, vector

# Below every score, and before every number.
NOTHING = -math.inf


@functools.cache  # every layer asks
def choose_kernel(experts: int, each: int, unit: VectorUnit) -> tirx.PrimFunc:
    """(scores [n, experts] float32) -> (values [n, each] float32, chosen [n, each] int32)."""
    lanes = math.gcd(experts, unit.lanes)

    def wide(value: Expr) -> Expr:
        return T.broadcast(value, lanes) if lanes > 1 else value

    def largest(buffer: tirx.Buffer) -> Expr:
        value = buffer.vload([0], vector("float32", lanes))
        return reduce_max(value) if lanes > 1 else value

    def body() -> None:
        n = length("n")
        scores = tensor("scores", (n, experts), "float32")
        values = tensor("values", (n, each), "float32")
        chosen = tensor("chosen", (n, each), "int32")

        def one(row: Expr) -> None:
            best, number = scratch(lanes, "float32"), scratch(lanes, "float32")
            value, place = scratch(1, "float32"), scratch(1, "int32")

            def score(step: Expr) -> Expr:
                return scores.vload([row, step * lanes], vector("float32", lanes))

            def numbers(step: Expr) -> Expr:
                return T.ramp(step * lanes, 1, lanes) if lanes > 1 else step

            def counts(j: int, step: Expr) -> Expr:
                """Which scores of a vector come after the place before; NaN never does."""
                here = score(step)
                if j == 0:
                    return here == here
                tied = T.And if lanes == 1 else T.bitwise_and
                either = T.Or if lanes == 1 else T.bitwise_or
                later = tied(here == wide(value[0]), numbers(step) > wide(place[0]))
                return either(here < wide(value[0]), later)

            def keep(buffer: tirx.Buffer, step: Expr, taken: Expr, what: Expr) -> None:
                before = buffer.vload([0], vector("float32", lanes))
                other = T.Select(taken, what, splat(NOTHING, lanes))
                T.buffer_store(buffer, T.max(before, other), [span(0, lanes)])

            for j in range(each):
                T.buffer_store(best, splat(NOTHING, lanes), [span(0, lanes)])
                T.buffer_store(number, splat(NOTHING, lanes), [span(0, lanes)])
                with T.serial(experts // lanes) as step:
                    keep(best, step, counts(j, step), score(step))
                found = scratch(1, "float32")
                T.buffer_store(found, largest(best), [0])
                with T.serial(experts // lanes) as step:
                    both = T.And if lanes == 1 else T.bitwise_and
                    taken = both(counts(j, step), score(step) == wide(found[0]))
                    # The first number is the largest of their negatives.
                    negative = T.cast(wide(T.int32(0)) - numbers(step), vector("float32", lanes))
                    keep(number, step, taken, negative)
                first = T.float32(0) - T.max(largest(number), T.float32(1 - experts))
                T.buffer_store(value, found[0], [0])
                T.buffer_store(place, T.cast(first, "int32"), [0])
                T.buffer_store(chosen, place[0], [row, j])
                T.buffer_store(values, scores[row, place[0]], [row, j])

        # Comparisons in vectors: four of them take about as long as one element of a norm.
        for_each_row(n, each * experts // 4, one)

    return emit(body)
