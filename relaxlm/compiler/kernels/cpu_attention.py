"""Paged attention for CPUs: attend over the pages that `cpu_append.py` fills.

A task is one KV head of one sequence against

    one row       a part of its context, straight from the pages      cpu_attention_one.py
    a few rows    a part of their context, through panels             cpu_attention_rows.py
    many rows     a block of them, the whole context                  cpu_attention_rows.py

so that keys and values are read once for all query heads that share them, and long contexts keep
all threads busy. The thread that finishes the last part of a context merges the parts. Threads take
tasks from a queue, the last rows of a prompt first: they see most.

Where a row's result must not depend on the other rows of a step (`invariant`), one row is treated
as a few are, and parts have fixed places: see `cpu_attention_parts.py`.
"""

import functools
from dataclasses import dataclass

import tvm
from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.builder import emit, scratch
from relaxlm.compiler.kernels.cpu_append import append_kernel, page_tensors
from relaxlm.compiler.kernels.cpu_attention_one import Direct
from relaxlm.compiler.kernels.cpu_attention_pages import PAGES, CachedRound, Tables
from relaxlm.compiler.kernels.cpu_attention_parts import Parts, pages_per_part, parts_of
from relaxlm.compiler.kernels.cpu_attention_products import (
    Exact,
    Pairs,
    Products,
    get,
    span,
)
from relaxlm.compiler.kernels.cpu_attention_rows import attend_one, attend_rows
from relaxlm.compiler.kernels.cpu_attention_softmax import Sums
from relaxlm.compiler.kernels.cpu_attention_tiles import DEPTH, Tiles
from relaxlm.compiler.kernels.isa import dot_products
from relaxlm.compiler.kernels.vector import (
    LOG2E,
    exp2,
    multiply_add,
    reduce_sum,
    reduce_sum_ir,
    splat,
    to_float32,
    vector,
    vector_unit,
)
from relaxlm.compiler.kernels.work_queue import FETCH_ADD_IR, take_tasks
from relaxlm.quantization.kv_cache import KVFormat

__all__ = ["append_kernel", "attend_kernel", "attend_workspace_bytes", "page_tensors"]

# The most rows of a sequence that are split along their context, not among themselves.
FEW = 16
# Query rows that a task of many brings to a panel, about: filling it costs as much as 20 rows.
TASK_ROWS = 512
# Pages from which on a task of one row takes several KV heads.
LONG = 32


@dataclass(frozen=True)
class Plan:
    """How a kernel works, apart from what it computes.

    Attributes:
        rows: "exact" or "pairs" or "tiles", see `cpu_attention_products.py`.
        block: rows of a block of sums in registers.
        wide: vectors of each of them.
        invariant: whether what a row finds depends on nothing but its position, bit by bit.
    """

    rows: str
    block: int
    wide: int
    invariant: bool = False

    def products(self, shape: AttentionShape) -> Products:
        if self.rows == "tiles":
            return Tiles(shape)
        kind = Pairs if self.rows == "pairs" else Exact
        return kind(shape, self.block, self.wide)

    def direct(self, shape: AttentionShape, format: KVFormat) -> Direct:
        return Direct(shape, format, self.block * self.wide * 2 // 3, self.block)

    def tokens(self, shape: AttentionShape) -> int:
        """New tokens of a task of many rows; full blocks of rows."""
        block, share = self.products(shape).rows, shape.q_heads // shape.kv_heads
        return block * max(1, TASK_ROWS // (block * share))


def plan(
    shape: AttentionShape, rounded: bool, target: tvm.target.Target | None, invariant: bool = False
) -> Plan:
    """The plan for a target: what `rounded` allows, if the CPU and the shape do."""
    target = target or tvm.target.Target({"kind": "llvm"})
    unit = vector_unit(target)
    rows, block, wide = "exact", 6, 1
    if unit.lanes == 16:
        block, wide = 12, 2
    if rounded and shape.head_dim % DEPTH == 0:
        if dot_products(target) == "amx":
            rows = "tiles"
        elif tvm.target.codegen.target_has_features("avx512bf16", target):
            rows = "pairs"
    return Plan(rows, block, wide, invariant)


def attend_kernel(
    shape: AttentionShape,
    format: KVFormat,
    dtype: str,
    rounded: bool = False,
    invariant: bool = False,
) -> tirx.PrimFunc:
    """Attention of n query rows over the pages of their sequences, with an online softmax.

    (q [n, q_heads, dim], positions [n], row_offsets [b + 1], page_offsets [b + 1], page_ids [p],
    kv_lengths [b], dropped [b], *page tensors, and, if the shape has them, sink_logits [q_heads]
    float32 and slopes [q_heads] float32) -> [n, q_heads, dim].

    Args:
        dtype: of q and the result.
        rounded: whether sequences with several new rows may round q, keys, values and weights to
            bfloat16, on CPUs that multiply such numbers faster. Sums stay float32. Sequences with
            one new row are exact, unless `invariant`.
        invariant: whether a row's result is the same, bit by bit, whatever else is in the step and
            in whichever steps its context was computed.
    """
    target = tvm.target.Target.current(allow_none=True)
    return _attend_kernel(shape, format, dtype, plan(shape, rounded, target, invariant))


def attend_workspace_bytes(
    shape: AttentionShape,
    format: KVFormat,
    batch: int,
    threads: int,
    rounded: bool = False,
    target: tvm.target.Target | None = None,
    invariant_pages: int | None = None,
) -> int:
    """The most memory that a call of the kernel takes from TVM's pools, in bytes.

    Args:
        batch: sequences in a step, at most.
        threads: TVM's; each has a pool of its own, which keeps what it once took.
        invariant_pages: of a sequence, at most, if the kernel is to be invariant.
    """
    plans = plan(shape, rounded, target, invariant_pages is not None)
    share = shape.q_heads // shape.kv_heads
    rows = _rows(plans, shape, format)
    products, direct = plans.products(shape), plans.direct(shape, format)
    task = Sums.bytes(rows, shape.head_dim, shape.page_size) * (2 if plans.invariant else 1)
    task += max(products.scratch_bytes(rows), direct.scratch_bytes())
    task += 4 * (plans.tokens(shape) + share)
    step = 4 * (batch + 1) * 3 + 4 * batch * shape.kv_heads
    few = min(FEW, plans.tokens(shape))
    return threads * task + step + Parts.bytes(shape, batch, few, invariant_pages)


def _rows(plan: Plan, shape: AttentionShape, format: KVFormat) -> int:
    """Rows that a task keeps: of full blocks, many or one."""
    block, share = plan.products(shape).rows, shape.q_heads // shape.kv_heads
    direct = plan.direct(shape, format)
    return max(
        -(-plan.tokens(shape) * share // block) * block,
        direct.together * direct.passes * direct.rows,
    )


@functools.cache  # every layer asks
def _attend_kernel(
    shape: AttentionShape, format: KVFormat, dtype: str, plan: Plan
) -> tirx.PrimFunc:
    heads, dim, page = shape.kv_heads, shape.head_dim, shape.page_size
    share = shape.q_heads // heads
    tokens, kept_rows = plan.tokens(shape), _rows(plan, shape, format)
    few = min(FEW, tokens)
    products, direct = plan.products(shape), plan.direct(shape, format)

    def tasks(tables: Tables, sequence: Expr) -> Expr:
        """Per KV head."""
        rows = tables.rows(sequence)
        return T.if_then_else(
            rows <= few, parts_of(tables, sequence), (rows + tokens - 1) // tokens
        )

    def heads_of(tables: Tables, sequence: Expr) -> Expr:
        """KV heads that a task takes: those of a short context are for several threads."""
        if plan.invariant:
            return T.int32(1)
        long = T.And(tables.rows(sequence) == 1, tables.pages(sequence) >= LONG)
        return T.if_then_else(long, direct.together, 1)

    def body() -> None:
        tables = Tables.declare(shape, format, dtype, by_position=plan.invariant)
        batch = tables.batch
        # Of the sequences before each: tasks, and rows of parts. The last entry counts all.
        before, slots = scratch(batch + 1, "int32"), scratch(batch + 1, "int32")
        done = scratch(batch * heads, "int32")
        T.buffer_store(before, 0, [0])
        T.buffer_store(slots, 0, [0])
        with T.serial(batch) as i:
            rows = tables.rows(i)
            kept = T.if_then_else(rows <= few, parts_of(tables, i) * rows, 0)
            T.buffer_store(before, before[i] + tasks(tables, i), [i + 1])
            T.buffer_store(slots, slots[i] + kept, [i + 1])
        with T.serial(batch * heads) as i:
            T.buffer_store(done, 0, [i])
        parts = Parts.declare(tables, few, slots, done)

        def run(sequence: Expr, head: Expr, index: Expr) -> None:
            with T.If(head % heads_of(tables, sequence) == 0), T.Then():
                run_task(tables, parts, sequence, head, index)

        take_tasks(before, batch, heads, run)

    def run_task(tables: Tables, parts: Parts, sequence, head, index) -> None:
        """Task `index` of a sequence and KV head."""
        kept = Sums.declare(kept_rows, dim, page)
        whole = Sums.declare(kept_rows, dim, page) if plan.invariant else None
        queries = scratch(tokens, "int32")
        numbers, starts = scratch(2 * PAGES, "int32"), scratch(PAGES, "int32")
        pages = CachedRound(tables, head, numbers, starts, format=format)
        # First row, rows, first page, the page after the last one.
        plan_ = scratch(4, "int32")
        first, count, begin, end = (plan_[i] for i in range(4))
        rows, start = tables.rows(sequence), tables.row_offsets[sequence]

        def element(beside: Expr | int, row: Expr):
            token = first + T.min(row // share, count - 1)
            q_head = (head + beside) * share + row % share

            def load(i: Expr, lanes: int) -> Expr:
                value = tables.q.vload([token, q_head, i], vector(dtype, lanes))
                return to_float32(value, lanes) * splat(shape.exponent_scale, lanes)

            return load

        def slope_of(beside: Expr | int, row: Expr) -> Expr:
            return tables.slope((head + beside) * share + row % share)

        slope = slope_of if shape.alibi else None
        with T.If(rows <= few):
            with T.Then():
                T.buffer_store(plan_, start, [0])
                T.buffer_store(plan_, rows, [1])
                each = pages_per_part(tables, sequence)
                T.buffer_store(plan_, index * each, [2])
                T.buffer_store(plan_, index * each + each, [3])
            with T.Else():
                T.buffer_store(plan_, start + index * tokens, [0])
                T.buffer_store(plan_, T.min(rows - index * tokens, tokens), [1])
                T.buffer_store(plan_, 0, [2])
                T.buffer_store(plan_, tables.pages(sequence), [3])
        with T.serial(T.min(tokens, count)) as t:
            T.buffer_store(queries, tables.positions[first + t], [t])
        seen = tables.pages_seen(sequence, queries[count - 1])
        T.buffer_store(plan_, T.min(end, seen), [3])

        def many() -> None:
            span_ = (begin, end, count, share)
            attend_rows(products, pages, kept, queries, element, sequence, *span_, whole, slope)

        if plan.invariant:
            many()
        else:
            with T.If(rows == 1):
                with T.Then():
                    beside = heads_of(tables, sequence)
                    span_ = (begin, end, beside)
                    attend_one(direct, pages, kept, queries, element, sequence, *span_, slope)
                with T.Else():
                    many()
        found = whole or kept

        def store(row: Expr, r: Expr, kv_head: Expr) -> None:
            """Row `row` of `found`, which is row `r` of a KV head."""
            total = reduce_sum(found.total.vload([row * page], vector("float32", page)), page)
            factor = scratch(3 if shape.sink_logits else 1, "float32")
            place = [first + r // share, kv_head * share + r % share]
            lanes = found.lanes
            if tables.sink_logits is None:
                T.buffer_store(factor, T.float32(1) / total, [0])
            else:
                # Here all parts are together, so the logit counts once.
                best = found.best[row]
                T.buffer_store(factor, tables.sink_logits[place[1]] * T.float32(LOG2E), [1])
                T.buffer_store(factor, T.max(best, factor[1]), [2])
                kept_weight, sink_weight = (exp2(x - factor[2], 1) for x in (best, factor[1]))
                norm = multiply_add(total, kept_weight, sink_weight)
                T.buffer_store(factor, kept_weight / norm, [0])
            with T.serial(dim // lanes) as i:
                value = get(found.sums, row * dim + i * lanes, lanes) * splat(factor[0], lanes)
                value = T.cast(value, vector(dtype, lanes))
                T.buffer_store(tables.out, value, [*place, span(i * lanes, lanes)])

        each = direct.passes * direct.rows
        with T.serial(heads_of(tables, sequence)) as beside:
            kv_head = head + beside
            with T.If(T.And(rows <= few, parts_of(tables, sequence) > 1)):
                with T.Then():
                    parts.keep(found, beside * each, sequence, index, kv_head, share, count)
                    finished = parts.finished(sequence, kv_head)
                    with T.If(finished == parts_of(tables, sequence) - 1), T.Then():
                        parts.merge(found, beside * each, sequence, kv_head, share, count)
                        with T.serial(count * share) as r:
                            store(beside * each + r, r, kv_head)
                with T.Else(), T.serial(count * share) as r:
                    store(beside * each + r, r, kv_head)

    return emit(body, [reduce_sum_ir(page), FETCH_ADD_IR, *products.imports])
