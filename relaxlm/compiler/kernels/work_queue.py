"""Tasks of unequal length inside one parallel loop.

TVM's thread pool gives each thread the same number of iterations. A kernel whose tasks differ lets
its threads take task numbers from a shared counter instead, so that none waits for the slowest.
"""

import tvm
from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

# Iterations of the parallel loop, each of which takes tasks until none are left: enough for any
# pool, and little to step over when the tasks ran out.
WORKERS = 64


def fetch_add(counter: tirx.Buffer, index: Expr) -> Expr:
    """counter[index]++ of an int32 buffer, atomically; the old value.

    What a thread wrote before is seen by the threads that count after it. The kernel needs
    `import_fetch_add`.
    """
    return T.call_extern("int32", "relaxlm_fetch_add", T.address_of(counter[index]))


def import_fetch_add(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Give a kernel the function behind `fetch_add`."""
    ir = """
define i32 @relaxlm_fetch_add(ptr %counter) alwaysinline nounwind {
  %old = atomicrmw add ptr %counter, i32 1 seq_cst
  ret i32 %old
}
"""
    zero = tirx.const(0, "int32")
    return function.with_body(
        tirx.AttrStmt(zero, "pragma_import_llvm", tvm.ir.StringImm(ir), function.body)
    )
