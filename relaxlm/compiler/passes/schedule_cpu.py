"""Loop nests that no kernel of ours replaces, on all threads: TVM's schedule rules have GPUs only.

What is left by then is done once per step (embedding, angles, the rows whose logits are wanted) or
rare (biases of a projection). Operators whose results are used once are computed where they are
used, and rows are shared out among threads; LLVM makes vectors of the innermost loops.
"""

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.s_tir.dlight.base import ScheduleRule, try_inline


class _Rows(ScheduleRule):
    """The outermost loop in parallel, if its iterations are independent."""

    def apply(
        self, func: tirx.PrimFunc, target: tvm.target.Target, _: bool
    ) -> s_tir.Schedule | None:
        schedule = s_tir.Schedule(func)
        blocks = normalize_prim_func(schedule)
        if blocks is None:
            return None
        for block in try_inline(schedule, blocks):
            loops = schedule.get_loops(block.block_rv)
            if loops and block.dom_kind().startswith("S"):
                schedule.parallel(loops[0])
        return schedule


def schedule_cpu() -> tvm.transform.Pass:
    """The pass."""
    return dlight.ApplyDefaultSchedule(_Rows())
