"""Contexts of a few rows in parts: which thread attends over which pages, and how parts merge.

If pages count by position (`Tables.by_position`), parts begin at multiples of `FIXED` pages. Each
is collected for itself, and they are merged from the first to the last, whether a thread took one
of them or all. So what a row finds depends on nothing but its position.
"""

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.builder import scratch
from relaxlm.compiler.kernels.cpu_attention_pages import PAGES, Tables
from relaxlm.compiler.kernels.cpu_attention_products import get, put
from relaxlm.compiler.kernels.cpu_attention_softmax import Sums
from relaxlm.compiler.kernels.work_queue import fetch_add

# A part has at least so many pages: two rounds.
SHORTEST = 2 * PAGES
# A step with fewer tasks than this is split; more parts than needed are slower, since the first
# pages of each cannot be asked for before it begins.
TASKS = 16
# Pages of a part whose place is fixed: full rounds.
FIXED = 4 * PAGES


def most_parts(shape: AttentionShape, batch: Expr) -> Expr:
    """Parts of each sequence with few rows that make `TASKS` tasks of all of them."""
    tasks = batch * shape.kv_heads
    return (TASKS + tasks - 1) // tasks


def parts_of(tables: Tables, sequence: Expr) -> Expr:
    """Parts of the context of a sequence with few rows, as tasks."""
    if tables.by_position:
        if tables.shape.window > 0:  # what a row sees is short
            return T.int32(1)
        fixed = (tables.pages(sequence) + FIXED - 1) // FIXED
        return T.if_then_else(_splits(tables.shape, tables.batch), fixed, 1)
    long = (tables.pages(sequence) + SHORTEST - 1) // SHORTEST
    most = T.cast(most_parts(tables.shape, tables.batch), "int32")
    return T.max(T.min(long, most), 1)


def pages_per_part(tables: Tables, sequence: Expr) -> Expr:
    """Full rounds of pages, but for the last part."""
    pages, parts = tables.pages(sequence), parts_of(tables, sequence)
    if tables.by_position:
        return T.if_then_else(parts > 1, FIXED, pages)
    rounds = (pages + PAGES - 1) // PAGES
    return (rounds + parts - 1) // parts * PAGES


def _splits(shape: AttentionShape, batch: Expr) -> Expr:
    """Whether fixed parts are tasks of their own: otherwise there are enough tasks."""
    return batch * shape.kv_heads < TASKS


@dataclass(frozen=True)
class Parts:
    """What parts leave for the thread that merges them.

    A sequence's parts lie from row `slots[sequence]` on, [part, token, q_heads].

    Attributes:
        sums: [rows, q_heads, dim]; best, total: [rows, q_heads]; see `Sums`.
        done: [batch, kv_heads] finished parts.
    """

    tables: Tables
    slots: tirx.Buffer
    sums: tirx.Buffer
    best: tirx.Buffer
    total: tirx.Buffer
    done: tirx.Buffer

    @staticmethod
    def bytes(shape: AttentionShape, batch: int, few: int, pages: int | None = None) -> int:
        """The most that `declare` takes for up to `batch` sequences of up to `few` rows.

        Args:
            pages: of a sequence at most, if rows lie by position.
        """
        if pages is None:
            rows = max(n * few * int(most_parts(shape, n)) for n in range(1, batch + 1))
        else:
            split = min(batch, (TASKS - 1) // shape.kv_heads)
            rows = few * (split * pages // FIXED + split)
        return 4 * rows * shape.q_heads * (shape.head_dim + 1 + shape.page_size)

    @staticmethod
    def declare(tables: Tables, few: int, slots: tirx.Buffer, done: tirx.Buffer) -> "Parts":
        """Space for sequences of up to `few` rows."""
        shape, batch = tables.shape, tables.batch
        # Not from `slots`: TVM wants lengths that are known before the first loop.
        longest = T.min(tables.q.shape[0] - batch + 1, few)
        parts = batch * most_parts(shape, batch)
        if tables.by_position:
            fixed = tables.page_ids.shape[0] // FIXED + batch
            parts = T.if_then_else(_splits(shape, batch), fixed, 0 * batch)
        rows = longest * parts * shape.q_heads
        sums = scratch(rows * shape.head_dim, "float32")
        best = scratch(rows, "float32")
        total = scratch(rows * shape.page_size, "float32")
        return Parts(tables, slots, sums, best, total, done)

    def _row(self, sequence: Expr, part: Expr, r: Expr, head: Expr, share: int, count: Expr):
        """Where a part keeps row r of a task, whose heads share KV head `head`."""
        token = self.slots[sequence] + part * count + r // share
        return token * self.tables.shape.q_heads + head * share + r % share

    def keep(self, kept: Sums, first: Expr, sequence, part, head, share: int, count: Expr) -> None:
        """Leave what a task of `count` tokens has found, in `kept` from row `first` on."""
        with T.serial(count * share) as index:
            r = first + index
            row = self._row(sequence, part, index, head, share, count)
            T.buffer_store(self.best, kept.best[r], [row])
            put(self.total, row * kept.page, get(kept.total, r * kept.page, kept.page), kept.page)
            with T.serial(kept.dim // kept.lanes) as i:
                value = get(kept.sums, r * kept.dim + i * kept.lanes, kept.lanes)
                put(self.sums, row * kept.dim + i * kept.lanes, value, kept.lanes)

    def finished(self, sequence: Expr, head: Expr) -> Expr:
        """Count this part; how many were finished before."""
        return fetch_add(self.done, sequence * self.tables.shape.kv_heads + head)

    def merge(self, kept: Sums, first: Expr, sequence, head, share: int, count: Expr) -> None:
        """Put all parts together in `kept`, from row `first` on."""
        page, dim, lanes = kept.page, kept.dim, kept.lanes
        with T.serial(count * share) as index:
            r = first + index
            kept.clear(r)
            with T.serial(parts_of(self.tables, sequence)) as part:
                row = self._row(sequence, part, index, head, share, count)

                def value(i: Expr, row: Expr = row) -> Expr:
                    return get(self.sums, row * dim + i * lanes, lanes)

                kept.absorb(r, self.best[row], get(self.total, row * page, page), value)
