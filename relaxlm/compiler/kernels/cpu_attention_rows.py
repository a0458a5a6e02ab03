"""The rounds of a task of CPU attention: a few pages at a time against all of its rows."""

from collections.abc import Callable
from dataclasses import replace

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import scratch
from relaxlm.compiler.kernels.cpu_attention_one import Direct
from relaxlm.compiler.kernels.cpu_attention_pages import PAGES, Round
from relaxlm.compiler.kernels.cpu_attention_products import Products
from relaxlm.compiler.kernels.cpu_attention_softmax import Sums, soften

# (KV head, counted from the task's first; row of that head) -> (i, lanes) -> that many elements of
# the scaled query from i on, float32.
Query = Callable[[Expr | int, Expr], Callable[[Expr, int], Expr]]


def attend_one(
    direct: Direct,
    pages: Round,
    kept: Sums,
    queries: tirx.Buffer,
    element: Query,
    sequence: Expr,
    begin: Expr,
    end: Expr,
    heads: Expr,
) -> None:
    """The query heads of `heads` KV heads of a single row over pages begin .. end.

    Row r of `kept` is query head r % each of KV head r // each, each = direct.passes * direct.rows;
    `queries[0]` is the row's position.
    """
    direct.declare()
    each = direct.passes * direct.rows
    with T.serial(heads * each) as r:
        kept.clear(r)
        direct.put_query(r, element(r // each, r % each))
    with T.serial((end - begin + PAGES - 1) // PAGES) as index:
        at = begin + index * PAGES
        pages.find(sequence, at, end)
        with T.If(pages.matters(queries[0])), T.Then():
            here = T.min(end - at, PAGES)
            with T.serial(heads * direct.passes) as number:
                first = number * direct.rows
                of_head = replace(pages, head=pages.head + number // direct.passes)
                direct.score(of_head, first, here)
                soften(
                    kept,
                    direct,
                    of_head,
                    first,
                    direct.rows,
                    (here + 1) // 2,
                    lambda row: queries[0],
                    masked=True,
                    scaled=direct.scaled,
                )
                direct.gather(of_head, first, here, kept.sums)


def attend_rows(
    products: Products,
    pages: Round,
    kept: Sums,
    queries: tirx.Buffer,
    element: Query,
    sequence: Expr,
    begin: Expr,
    end: Expr,
    count: Expr,
    share: int,
) -> None:
    """The heads of `count` tokens over pages begin .. end; row r is at queries[r // share]."""
    tables = pages.tables
    window, page = tables.shape.window, tables.shape.page_size
    block = products.rows
    blocks = (count * share + block - 1) // block
    products.declare(int(kept.best.shape[0]))
    products.begin()
    with T.serial(blocks * block) as r:
        kept.clear(r)
        products.put_query(r, element(0, r))
    with T.serial((end - begin + PAGES - 1) // PAGES) as index:
        at = begin + index * PAGES
        pages.find(sequence, at, end)
        with T.If(pages.matters(queries[0])), T.Then():
            with T.serial((T.min(end - at, PAGES) + 1) // 2) as pair:
                products.fill(pages, 2 * pair)
            with T.serial(blocks) as number:
                first = number * block
                rows = T.min(count * share - first, block)
                earliest = queries[first // share]
                latest = queries[(first + rows - 1) // share]
                # Pages of this round that the block's last row sees.
                seen = scratch(1, "int32")
                here = T.min(end, tables.pages_seen(sequence, latest)) - at
                T.buffer_store(seen, T.min(here, PAGES), [0])
                pairs = (seen[0] + 1) // 2
                # The pair may end with a page beyond the last.
                last = pages.starts[T.max(2 * pairs - 1, 0)]
                hidden = last + (page - 1) > earliest
                if window > 0:
                    hidden = hidden | (pages.starts[0] <= latest - window)
                with T.If(seen[0] > 0), T.Then():
                    products.score(first, pairs)

                    def weigh(masked: bool) -> None:
                        soften(
                            kept,
                            products,
                            pages,
                            first,
                            rows,
                            pairs,
                            lambda row: queries[row // share],
                            masked,
                        )

                    with T.If(hidden):
                        with T.Then():
                            weigh(True)
                        with T.Else():
                            weigh(False)
                    products.gather(first, pairs, kept.sums)
    products.end()
