"""What CPU attention reads: the tables of a step, and the keys and values on the cache's pages."""

from dataclasses import dataclass, field
from typing import Protocol

import tvm
from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.builder import length, tensor
from relaxlm.compiler.kernels.cpu_float8 import decode_e4m3
from relaxlm.compiler.kernels.vector import LOG2E, prefetch, splat, to_float32, vector
from relaxlm.quantization.kv_cache import KVFormat

# Pages per round of the online softmax, even: of rows that share panels, and of a single row, whose
# next round had better be on its way soon.
PAGES = 8
PAGES_OF_ONE = 4
# Below any real score, but finite: a page of masked tokens must not give inf - inf.
MASKED = -1e30
# The position of tokens that are not there: after every query.
NOWHERE = 2**30
LINE = 64


@dataclass(frozen=True)
class Tables:
    """The kernel's arguments; the scales are those of an fp8 cache, else never read.

    Pages of a sequence are counted as its table lists them or, if `by_position`, as if none had
    been dropped: the token at position i is on page i // page_size, whatever the window has let go.
    """

    shape: AttentionShape
    by_position: bool
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
    sink_logits: tirx.Buffer | None
    slopes: tirx.Buffer | None
    out: tirx.Buffer

    @staticmethod
    def declare(
        shape: AttentionShape, format: KVFormat, dtype: str, by_position: bool = False
    ) -> "Tables":
        """Declare the parameters of a kernel, in order."""
        heads, dim, page = shape.kv_heads, shape.head_dim, shape.page_size
        n, batch, table, total = (length(name) for name in ("n", "batch", "table", "pages"))
        q = tensor("q", (n, shape.q_heads, dim), dtype)
        positions = tensor("positions", (n,), "int32")
        row_offsets = tensor("row_offsets", (batch + 1,), "int32")
        page_offsets = tensor("page_offsets", (batch + 1,), "int32")
        page_ids = tensor("page_ids", (table,), "int32")
        tensor("kv_lengths", (batch,), "int32")
        dropped = tensor("dropped", (batch,), "int32")
        k = tensor("k_pages", (total, heads, dim, page), format.dtype)
        v = tensor("v_pages", (total, heads, page, dim), format.dtype)
        k_scales, v_scales = k, v
        if format.scaled:
            k_scales = tensor("k_scales", (total, heads, page), "float32")
            v_scales = tensor("v_scales", (total, heads, page), "float32")
        sink_logits = (
            tensor("sink_logits", (shape.q_heads,), "float32") if shape.sink_logits else None
        )
        slopes = tensor("slopes", (shape.q_heads,), "float32") if shape.alibi else None
        out = tensor("out", (n, shape.q_heads, dim), dtype)
        return Tables(
            shape,
            by_position,
            *(q, positions, row_offsets, page_offsets, page_ids, dropped),
            *(k, v, k_scales, v_scales, sink_logits, slopes, out),
        )

    @property
    def batch(self) -> Expr:
        return self.dropped.shape[0]

    def pages(self, sequence: Expr) -> Expr:
        listed = self.page_offsets[sequence + 1] - self.page_offsets[sequence]
        return listed + self.gone(sequence) if self.by_position else listed

    def gone(self, sequence: Expr) -> Expr | int:
        """Pages that left the table between the sinks and the window."""
        page = self.shape.page_size
        return self.dropped[sequence] // page if self.shape.window > 0 else 0

    @property
    def sink_pages(self) -> int:
        return -(-self.shape.sinks // self.shape.page_size)

    def remains(self, sequence: Expr, first: Expr, end: Expr) -> Expr:
        """Whether any of the pages first .. end, counted by position, is in the table."""
        if self.shape.window <= 0:
            return T.bool(True)
        return T.Or(first < self.sink_pages, end > self.sink_pages + self.gone(sequence))

    def number(self, sequence: Expr, index: Expr) -> Expr:
        """The number of a sequence's page `index`; of a page that is gone, another's."""
        if self.by_position and self.shape.window > 0:
            moved = T.max(index - self.gone(sequence), self.sink_pages)
            index = T.if_then_else(index < self.sink_pages, index, moved)
        return self.page_ids[self.page_offsets[sequence] + index]

    def rows(self, sequence: Expr) -> Expr:
        return self.row_offsets[sequence + 1] - self.row_offsets[sequence]

    def pages_seen(self, sequence: Expr, query: Expr) -> Expr:
        """How many pages of a sequence have a token at or before `query`."""
        counted = self.shape.window <= 0 or self.by_position
        dropped = 0 if counted else self.dropped[sequence]
        return T.min(self.pages(sequence), (query - dropped) // self.shape.page_size + 1)

    def position(self, sequence: Expr, index: Expr) -> Expr:
        """Of the first token of a sequence's page `index`; `NOWHERE` if that is gone."""
        start = index * self.shape.page_size
        if self.shape.window <= 0:
            return start
        if self.by_position:
            return T.if_then_else(self.remains(sequence, index, index + 1), start, NOWHERE)
        return start + T.if_then_else(index >= self.sink_pages, self.dropped[sequence], 0)

    def slope(self, q_head: Expr) -> Expr:
        """What scores lose per token of distance, in powers of 2; of a shape with `alibi`."""
        assert self.slopes is not None
        return self.slopes[q_head] * T.float32(LOG2E)

    def visible(self, first: Expr, query: Expr) -> Expr:
        """Which tokens of the page that begins at position `first` a query sees: [page] bool."""
        page, window, sinks = self.shape.page_size, self.shape.window, self.shape.sinks
        token = T.broadcast(first, page) + T.ramp(T.int32(0), 1, page)
        mask = token <= T.broadcast(query, page)
        if window > 0:
            near = T.broadcast(self.shape.oldest(query), page) <= token
            if sinks > 0:
                near = near | (token < T.broadcast(T.int32(sinks), page))
            mask = mask & near
        return mask


class Sequences(Protocol):
    """What a task reads, as pages of tokens: sequences of the cache, or the texts of a step.

    Attributes:
        by_position: see `Tables`.
    """

    @property
    def shape(self) -> AttentionShape: ...

    @property
    def by_position(self) -> bool: ...

    def number(self, sequence: Expr, index: Expr) -> Expr:
        """Where a sequence's page `index` is."""

    def position(self, sequence: Expr, index: Expr) -> Expr:
        """Of the first token of a sequence's page `index`."""

    def pages_seen(self, sequence: Expr, query: Expr) -> Expr:
        """How many pages of a sequence the query at position `query` sees any token of."""

    def remains(self, sequence: Expr, first: Expr, end: Expr) -> Expr:
        """Whether any of the pages first .. end is still there."""

    def visible(self, first: Expr, query: Expr) -> Expr:
        """Which tokens of the page that begins at position `first` a query sees: [page] bool."""


@dataclass(frozen=True)
class Round:
    """Some pages of one KV head, and as many that come next.

    Attributes:
        numbers: [2 size] int32 or longer, which pages; those beyond the last repeat it.
        starts: [size] int32 or longer, the position of each one's first token; `NOWHERE` beyond the
            last.
        size: pages of the round.
    """

    tables: Sequences
    head: Expr
    numbers: tirx.Buffer
    starts: tirx.Buffer
    size: int = PAGES

    def find(self, sequence: Expr, first: Expr, end: Expr) -> None:
        """Look up the pages from `first` of a sequence on, of which there are `end`."""
        tables = self.tables
        with T.serial(2 * self.size) as i:
            number = tables.number(sequence, T.min(first + i, end - 1))
            T.buffer_store(self.numbers, number, [i])
        with T.serial(self.size) as i:
            start = tables.position(sequence, first + i)
            T.buffer_store(self.starts, T.if_then_else(first + i < end, start, NOWHERE), [i])

    def matters(self, query: Expr) -> Expr:
        """Whether a query, or a later one, sees any token of the round, causality apart."""
        shape, last = self.tables.shape, T.int32(0)
        if shape.window <= 0:
            return T.bool(True)
        for start in (self.starts[i] for i in range(self.size)):
            last = T.max(last, T.if_then_else(start == NOWHERE, 0, start))
        near = last + (shape.page_size - 1) >= shape.oldest(query)
        return near | (self.starts[0] < shape.sinks) if shape.sinks > 0 else near

    def stage(self, page: Expr) -> None:
        """Called before the keys of a page are read, feature after feature."""

    def keys(self, page: Expr, feature: Expr) -> Expr:
        """One feature of all tokens of a page: float32 [page]."""
        raise NotImplementedError

    def values(self, page: Expr, token: Expr, feature: Expr, lanes: int) -> Expr:
        """Neighbouring features of a token: float32 [lanes]."""
        raise NotImplementedError

    def times_key_scale(self, value: Expr, page: Expr) -> Expr:
        """Scores, or a feature, of a page's tokens times the scales of their keys."""
        return value

    def times_value_scale(self, value: Expr, page: Expr) -> Expr:
        """Weights of a page's tokens times the scales of their values."""
        return value

    def times_token_scale(self, value: Expr, page: Expr, token: Expr, lanes: int) -> Expr:
        """Features of one token's value times its scale."""
        return value

    def prefetch_keys(self, page: Expr, step: Expr, steps: int) -> None:
        """Ask for a page's share of this step, one of `steps` that ask for all of it."""

    def prefetch_values(self, page: Expr, step: Expr, steps: int) -> None:
        """The same for values."""


@dataclass(frozen=True)
class CachedRound(Round):
    """Pages of the cache; those of an fp8 cache have scales."""

    tables: Tables
    format: KVFormat = field(kw_only=True)

    def keys(self, page: Expr, feature: Expr) -> Expr:
        index = [*self._place(page), feature, 0]
        return self._stored(self.tables.k, index, self.tables.shape.page_size)

    def values(self, page: Expr, token: Expr, feature: Expr, lanes: int) -> Expr:
        return self._stored(self.tables.v, [*self._place(page), token, feature], lanes)

    def times_key_scale(self, value: Expr, page: Expr) -> Expr:
        return self._times(value, self.tables.k_scales, page)

    def times_value_scale(self, value: Expr, page: Expr) -> Expr:
        return self._times(value, self.tables.v_scales, page)

    def times_token_scale(self, value: Expr, page: Expr, token: Expr, lanes: int) -> Expr:
        if not self.format.scaled:
            return value
        return value * splat(self.tables.v_scales[(*self._place(page), token)], lanes)

    def prefetch_keys(self, page: Expr, step: Expr, steps: int) -> None:
        self._prefetch(self.tables.k, page, step, steps)

    def prefetch_values(self, page: Expr, step: Expr, steps: int) -> None:
        self._prefetch(self.tables.v, page, step, steps)

    def _place(self, page: Expr) -> list:
        # 64 bits: a cache may hold more than 2**31 elements.
        return [T.Cast("int64", self.numbers[page]), self.head]

    def _stored(self, pages: tirx.Buffer, index: list, lanes: int) -> Expr:
        if self.format.scaled:
            return decode_e4m3(pages.vload(index, vector("uint8", lanes)), lanes)
        return to_float32(pages.vload(index, vector(self.format.dtype, lanes)), lanes)

    def _times(self, value: Expr, scales: tirx.Buffer, page: Expr) -> Expr:
        if not self.format.scaled:
            return value
        lanes = vector("float32", self.tables.shape.page_size)
        return value * scales.vload([*self._place(page), 0], lanes)

    def _prefetch(self, pages: tirx.Buffer, page: Expr, step: Expr, steps: int) -> None:
        shape = self.tables.shape
        item = tvm.DataType(self.format.dtype).bits // 8
        size = shape.head_dim * shape.page_size
        per_step = -(-size // steps)
        for offset in range(0, per_step, LINE // item):
            at = step * per_step + offset
            row = int(pages.shape[3])
            prefetch(T.address_of(pages[(*self._place(page), at // row, at % row)]))
