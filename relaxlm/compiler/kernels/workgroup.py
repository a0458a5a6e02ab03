"""Grids of workgroups in kernels for GPUs of any kind, and sums of what their threads have.

The memory of a thread and of a workgroup is that of `gpu_tiles`.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.gpu_tiles import meet, put

# What a kernel may read and write on every device of WebGPU.
MOST_BUFFERS = 8


@contextmanager
def when(*conditions: Expr | bool) -> Iterator[None]:
    """A block of statements under conditions, of which those that are known to hold are left out.

    No thread may wait in it for others.
    """
    with ExitStack() as stack:
        for condition in conditions:
            if condition is not True:
                stack.enter_context(T.If(condition))
                stack.enter_context(T.Then())
        yield


@contextmanager
def grid(blocks: Sequence[Expr | int], threads: int) -> Iterator[list[Expr]]:
    """Workgroups along one or two axes: gives a workgroup's place on each, and the thread."""
    with ExitStack() as stack:
        places = [
            stack.enter_context(T.thread_binding(extent, f"blockIdx.{axis}"))
            for extent, axis in zip(blocks, "xy", strict=False)
        ]
        yield [*places, stack.enter_context(T.thread_binding(threads, "threadIdx.x"))]


def reduce(
    parts: Sequence[tirx.Buffer],
    place: Expr,
    lane: Expr,
    lanes: int,
    stride: int = 1,
    combine: Callable[[Expr, Expr], Expr] = operator.add,
) -> None:
    """Emit trees of sums in workgroup memory, after which lane 0 has them. Starts with a barrier.

    Args:
        parts: one buffer for each sum, since TVM cannot tell parts of one apart. A thread's own
            part is at `place`.
        lanes: how many threads have a part of a sum, a power of two; `lane` of them is this one.
        stride: the distance from one lane's place to the next.
        combine: what makes one of two parts.
    """
    assert lanes & (lanes - 1) == 0, lanes
    meet()
    step = lanes // 2
    while step:
        with when(lane < step):
            for each in parts:
                put(each, combine(each[place], each[place + step * stride]), place)
        meet()
        step //= 2
