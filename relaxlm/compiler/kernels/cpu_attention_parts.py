"""Contexts of a few rows in parts: which thread attends over which pages, and how parts merge."""

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.builder import scratch
from relaxlm.compiler.kernels.cpu_attention_pages import PAGES, Tables
from relaxlm.compiler.kernels.cpu_attention_products import get, put
from relaxlm.compiler.kernels.cpu_attention_softmax import Sums
from relaxlm.compiler.kernels.vector import exp2, splat
from relaxlm.compiler.kernels.work_queue import fetch_add

# A part has at least so many pages: two rounds.
SHORTEST = 2 * PAGES
# A step with fewer tasks than this is split; more parts than needed are slower, since the first
# pages of each cannot be asked for before it begins.
TASKS = 16


def most_parts(shape: AttentionShape, batch: Expr) -> Expr:
    """Parts of each sequence with few rows that make `TASKS` tasks of all of them."""
    tasks = batch * shape.kv_heads
    return (TASKS + tasks - 1) // tasks


def parts_of(tables: Tables, sequence: Expr) -> Expr:
    """Parts of the context of a sequence with few rows."""
    long = (tables.pages(sequence) + SHORTEST - 1) // SHORTEST
    most = T.cast(most_parts(tables.shape, tables.batch), "int32")
    return T.max(T.min(long, most), 1)


def pages_per_part(pages: Expr, parts: Expr) -> Expr:
    """Full rounds of pages, but for the last part."""
    rounds = (pages + PAGES - 1) // PAGES
    return (rounds + parts - 1) // parts * PAGES


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
    def bytes(shape: AttentionShape, batch: int, few: int) -> int:
        """The most that `declare` takes for up to `batch` sequences of up to `few` rows."""
        rows = max(n * few * int(most_parts(shape, n)) for n in range(1, batch + 1))
        return 4 * rows * shape.q_heads * (shape.head_dim + 1 + shape.page_size)

    @staticmethod
    def declare(tables: Tables, few: int, slots: tirx.Buffer, done: tirx.Buffer) -> "Parts":
        """Space for sequences of up to `few` rows."""
        shape, batch = tables.shape, tables.batch
        # Not from `slots`: TVM wants lengths that are known before the first loop.
        longest = T.min(tables.q.shape[0] - batch + 1, few)
        rows = batch * longest * most_parts(shape, batch) * shape.q_heads
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
                with T.If(self.best[row] > kept.best[r]), T.Then():
                    kept.rescale(r, self.best[row])
                factor = scratch(1, "float32")
                T.buffer_store(factor, exp2(self.best[row] - kept.best[r], 1), [0])
                total = get(self.total, row * page, page) * splat(factor[0], page)
                put(kept.total, r * page, get(kept.total, r * page, page) + total, page)
                with T.serial(dim // lanes) as i:
                    value = get(self.sums, row * dim + i * lanes, lanes) * splat(factor[0], lanes)
                    at = r * dim + i * lanes
                    put(kept.sums, at, get(kept.sums, at, lanes) + value, lanes)
