"""Attention of encoders on CPUs: every token of a text against all of its tokens.

Keys and values are those of the step itself, in the rows that the projection left them in. A task
is one KV head of one text against a block of the text's rows; threads take tasks from a queue,
since texts differ in length. Inside, it is what many rows of a decoder's prompt are
(`cpu_attention_rows.py`): 16 rows of a text stand for a page of the cache, and every query sees
what the text's last token would.
"""

import functools
from dataclasses import dataclass, field

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.target import Target

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.builder import emit, length, scratch, tensor
from relaxlm.compiler.kernels.cpu_attention import Plan, plan
from relaxlm.compiler.kernels.cpu_attention_pages import PAGES, Round
from relaxlm.compiler.kernels.cpu_attention_products import get, put, span
from relaxlm.compiler.kernels.cpu_attention_rows import attend_rows
from relaxlm.compiler.kernels.cpu_attention_softmax import Sums
from relaxlm.compiler.kernels.cpu_transpose import LANES, transpose_lines
from relaxlm.compiler.kernels.vector import reduce_sum, reduce_sum_ir, splat, vector
from relaxlm.compiler.kernels.work_queue import FETCH_ADD_IR, take_tasks

# Query rows of a task, about: filling the panels costs as much as 20 rows, and a single text of a
# few hundred tokens is to keep all threads busy.
TASK_ROWS = 128


@dataclass(frozen=True)
class Texts:
    """The kernel's arguments, seen as sequences with pages of 16 tokens (see `Tables`)."""

    shape: AttentionShape
    qkv: tirx.Buffer
    row_offsets: tirx.Buffer
    out: tirx.Buffer
    by_position: bool = False

    @staticmethod
    def declare(shape: AttentionShape) -> "Texts":
        """Declare the parameters of a kernel, in order."""
        n, offsets, dim = length("n"), length("offsets"), shape.head_dim
        heads = shape.q_heads + 2 * shape.kv_heads
        qkv = tensor("qkv", (n, heads, dim), "float32")
        row_offsets = tensor("row_offsets", (offsets,), "int32")
        out = tensor("out", (n, shape.q_heads * dim), "float32")
        return Texts(shape, qkv, row_offsets, out)

    @property
    def batch(self) -> Expr:
        return self.row_offsets.shape[0] - 1

    @property
    def last_row(self) -> Expr:
        """Of the step."""
        return T.cast(self.qkv.shape[0], "int32") - 1

    def rows(self, text: Expr) -> Expr:
        return self.row_offsets[text + 1] - self.row_offsets[text]

    def pages(self, text: Expr) -> Expr:
        return (self.rows(text) + self.shape.page_size - 1) // self.shape.page_size

    def number(self, text: Expr, index: Expr) -> Expr:
        """The first row of a text's page `index`."""
        return self.row_offsets[text] + index * self.shape.page_size

    def position(self, text: Expr, index: Expr) -> Expr:
        return index * self.shape.page_size

    def pages_seen(self, text: Expr, query: Expr) -> Expr:
        return self.pages(text)

    def remains(self, text: Expr, first: Expr, end: Expr) -> Expr:
        return T.bool(True)

    def visible(self, first: Expr, query: Expr) -> Expr:
        page = self.shape.page_size
        token = T.broadcast(first, page) + T.ramp(T.int32(0), 1, page)
        return token <= T.broadcast(query, page)


@dataclass(frozen=True)
class TextRound(Round):
    """Some pages of one KV head of a text.

    Rows behind a text's last one are those of the next text, or the step's last row again; no query
    sees them.

    Attributes:
        turned: [head_dim, page] float32, the keys of the page that was staged.
    """

    tables: Texts
    turned: tirx.Buffer = field(kw_only=True)

    def _row(self, page: Expr, token: Expr) -> Expr:
        return T.min(self.numbers[page] + token, self.tables.last_row)

    def stage(self, page: Expr) -> None:
        shape, qkv = self.tables.shape, self.tables.qkv
        size, dim, head = shape.page_size, shape.head_dim, shape.q_heads + self.head
        if dim % LANES:
            with T.serial(size) as t, T.serial(dim) as d:
                T.buffer_store(self.turned, qkv[self._row(page, t), head, d], [d * size + t])
            return
        stride = int(qkv.shape[1]) * dim
        with T.serial(dim // LANES) as part:
            target = T.address_of(self.turned[part * LANES * size])
            with T.If(self.numbers[page] + (size - 1) <= self.tables.last_row):
                with T.Then():
                    source = T.address_of(qkv[self.numbers[page], head, part * LANES])
                    _transpose(source, stride, target)
                with T.Else():
                    square = scratch(size * LANES, "float32")
                    with T.serial(size) as t:
                        index = [self._row(page, t), head, part * LANES]
                        value = qkv.vload(index, vector("float32", LANES))
                        put(square, t * LANES, value, LANES)
                    _transpose(T.address_of(square[0]), LANES, target)

    def keys(self, page: Expr, feature: Expr) -> Expr:
        size = self.tables.shape.page_size
        return get(self.turned, feature * size, size)

    def values(self, page: Expr, token: Expr, feature: Expr, lanes: int) -> Expr:
        shape = self.tables.shape
        head = shape.q_heads + shape.kv_heads + self.head
        index = [self._row(page, token), head, feature]
        return self.tables.qkv.vload(index, vector("float32", lanes))


def _transpose(source: Expr, stride: int, target: Expr) -> None:
    """A square of 16 rows `stride` elements apart, to 16 rows one after the other."""
    T.evaluate(T.call_extern("void", "relaxlm_transpose", source, T.int64(stride), target))


def _transpose_ir() -> str:
    rows = [f"%r{i}" for i in range(LANES)]
    moved, columns = transpose_lines(rows, "float", "%t")
    lines = ["define void @relaxlm_transpose(ptr %s, i64 %n, ptr %d) alwaysinline nounwind {"]
    for i, row in enumerate(rows):
        lines += [
            f"  %o{i} = mul i64 %n, {i}",
            f"  %s{i} = getelementptr float, ptr %s, i64 %o{i}",
            f"  {row} = load <16 x float>, ptr %s{i}, align 4",
        ]
    lines += moved
    for i, column in enumerate(columns):
        lines += [
            f"  %d{i} = getelementptr float, ptr %d, i64 {i * LANES}",
            f"  store <16 x float> {column}, ptr %d{i}, align 4",
        ]
    return "\n".join([*lines, "  ret void", "}"])


def _tokens(shape: AttentionShape, plans: Plan) -> int:
    """Tokens of a task; full blocks of rows."""
    block, share = plans.products(shape).rows, shape.q_heads // shape.kv_heads
    return block * max(1, -(-TASK_ROWS // (block * share)))


def attend_kernel(shape: AttentionShape, dtype: str, rounded: bool = False) -> tirx.PrimFunc:
    """Bidirectional attention over ragged texts, with an online softmax.

    (qkv [n, q_heads + 2 kv_heads, dim], row_offsets [b + 1]) -> [n, q_heads * dim].

    Args:
        dtype: of both; float32.
        rounded: whether q, keys, values and weights may be rounded to bfloat16, on CPUs that
            multiply such numbers faster. Sums stay float32.
    """
    assert dtype == "float32", dtype
    return _attend_kernel(shape, plan(shape, rounded, Target.current(allow_none=True)))


def attend_workspace_bytes(
    shape: AttentionShape, batch: int, threads: int, rounded: bool, target: Target | None
) -> int:
    """The most memory that a call of the kernel takes from TVM's pools, in bytes."""
    plans = plan(shape, rounded, target)
    products, share = plans.products(shape), shape.q_heads // shape.kv_heads
    rows = _tokens(shape, plans) * share
    task = Sums.bytes(rows, shape.head_dim, shape.page_size) + products.scratch_bytes(rows)
    task += 4 * (rows + shape.head_dim * shape.page_size)
    return threads * task + 4 * (batch + 1)


@functools.cache  # every layer asks
def _attend_kernel(shape: AttentionShape, plans: Plan) -> tirx.PrimFunc:
    heads, dim, page = shape.kv_heads, shape.head_dim, shape.page_size
    share, products, tokens = shape.q_heads // heads, plans.products(shape), _tokens(shape, plans)

    def body() -> None:
        texts = Texts.declare(shape)
        batch = texts.batch
        before = scratch(batch + 1, "int32")
        T.buffer_store(before, 0, [0])
        with T.serial(batch) as i:
            blocks = (texts.rows(i) + tokens - 1) // tokens
            T.buffer_store(before, before[i] + blocks, [i + 1])
        take_tasks(before, batch, heads, lambda *task: run_task(texts, *task))

    def run_task(texts: Texts, text: Expr, head: Expr, index: Expr) -> None:
        kept, queries = Sums.declare(tokens * share, dim, page), scratch(tokens, "int32")
        numbers, starts = scratch(2 * PAGES, "int32"), scratch(PAGES, "int32")
        turned = scratch(dim * page, "float32")
        pages = TextRound(texts, head, numbers, starts, turned=turned)
        first, count = texts.row_offsets[text] + index * tokens, texts.rows(text) - index * tokens
        count = T.min(count, tokens)

        def element(beside: Expr | int, row: Expr):
            token, q_head = first + T.min(row // share, count - 1), head * share + row % share

            def load(i: Expr, lanes: int) -> Expr:
                value = texts.qkv.vload([token, q_head, i], vector("float32", lanes))
                return value * splat(shape.exponent_scale, lanes)

            return load

        with T.serial(count) as t:
            T.buffer_store(queries, texts.rows(text) - 1, [t])
        end = texts.pages(text)
        attend_rows(products, pages, kept, queries, element, text, T.int32(0), end, count, share)
        with T.serial(count * share) as r:
            factor, lanes = scratch(1, "float32"), kept.lanes
            total = reduce_sum(kept.total.vload([r * page], vector("float32", page)), page)
            T.buffer_store(factor, T.float32(1) / total, [0])
            at = (head * share + r % share) * dim
            with T.serial(dim // lanes) as i:
                value = get(kept.sums, r * dim + i * lanes, lanes) * splat(factor[0], lanes)
                T.buffer_store(texts.out, value, [first + r // share, span(at + i * lanes, lanes)])

    imports = [reduce_sum_ir(page), FETCH_ADD_IR, *products.imports]
    return emit(body, [*imports, _transpose_ir()])
