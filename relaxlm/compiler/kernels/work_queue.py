"""Tasks of unequal length inside one parallel loop.

TVM's thread pool gives each thread the same number of iterations. A kernel whose tasks differ lets
its threads take task numbers from a shared counter instead, so that none waits for the slowest.
"""

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

# Iterations of the parallel loop, each of which takes tasks until none are left: enough for any
# pool, and little to step over when the tasks ran out.
WORKERS = 64


def fetch_add(counter: tirx.Buffer, index: Expr) -> Expr:
    """counter[index]++ of an int32 buffer, atomically; the old value.

    What a thread wrote before is seen by the threads that count after it. The kernel needs
    `FETCH_ADD_IR` among its imports.
    """
    return T.call_extern("int32", "relaxlm_fetch_add", T.address_of(counter[index]))


FETCH_ADD_IR = """
define i32 @relaxlm_fetch_add(ptr %counter) alwaysinline nounwind {
  %old = atomicrmw add ptr %counter, i32 1 seq_cst
  ret i32 %old
}
"""
