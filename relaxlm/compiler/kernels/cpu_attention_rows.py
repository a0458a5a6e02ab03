"""The rounds of a task of CPU attention: a few pages at a time against all of its rows."""

from collections.abc import Callable
from dataclasses import replace

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import scratch
from relaxlm.compiler.kernels.cpu_attention_one import Direct
from relaxlm.compiler.kernels.cpu_attention_pages import PAGES, PAGES_OF_ONE, Round
from relaxlm.compiler.kernels.cpu_attention_parts import FIXED
from relaxlm.compiler.kernels.cpu_attention_products import Products, get
from relaxlm.compiler.kernels.cpu_attention_softmax import Sums, soften

# Steps that the work on a block is cut into; at least one for each pair of pages.
CHUNKS = PAGES
# (KV head, counted from the task's first; row of that head) -> (i, lanes) -> that many elements of
# the scaled query from i on, float32.
Query = Callable[[Expr | int, Expr], Callable[[Expr, int], Expr]]
# The same to the slope of the row's query head (`Tables.slope`).
Slope = Callable[[Expr | int, Expr], Expr]


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
    slope: Slope | None = None,
) -> None:
    """The query heads of `heads` KV heads of a single row over pages begin .. end.

    Row r of `kept` is query head r % each of KV head r // each, each = direct.passes * direct.rows;
    `queries[0]` is the row's position.
    """
    direct.declare()
    each = direct.passes * direct.rows

    def slope_of(row: Expr) -> Expr:
        assert slope is not None
        return slope(row // each, row % each)

    with T.serial(heads * each) as r:
        kept.clear(r)
        direct.put_query(r, element(r // each, r % each))
    pages = replace(pages, size=PAGES_OF_ONE)
    with T.serial((end - begin + PAGES_OF_ONE - 1) // PAGES_OF_ONE) as index:
        at = begin + index * PAGES_OF_ONE
        pages.find(sequence, at, end)
        with T.If(pages.matters(queries[0])), T.Then():
            here = T.min(end - at, PAGES_OF_ONE)
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
                    slope=slope_of if slope else None,
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
    whole: Sums | None = None,
    slope: Slope | None = None,
) -> None:
    """The heads of `count` tokens over pages begin .. end; row r is at queries[r // share].

    Args:
        whole: where to merge fixed parts of the context, from the first to the last; each is
            collected in `kept`. Without it all pages are collected there.
    """
    tables = pages.tables
    window, page = tables.shape.window, tables.shape.page_size
    block = products.rows
    blocks = (count * share + block - 1) // block
    kept_rows = int(kept.best.shape[0])
    products.declare(kept_rows)
    seen = scratch(kept_rows // block, "int32")
    chunks = max(CHUNKS, products.gather_steps) if products.slots > 1 else 1
    rows_each = -(-block // chunks)
    products.begin()
    with T.serial(blocks * block) as r:
        products.put_query(r, element(0, r))

    def clear(sums: Sums) -> None:
        with T.serial(blocks * block) as r:
            sums.clear(r)

    def latest(number: Expr) -> Expr:
        """Position of a block's last row."""
        return queries[(T.min(number * block + block, count * share) - 1) // share]

    def slope_of(row: Expr) -> Expr:
        assert slope is not None
        return slope(0, row)

    def pairs(number: Expr) -> Expr:
        return (seen[number] + 1) // 2

    def weigh(number: Expr, chunk: Expr | int, masked: bool) -> None:
        first = number * block + chunk * rows_each
        rows = T.min(count * share - first, T.min(block - chunk * rows_each, rows_each))
        soften(
            kept,
            products,
            pages,
            first,
            rows,
            pairs(number),
            lambda row: queries[row // share],
            masked,
            place=number % products.slots * block + chunk * rows_each,
            zeros=tables.by_position,
            slope=slope_of if slope else None,
        )

    def hidden(number: Expr) -> Expr:
        """Whether any row of a block may not see all that it is multiplied with."""
        if tables.by_position and window > 0:  # any page may be gone
            return T.bool(True)
        # The last pair may end with a page beyond the last.
        last = pages.starts[T.max(2 * pairs(number) - 1, 0)]
        some = last + (page - 1) > queries[number * block // share]
        older = pages.starts[0] < tables.shape.oldest(latest(number))
        return some | older if window > 0 else some

    def weigh_any(number: Expr, chunk: Expr | int) -> None:
        with T.If(hidden(number)):
            with T.Then():
                weigh(number, chunk, True)
            with T.Else():
                weigh(number, chunk, False)

    def one_by_one() -> None:
        with T.serial(blocks) as number, T.If(seen[number] > 0), T.Then():
            first = number * block
            with T.serial(pairs(number)) as pair:
                products.score(first, pair, 0)
            weigh_any(number, 0)
            with T.serial(products.gather_steps) as step:
                products.gather(first, pairs(number), step, 0, kept.sums)

    def overlapped() -> None:
        # Three blocks are under way at a time, so that products and exponentials, which keep
        # different units busy, are neighbours.
        with T.serial(blocks + 2) as stage, T.serial(chunks) as chunk:
            scored, last = T.min(stage, blocks - 1), T.max(stage - 2, 0)
            weighed = T.min(T.max(stage - 1, 0), blocks - 1)
            with T.If(T.And(stage < blocks, chunk < pairs(scored))), T.Then():
                products.score(scored * block, chunk, scored % products.slots)
            step = chunk - (chunks - products.gather_steps)
            with T.If(T.And(T.And(stage >= 2, step >= 0), seen[last] > 0)), T.Then():
                slot = last % products.slots
                products.gather(last * block, pairs(last), step, slot, kept.sums)
            with T.If(T.And(stage == weighed + 1, seen[weighed] > 0)), T.Then():
                weigh_any(weighed, chunk)

    def rounds(begin: Expr, end: Expr) -> None:
        with T.serial((end - begin + PAGES - 1) // PAGES) as index:
            at = begin + index * PAGES
            pages.find(sequence, at, end)
            with T.If(pages.matters(queries[0])), T.Then():
                with T.serial((T.min(end - at, PAGES) + 1) // 2) as pair:
                    products.fill(pages, 2 * pair)
                # Pages of this round that each block's last row sees.
                with T.serial(blocks) as number:
                    here = T.min(end, tables.pages_seen(sequence, latest(number))) - at
                    T.buffer_store(seen, T.max(T.min(here, PAGES), 0), [number])
                if products.slots == 1:
                    one_by_one()
                else:
                    overlapped()

    if whole is None:
        clear(kept)
        rounds(begin, end)
    else:
        clear(whole)
        with T.serial((end - begin + FIXED - 1) // FIXED) as part:
            first = begin + part * FIXED
            after = T.min(first + FIXED, end)
            with T.If(tables.remains(sequence, first, after)), T.Then():
                clear(kept)
                rounds(first, after)
                with T.serial(count * share) as r:

                    def value(i: Expr, r: Expr = r) -> Expr:
                        return get(kept.sums, r * kept.dim + i * kept.lanes, kept.lanes)

                    total = get(kept.total, r * page, page)
                    whole.absorb(r, kept.best[r], total, value)
    products.end()
