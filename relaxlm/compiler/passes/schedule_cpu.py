"""Loop nests that no kernel of ours replaces, on all threads: TVM's schedule rules have GPUs only.

What is left by then is done once per step (embedding, angles, the rows whose logits are wanted) or
rare (norms of other kinds, gates of recurrent layers). Operators whose results are used once are
computed where they are used, and rows are shared out among threads; LLVM makes vectors of the
innermost loops.

LLVM does not change the order of a sum. A sum over a row becomes `LANES` sums side by side, which
are added up at its end, and all that is done to a row is done while it is in the cache:

    for row: for j: s[row] += f(x[row, j])
    for row: for j: y[row, j] = g(x[row, j], s[row])
    ->
    for row in parallel:
        for j: for lane in vectorized: p[row, lane] += f(x[row, j * LANES + lane])
        for lane: s[row] += p[row, lane]
        for j: y[row, j] = g(x[row, j], s[row])
"""

import math

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight
from tvm.s_tir.dlight.analysis import SBlockInfo, normalize_prim_func
from tvm.s_tir.dlight.base import ScheduleRule, try_inline
from tvm.s_tir.schedule import SBlockRV, ScheduleError

LANES = 16


class _Rows(ScheduleRule):
    """The outermost loop in parallel, if its iterations are independent."""

    def apply(
        self, func: tirx.PrimFunc, target: tvm.target.Target, _: bool
    ) -> s_tir.Schedule | None:
        schedule = s_tir.Schedule(func)
        blocks = normalize_prim_func(schedule)
        if blocks is None:
            return None
        blocks = try_inline(schedule, blocks)
        try:
            return row_by_row(schedule.copy(), blocks)
        except (NotRowByRow, ScheduleError):
            pass
        for block in blocks:
            loops = schedule.get_loops(block.block_rv)
            if loops and block.dom_kind().startswith("S"):
                schedule.parallel(loops[0])
        return schedule


class NotRowByRow(Exception):
    """Blocks do something else than to go over the same rows."""


def row_by_row(schedule: s_tir.Schedule, blocks: list[SBlockInfo]) -> s_tir.Schedule:
    """All blocks in one loop over rows.

    Raises:
        NotRowByRow, ScheduleError: they cannot be brought there.
    """
    sums: list[tuple[SBlockRV, SBlockRV]] = []  # of lanes, and over the lanes
    order: list[SBlockRV] = []
    for block in blocks:
        kinds = block.dom_kind()
        if not kinds.startswith("S") or "R" in kinds[:-1]:
            raise NotRowByRow(kinds)
        if kinds.endswith("R"):
            *outer, last = schedule.get_loops(block.block_rv)
            extent = schedule.get(last).extent
            lanes = math.gcd(int(extent), LANES) if isinstance(extent, tirx.IntImm) else 1
            if lanes > 1:
                _, lane = schedule.split(last, [None, lanes])
                part = schedule.rfactor(lane, len(outer))
                sums.append((part, block.block_rv))
                order.append(part)
        order.append(block.block_rv)
    if len(order) == 1 and not sums:
        raise NotRowByRow("one block")
    rows = schedule.get_loops(order[-1])[0]
    for producer in reversed(order[:-1]):
        before = len(schedule.get_loops(producer))
        schedule.compute_at(producer, rows)
        if len(schedule.get_loops(producer)) > before:
            raise NotRowByRow("a row of the result needs several of another")
    schedule.parallel(rows)
    for part, whole in sums:
        for block in (part, whole):
            _, lane, *inner = schedule.get_loops(block)
            schedule.reorder(*inner, lane)
        lane, along = schedule.get_loops(part)[-1], schedule.get_loops(part)[-2]
        schedule.vectorize(lane)
        schedule.decompose_reduction(part, along)
    return schedule


def schedule_cpu() -> tvm.transform.Pass:
    """The pass."""
    return dlight.ApplyDefaultSchedule(_Rows())
