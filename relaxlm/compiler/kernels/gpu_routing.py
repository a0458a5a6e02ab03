"""Which experts a token passes, on GPUs of any kind: the operators of `models/routing.py`.

A workgroup per token. Every expert counts those that come before it, which is its place in the
order, so nobody has to wait for the one who is best. Scores are compared as integers in the same
order: what a GPU's compiler makes of comparisons with NaN is its own affair.
"""

import functools
import math

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import emit, tensor
from relaxlm.compiler.kernels.gpu_tiles import MOST_THREADS, length, meet, private, put, shared
from relaxlm.compiler.kernels.workgroup import grid, when

# As many as there may be: their worth lies in workgroup memory.
MOST_GROUPS = 1024
# The float32 next to minus infinity, which WGSL has no number for.
LOWEST = -3.4028234663852886e38
_MAGNITUDE, _INFINITY, _NAN = 0x7FFFFFFF, 0x7F800000, -0x7FFFFFFF


def threads_for(count: int) -> int:
    """Threads of a workgroup that has so much to do, a multiple of 32."""
    return min(MOST_THREADS, -(-count // 32) * 32)


def _order(score: Expr) -> Expr:
    """An int32 that is as large as the score is among others; NaN comes last, -0 equals 0."""
    bits = T.reinterpret("int32", score)
    magnitude = T.bitwise_and(bits, T.int32(_MAGNITUDE))
    signed = T.if_then_else(bits < 0, -magnitude, magnitude)
    return T.if_then_else(magnitude > T.int32(_INFINITY), T.int32(_NAN), signed)


@functools.cache  # every layer asks
def choose_kernel(experts: int, each: int) -> tirx.PrimFunc:
    """scores [n, experts] float32 -> the `each` largest, and their places int32, [n, each]."""
    threads = threads_for(experts)

    def body() -> None:
        n = length("n")
        scores = tensor("scores", (n, experts), "float32")
        values = tensor("values", (n, each), "float32")
        numbers = tensor("numbers", (n, each), "int32")
        with grid([n], threads) as (token, t):
            keys, rank = shared(experts, "int32"), private(1, "int32")
            for step in range(math.ceil(experts / threads)):
                e = step * threads + t
                with when(e < experts):
                    put(keys, _order(scores[token, e]), e)
            meet()
            for step in range(math.ceil(experts / threads)):
                e = step * threads + t
                with when(e < experts):
                    put(rank, T.int32(0), 0)
                    with T.serial(experts) as other:
                        tied = T.And(keys[other] == keys[e], other < e)
                        before = T.Or(keys[other] > keys[e], tied)
                        put(rank, rank[0] + T.cast(before, "int32"), 0)
                    with when(rank[0] < each):
                        nobody = keys[e] == T.int32(_NAN)
                        number = T.if_then_else(nobody, experts - 1, e)
                        T.buffer_store(values, scores[token, number], [token, rank[0]])
                        T.buffer_store(numbers, number, [token, rank[0]])

    return emit(body)


@functools.cache
def limit_kernel(
    experts: int, groups: int, kept: int, best: int, otherwise: float
) -> tirx.PrimFunc:
    """scores [n, experts] float32 -> the same, but `otherwise` outside of the best groups.

    Minus infinity becomes the least finite number.
    """
    threads, each = threads_for(experts), experts // groups

    def body() -> None:
        n = length("n")
        scores = tensor("scores", (n, experts), "float32")
        limited = tensor("limited", (n, experts), "float32")
        with grid([n], threads) as (token, t):
            worth, two, rank = shared(groups), private(2), private(1, "int32")
            for step in range(math.ceil(groups / threads)):
                g = step * threads + t
                with when(g < groups):
                    put(two, T.float32(LOWEST), 0)
                    put(two, T.float32(LOWEST), 1)
                    with T.serial(each) as i:
                        score = scores[token, g * each + i]
                        put(two, T.max(two[1], T.min(two[0], score)), 1)
                        put(two, T.max(two[0], score), 0)
                    put(worth, two[0] if best == 1 else two[0] + two[1], g)
            meet()
            for step in range(math.ceil(experts / threads)):
                e = step * threads + t
                own = e // each
                with when(e < experts):
                    put(rank, T.int32(0), 0)
                    with T.serial(groups) as other:
                        tied = T.And(worth[other] == worth[own], other < own)
                        before = T.Or(worth[other] > worth[own], tied)
                        put(rank, rank[0] + T.cast(before, "int32"), 0)
                    rest = T.float32(max(otherwise, LOWEST))
                    value = T.if_then_else(rank[0] < kept, scores[token, e], rest)
                    T.buffer_store(limited, value, [token, e])

    return emit(body)
