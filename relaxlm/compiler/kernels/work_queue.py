"""Tasks of unequal length inside one parallel loop.

TVM's thread pool gives each thread the same number of iterations. A kernel whose tasks differ lets
its threads take task numbers from a shared counter instead, so that none waits for the slowest.
"""

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import scratch

# Iterations of the parallel loop, each of which takes tasks until none are left: enough for any
# pool, and little to step over when the tasks ran out.
WORKERS = 64


def fetch_add(counter: tirx.Buffer, index: Expr) -> Expr:
    """counter[index]++ of an int32 buffer, atomically; the old value.

    What a thread wrote before is seen by the threads that count after it. The kernel needs
    `FETCH_ADD_IR` among its imports.
    """
    return T.call_extern("int32", "relaxlm_fetch_add", T.address_of(counter[index]))


def take_tasks(
    before: tirx.Buffer,
    batch: Expr,
    heads: int,
    run: Callable[[Expr, Expr, Expr], None],
) -> None:
    """The parallel loop over the tasks of all sequences and heads, the last ones first.

    Args:
        before: [batch + 1] int32, the tasks that each sequence's head has, summed up from 0.
        run: emits one task: sequence, head, and its number among those of that sequence and head.
    """
    next_task = scratch(16, "int32")  # a cache line of its own
    T.buffer_store(next_task, 0, [0])
    with T.parallel(T.min(before[batch] * heads, WORKERS)):
        task = scratch(4, "int32")

        def take() -> None:
            count = before[batch] * heads
            T.buffer_store(task, count - 1 - fetch_add(next_task, 0), [0])

        take()
        with T.While(task[0] >= 0):
            # The sequence of this task: the last one whose tasks start at or before it.
            T.buffer_store(task, 0, [1])
            T.buffer_store(task, T.cast(batch, "int32"), [2])
            with T.While(task[2] - task[1] > 1):
                T.buffer_store(task, (task[1] + task[2]) // 2, [3])
                with T.If(before[task[3]] <= task[0] // heads):
                    with T.Then():
                        T.buffer_store(task, task[3], [1])
                    with T.Else():
                        T.buffer_store(task, task[3], [2])
            run(task[1], task[0] % heads, task[0] // heads - before[task[1]])
            take()


FETCH_ADD_IR = """
define i32 @relaxlm_fetch_add(ptr %counter) alwaysinline nounwind {
  %old = atomicrmw add ptr %counter, i32 1 seq_cst
  ret i32 %old
}
"""
