"""Paged attention for CPUs: attend over the pages that `cpu_append.py` fills."""

import functools
from dataclasses import dataclass

import tvm
from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.cpu_append import append_kernel, page_tensors
from relaxlm.compiler.kernels.cpu_attention_block import (
    MASKED,
    PAGES,
    Block,
    Pages,
    Panel,
    loops,
    times,
)
from relaxlm.compiler.kernels.vector import (
    LOG2E,
    as_relax_kernel,
    exp2,
    import_reduce_sum,
)
from relaxlm.compiler.kernels.work_queue import (
    WORKERS,
    fetch_add,
    import_fetch_add,
)
from relaxlm.quantization.kv_cache import KVFormat

__all__ = ["append_kernel", "attend_kernel", "page_tensors"]

# A single row reads this many pages per task; longer contexts are shared out among threads.
SPLIT_PAGES = 2 * PAGES


@dataclass(frozen=True)
class _Arguments:
    """The buffers of the kernel; the scales are those of an fp8 cache, else never read."""

    q: tirx.Buffer
    positions: tirx.Buffer
    row_offsets: tirx.Buffer
    page_offsets: tirx.Buffer
    page_ids: tirx.Buffer
    dropped: tirx.Buffer
    k: tirx.Buffer
    v: tirx.Buffer
    k_scales: tirx.Buffer
    v_scales: tirx.Buffer
    out: tirx.Buffer

    def pages(self, sequence: Expr) -> Expr:
        return self.page_offsets[sequence + 1] - self.page_offsets[sequence]

    def rows(self, sequence: Expr) -> Expr:
        return self.row_offsets[sequence + 1] - self.row_offsets[sequence]


@dataclass(frozen=True)
class _Work:
    """What a task keeps: flat float32 buffers as `cpu_attention_block.loops` describes them,
    [tokens] positions of its queries, and page numbers and first positions of a round."""

    q: tirx.Buffer
    sums: tirx.Buffer
    best: tirx.Buffer
    total: tirx.Buffer
    scores: tirx.Buffer
    factors: tirx.Buffer
    queries: tirx.Buffer
    block: tirx.Buffer
    starts: tirx.Buffer


@dataclass(frozen=True)
class _Parts:
    """Results of the parts of long contexts: each with a leading axis of parts.

    `sums` [parts, q_heads, dim], `best` and `total` [parts, q_heads]; `done` counts the finished
    parts of each (sequence, KV head).
    """

    sums: tirx.Buffer
    best: tirx.Buffer
    total: tirx.Buffer
    done: tirx.Buffer


def attend_kernel(shape: AttentionShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    """Attention of n query rows over the pages of their sequences, with an online softmax.

    (q [n, q_heads, dim], positions [n], row_offsets [b + 1], page_offsets [b + 1], page_ids [p],
    kv_lengths [b], dropped [b], *page tensors) -> [n, q_heads, dim].

    Keys and values are read once for all query heads that share them. A sequence with several
    new rows is cut into blocks of rows, which read every page once and widen it to float32 once.
    A single row is cut along its context; the thread that finishes its last part merges the
    parts. Threads take tasks from a queue, the last rows of a prompt first: they see most.
    """
    target = tvm.target.Target.current(allow_none=True) or tvm.target.Target({"kind": "llvm"})
    wide = tvm.target.codegen.target_has_features("avx512f", target)
    return _attend_kernel(shape, format, dtype, 12 if wide else 4)


@functools.cache  # parsing TVMScript takes 0.2 s, and every layer asks
def _attend_kernel(
    shape: AttentionShape, format: KVFormat, dtype: str, registers: int
) -> tirx.PrimFunc:
    """`registers`: rows whose sums over 16 lanes fit into the CPU's registers; 12 or a divisor."""
    q_heads, heads, dim, page = shape.q_heads, shape.kv_heads, shape.head_dim, shape.page_size
    share = q_heads // heads
    window, sinks = shape.window, shape.sinks
    sink_pages = -(-sinks // page)
    # New tokens per task of a prompt: enough rows to widen pages for, and full blocks.
    tokens = 12 * max(1, 8 // share)
    many = Block(registers, dim, page)
    # The heads of a single row: as few blocks as possible, of equal size.
    passes = -(-share // registers)
    one = Block(-(-share // passes), dim, page)

    def visible(first, query):
        lane = T.broadcast(first, page) + T.ramp(T.int32(0), 1, page)
        mask = lane <= T.broadcast(query, page)
        if window > 0:
            near = T.broadcast(query - window, page) < lane
            if sinks > 0:
                near = near | (lane < T.broadcast(T.int32(sinks), page))
            mask = mask & near
        return mask

    def round_matters(work):
        """Whether any query sees any token of a round, causality apart."""
        if window <= 0:
            return T.bool(True)
        near = work.queries[0] - (work.starts[PAGES - 1] + page - 1) < window
        return near | (work.starts[0] < sinks) if sinks > 0 else near

    def absolute(index, dropped):
        return index * page + (T.if_then_else(index >= sink_pages, dropped, 0) if window > 0 else 0)

    def pages_seen(args, sequence, query):
        """How many pages of a sequence have a token at or before `query`."""
        dropped = args.dropped[sequence] if window > 0 else 0
        return T.min(args.pages(sequence), (query - dropped) // page + 1)

    def splits(args, sequence):
        return T.max((args.pages(sequence) + SPLIT_PAGES - 1) // SPLIT_PAGES, 1)

    def part(args, sequence, split):
        """The number of a part among all; p / SPLIT_PAGES + b is more than any."""
        return args.page_offsets[sequence] // SPLIT_PAGES + sequence + split

    def tasks(args, sequence):
        """Per KV head: parts of the context of a single row, or blocks of rows."""
        rows = args.rows(sequence)
        return T.if_then_else(rows == 1, splits(args, sequence), (rows + tokens - 1) // tokens)

    def stored(args, work, head):
        return Pages(format, page, work.block, head, args.k, args.v, args.k_scales, args.v_scales)

    def rounds(count):
        return (count + PAGES - 1) // PAGES

    def here(index, limit):
        """Pages in a round."""
        return T.min(limit[0] - index * PAGES, PAGES)

    @T.macro
    def start(args, work, head, first, count, size):
        """`size` rows of zeros, and q of `count` tokens from `first` on, the last one repeated."""
        for r in T.serial(size):
            work.best[r] = T.float32(MASKED)
            work.total[r] = T.float32(0)
            for d in T.vectorized(dim):
                work.sums[r * dim + d] = T.float32(0)
                work.q[r * dim + d] = T.cast(
                    args.q[first + T.min(r // share, count - 1), head * share + r % share, d],
                    "float32",
                ) * T.float32(shape.scale * LOG2E)

    @T.macro
    def find_round(args, work, sequence, index, limit):
        for c in T.unroll(PAGES):
            work.block[c] = args.page_ids[
                args.page_offsets[sequence] + T.min(index * PAGES + c, limit - 1)
            ]
            work.starts[c] = absolute(index * PAGES + c, args.dropped[sequence])

    @T.macro
    def widen(pages, panel, count):
        for c in T.serial(count):
            for d in T.serial(dim):
                panel.k[T.ramp((c * dim + d) * page, 1, page)] = times(
                    pages.keys(c, d), pages.key_scale(c)
                )
            for j in T.serial(page):
                for i in T.serial(dim // many.lanes):
                    panel.v[many.part((c * page + j) * dim + i * many.lanes)] = times(
                        pages.values(c, j, i * many.lanes, many.lanes),
                        pages.token_scale(c, j, many.lanes),
                    )

    @T.macro
    def finish(args, work, head, first, rows):
        for r in T.serial(rows):
            for d in T.vectorized(dim):
                args.out[first + r // share, head * share + r % share, d] = T.cast(
                    work.sums[r * dim + d] / work.total[r], dtype
                )

    @T.macro
    def merge(work, r, parts, index, head):
        work.factors[0] = T.max(work.best[r], parts.best[index, head])
        work.factors[1] = exp2(parts.best[index, head] - work.factors[0], 1)
        work.factors[0] = exp2(work.best[r] - work.factors[0], 1)
        work.best[r] = T.max(work.best[r], parts.best[index, head])
        work.total[r] = work.total[r] * work.factors[0] + parts.total[index, head] * work.factors[1]
        for d in T.vectorized(dim):
            work.sums[r * dim + d] = (
                work.sums[r * dim + d] * work.factors[0]
                + parts.sums[index, head, d] * work.factors[1]
            )

    attend_many, attend_one = loops(many, visible), loops(one, visible)

    @T.macro
    def attend_rows(args, sequence, head, first, count, work, panel, limit):
        """`count` rows from `first` on, over all pages that they see."""
        for t in T.serial(tokens):
            work.queries[t] = args.positions[first + T.min(t, count - 1)]
        limit[0] = pages_seen(args, sequence, work.queries[tokens - 1])
        start(args, work, head, first, count, tokens * share)
        for index in T.serial(rounds(limit[0])):
            find_round(args, work, sequence, index, limit[0])
            if round_matters(work):
                widen(stored(args, work, head), panel, here(index, limit))
                for block in T.serial((count * share + many.rows - 1) // many.rows):
                    attend_many(panel, work, here(index, limit), share, block * many.rows)
        finish(args, work, head, first, count * share)

    @T.macro
    def attend_part(args, sequence, head, first, split, work, limit, parts):
        """The heads of one row over `SPLIT_PAGES` pages; the last part to finish merges all."""
        work.queries[0] = args.positions[first]
        limit[0] = pages_seen(args, sequence, work.queries[0])
        start(args, work, head, first, 1, passes * one.rows)
        for index in T.serial(
            split * (SPLIT_PAGES // PAGES),
            T.min((split + 1) * (SPLIT_PAGES // PAGES), rounds(limit[0])),
        ):
            find_round(args, work, sequence, index, limit[0])
            if round_matters(work):
                for block in T.serial(passes):
                    attend_one(
                        stored(args, work, head),
                        work,
                        here(index, limit),
                        passes * one.rows,  # every row has the same query
                        block * one.rows,
                    )
        if splits(args, sequence) == 1:
            finish(args, work, head, first, share)
        else:
            for r in T.serial(share):
                parts.best[part(args, sequence, split), head * share + r] = work.best[r]
                parts.total[part(args, sequence, split), head * share + r] = work.total[r]
                for d in T.vectorized(dim):
                    parts.sums[part(args, sequence, split), head * share + r, d] = work.sums[
                        r * dim + d
                    ]
            if fetch_add(parts.done, sequence * heads + head) == splits(args, sequence) - 1:
                start(args, work, head, first, 1, share)
                for s in T.serial(splits(args, sequence)):
                    for r in T.serial(share):
                        merge(work, r, parts, part(args, sequence, s), head * share + r)
                finish(args, work, head, first, share)

    @T.macro
    def run_task(args, sequence, head, index, parts):
        """Task `index` of a sequence, counted from its end."""
        queries = T.decl_buffer((tokens,), "int32", scope="global")
        block = T.decl_buffer((PAGES,), "int32", scope="global")
        starts = T.decl_buffer((PAGES,), "int32", scope="global")
        limit = T.decl_buffer((1,), "int32", scope="global")
        q = T.decl_buffer((tokens * share * dim,), "float32", scope="global")
        sums = T.decl_buffer((tokens * share * dim,), "float32", scope="global")
        scores = T.decl_buffer((many.rows * many.width,), "float32", scope="global")
        best = T.decl_buffer((tokens * share,), "float32", scope="global")
        total = T.decl_buffer((tokens * share,), "float32", scope="global")
        factors = T.decl_buffer((many.rows,), "float32", scope="global")
        if args.rows(sequence) == 1:
            attend_part(
                args,
                sequence,
                head,
                args.row_offsets[sequence],
                index,
                _Work(q, sums, best, total, scores, factors, queries, block, starts),
                limit,
                parts,
            )
        else:
            k_panel = T.decl_buffer((PAGES * dim * page,), "float32", scope="global")
            v_panel = T.decl_buffer((PAGES * dim * page,), "float32", scope="global")
            attend_rows(
                args,
                sequence,
                head,
                args.row_offsets[sequence] + index * tokens,
                T.min(args.rows(sequence) - index * tokens, tokens),
                _Work(q, sums, best, total, scores, factors, queries, block, starts),
                Panel(many, k_panel, v_panel),
                limit,
            )

    @T.macro
    def run(args, batch, table):
        part_sums = T.decl_buffer(
            (table // SPLIT_PAGES + batch, q_heads, dim), "float32", scope="global"
        )
        part_best = T.decl_buffer(
            (table // SPLIT_PAGES + batch, q_heads), "float32", scope="global"
        )
        part_total = T.decl_buffer(
            (table // SPLIT_PAGES + batch, q_heads), "float32", scope="global"
        )
        done = T.decl_buffer((batch * heads,), "int32", scope="global")
        next_task = T.decl_buffer((16,), "int32", scope="global")
        # Tasks of the sequences before each; the last entry counts all.
        before = T.decl_buffer((batch + 1,), "int32", scope="global")
        # Taking the address keeps TVM from narrowing the buffers to what it thinks is read.
        T.evaluate(T.address_of(part_sums[0, 0, 0]))
        T.evaluate(T.address_of(part_best[0, 0]))
        T.evaluate(T.address_of(part_total[0, 0]))
        before[0] = 0
        next_task[0] = 0
        for i in T.serial(batch):
            before[i + 1] = before[i] + tasks(args, i)
            for head in T.serial(heads):
                done[i * heads + head] = 0
        for _worker in T.parallel(T.min(before[batch] * heads, WORKERS)):
            task = T.decl_buffer((4,), "int32", scope="global")
            task[0] = before[batch] * heads - 1 - fetch_add(next_task, 0)
            while task[0] >= 0:
                # The sequence of this task: the last one whose tasks start at or before it.
                task[1] = 0
                task[2] = T.cast(batch, "int32")
                while task[2] - task[1] > 1:
                    if before[(task[1] + task[2]) // 2] <= task[0] // heads:
                        task[1] = (task[1] + task[2]) // 2
                    else:
                        task[2] = (task[1] + task[2]) // 2
                run_task(
                    args,
                    task[1],
                    task[0] % heads,
                    task[0] // heads - before[task[1]],
                    _Parts(part_sums, part_best, part_total, done),
                )
                task[0] = before[batch] * heads - 1 - fetch_add(next_task, 0)

    def complete(kernel):
        return as_relax_kernel(import_fetch_add(import_reduce_sum(kernel, page)))

    if format.scaled:

        @T.prim_func(s_tir=True, check_well_formed=False)
        def attend_scaled(
            q_h: T.handle,
            positions_h: T.handle,
            row_offsets_h: T.handle,
            page_offsets_h: T.handle,
            page_ids_h: T.handle,
            kv_lengths_h: T.handle,
            dropped_h: T.handle,
            k_pages_h: T.handle,
            v_pages_h: T.handle,
            k_scales_h: T.handle,
            v_scales_h: T.handle,
            out_h: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            n, batch, table, pages = T.int64(), T.int64(), T.int64(), T.int64()
            q = T.match_buffer(q_h, (n, q_heads, dim), dtype)
            positions = T.match_buffer(positions_h, (n,), "int32")
            row_offsets = T.match_buffer(row_offsets_h, (batch + 1,), "int32")
            page_offsets = T.match_buffer(page_offsets_h, (batch + 1,), "int32")
            page_ids = T.match_buffer(page_ids_h, (table,), "int32")
            _kv_lengths = T.match_buffer(kv_lengths_h, (batch,), "int32")
            dropped = T.match_buffer(dropped_h, (batch,), "int32")
            k = T.match_buffer(k_pages_h, (pages, heads, dim, page), "uint8")
            v = T.match_buffer(v_pages_h, (pages, heads, page, dim), "uint8")
            k_scales = T.match_buffer(k_scales_h, (pages, heads, page), "float32")
            v_scales = T.match_buffer(v_scales_h, (pages, heads, page), "float32")
            out = T.match_buffer(out_h, (n, q_heads, dim), dtype)
            run(
                _Arguments(
                    q,
                    positions,
                    row_offsets,
                    page_offsets,
                    page_ids,
                    dropped,
                    k,
                    v,
                    k_scales,
                    v_scales,
                    out,
                ),
                batch,
                table,
            )

        return complete(attend_scaled)

    @T.prim_func(s_tir=True, check_well_formed=False)
    def attend(
        q_h: T.handle,
        positions_h: T.handle,
        row_offsets_h: T.handle,
        page_offsets_h: T.handle,
        page_ids_h: T.handle,
        kv_lengths_h: T.handle,
        dropped_h: T.handle,
        k_pages_h: T.handle,
        v_pages_h: T.handle,
        out_h: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        n, batch, table, pages = T.int64(), T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_h, (n, q_heads, dim), dtype)
        positions = T.match_buffer(positions_h, (n,), "int32")
        row_offsets = T.match_buffer(row_offsets_h, (batch + 1,), "int32")
        page_offsets = T.match_buffer(page_offsets_h, (batch + 1,), "int32")
        page_ids = T.match_buffer(page_ids_h, (table,), "int32")
        _kv_lengths = T.match_buffer(kv_lengths_h, (batch,), "int32")
        dropped = T.match_buffer(dropped_h, (batch,), "int32")
        k = T.match_buffer(k_pages_h, (pages, heads, dim, page), format.dtype)
        v = T.match_buffer(v_pages_h, (pages, heads, page, dim), format.dtype)
        out = T.match_buffer(out_h, (n, q_heads, dim), dtype)
        run(
            _Arguments(q, positions, row_offsets, page_offsets, page_ids, dropped, k, v, k, v, out),
            batch,
            table,
        )

    return complete(attend)
