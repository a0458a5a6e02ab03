"""Rows of x, each times the matrix of its own expert: chosen experts are read once, others never.

Rows are sorted by expert first. A task is some rows of one chosen expert's matrix: it brings all
rows of x that this expert has, a tile at a time, to the part of the matrix, which by the second
tile is in the cache. Threads take tasks from a queue, so that it does not matter how many experts
were chosen and how many rows each of them has. A single token's few experts are as many GEMVs, each
on all threads.

Lanes run along a row of the matrix as it is stored, as in `cpu_gemv`. A row's sums are made in the
same way whatever the other rows are.

With an instruction set for it, experts with `MANY` rows or more are multiplied with rows of x
rounded to int8, by the loops of `cpu_int8_gemm`: a task turns its part of the matrix into panels
and passes all of the expert's rows over them.
"""

import functools

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels import cpu_gemv, cpu_int8_gemm, packed
from relaxlm.compiler.kernels.builder import emit, length, scratch, tensor
from relaxlm.compiler.kernels.cpu_gemv import vector_words
from relaxlm.compiler.kernels.isa import Isa
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import (
    VectorUnit,
    multiply_add,
    reduce_sum,
    reduce_sum_ir,
    splat,
    spread,
    to_float32,
    vector,
)
from relaxlm.compiler.kernels.work_queue import FETCH_ADD_IR, WORKERS, fetch_add
from relaxlm.quantization.groupwise import GroupQuant

# Of a matrix, that a task takes: stays in the second-level cache next to a tile of x.
TASK_BYTES = 32 << 10
# Rows of x in a tile. Of few rows, there is a tile that fits.
TILES = (1, 2, 4, 8)
# Rows of an expert from which on making panels of its matrix takes less time than it saves.
MANY = 4


@functools.cache  # every layer asks
def expert_kernel(
    shape: tuple[int, int, int],
    quant: GroupQuant | None,
    dtype: str,
    each: int,
    repeat: int,
    unit: VectorUnit,
    isa: Isa | None = None,
) -> tirx.PrimFunc:
    """(x [m, K] float32, chosen [n, each] int32, *stored weight, out [n * each, N] float32).

    Row i of `out` is row i // repeat of x times the matrix chosen[i // each, i % each].

    Args:
        shape: (E, N, K).
        quant: the weight's format, row by row; None for a plain [E, N, K] tensor of `dtype`.
        dtype: of the scales, or of the plain tensor.
        unit: the vectors of the CPU to compile for.
        isa: its dot products of bytes, if rows of x may be rounded.
    """
    experts, n, k = shape
    matrix = StoredMatrix(n, k, quant, dtype)
    assert not matrix.columns, "experts are stored row by row"
    per_word, words_of_row = matrix.per_word, matrix.words
    width = vector_words(matrix, unit)
    steps = -(-words_of_row // width)
    line = cpu_gemv.LINE // matrix.word_bytes
    group = matrix.group_words
    chunk = min(n, max(1, TASK_BYTES // (words_of_row * matrix.word_bytes)))
    dots = isa if isa is not None and cpu_int8_gemm.supports(matrix, isa) else None
    if dots is not None:  # whole panels
        chunk = max(chunk // cpu_int8_gemm.wide(matrix), 1) * cpu_int8_gemm.wide(matrix)
    chunks = -(-n // chunk)
    tiles = TILES if unit.registers == 32 else TILES[:-1]

    def flat(buffer: tirx.Buffer, row: int) -> tirx.Buffer:
        size = tirx.const(experts * n * row, "int64")
        return T.decl_buffer((size,), buffer.dtype, data=buffer.data)

    def first_word(step):
        # The last vector ends with the row; it may overlap the one before.
        if words_of_row % width == 0:
            return step * width
        return T.min(step * width, words_of_row - width)

    def lanes(buffer, at, dtype="float32") -> Expr:
        return buffer.vload([at], vector(dtype, width))

    def put(buffer, at, value) -> None:
        T.buffer_store(buffer, value, [T.ramp(at, 1, width) if width > 1 else at])

    def in_order(row, step, i):
        """Where a row of x, in the order of codes, has what meets code i of a vector of words."""
        return ((row * steps + step) * per_word + i) * width

    def reorder(x, ordered, row) -> None:
        with T.serial(steps) as step, T.serial(width) as lane:
            for i in range(per_word):
                at = (first_word(step) + lane) * per_word + i
                # Elements of the overlap count once, those beyond the row never.
                counts = T.And(first_word(step) + lane >= step * width, at < k)
                value = T.if_then_else(counts, x[row, T.min(at, k - 1)], T.float32(0))
                T.buffer_store(ordered, value * matrix.unshift(i), [in_order(row, step, i) + lane])

    def scale(scales, row, step) -> Expr:
        at = row * matrix.groups + first_word(step) // group
        if width <= group:
            return splat(T.cast(scales[at], "float32"), width)
        count = width // group
        values = to_float32(scales.vload([at], vector(dtype, count)), count)
        return spread(values, count, group)

    def multiply(words, scales, ordered, out, row, column, places) -> None:
        """One row of all matrices times rows of x; places: of each row in `ordered`, in `out`."""
        tile = len(places)
        sums = scratch(tile * width, "float32")
        for r in range(tile):
            put(sums, r * width, splat(0.0, width))
        with T.serial(steps) as step:
            at = row * words_of_row + first_word(step)
            ahead = row * words_of_row + step * width + cpu_gemv.AHEAD // matrix.word_bytes
            for i in range(-(-width // line)):
                cpu_gemv.fetch(T.address_of(words[ahead + i * line]))
            for r, (source, _) in enumerate(places):
                before = lanes(sums, r * width)
                code = matrix.codes(lanes(words, at, matrix.word_dtype), 0, width)
                other = lanes(ordered, in_order(source, step, 0))
                if quant is None:
                    put(sums, r * width, multiply_add(code, other, before))
                    continue
                product = code * other
                for i in range(1, per_word):
                    code = matrix.codes(lanes(words, at, matrix.word_dtype), i, width)
                    other = lanes(ordered, in_order(source, step, i))
                    product = multiply_add(code, other, product)
                put(sums, r * width, multiply_add(product, scale(scales, row, step), before))
        for r, (_, target) in enumerate(places):
            T.buffer_store(out, reduce_sum(lanes(sums, r * width), width), [target, column])

    def body() -> None:
        m, n_tokens = length("m"), length("n")
        x = tensor("x", (m, k), "float32")
        chosen = tensor("chosen", (n_tokens, each), "int32")
        weight = tensor("weight", (experts, n, words_of_row), matrix.word_dtype)
        scaling = weight if quant is None else tensor("scale", (experts, n, matrix.groups), dtype)
        rows = n_tokens * each
        out = tensor("out", (rows, n), "float32")
        words = flat(weight, words_of_row)
        scales = words if quant is None else flat(scaling, matrix.groups)

        # Rows sorted by expert; where those of an expert start; which experts have any.
        order, starts = scratch(rows, "int32"), scratch(experts + 1, "int32")
        used, counter = scratch(experts, "int32"), scratch(16, "int32")
        ordered = scratch(m * steps * per_word * width, "float32")
        USED, MOST, NEXT = 0, 4, 8  # three numbers of `counter`
        T.buffer_store(counter, 0, [MOST])
        T.buffer_store(counter, 0, [USED])
        T.buffer_store(counter, 0, [NEXT])

        def expert_of(row):
            return chosen[row // each, row % each]

        with T.serial(experts + 1) as e:
            T.buffer_store(starts, 0, [e])
        with T.serial(rows) as row:
            T.buffer_store(starts, starts[expert_of(row)] + 1, [expert_of(row)])
        # From the numbers of rows to the ends, which `order` is then filled from.
        with T.serial(experts) as e:
            T.buffer_store(counter, T.max(counter[MOST], starts[e]), [MOST])
            with T.If(starts[e] > 0), T.Then():
                T.buffer_store(used, e, [counter[USED]])
                T.buffer_store(counter, counter[USED] + 1, [USED])
            with T.If(e > 0), T.Then():
                T.buffer_store(starts, starts[e] + starts[e - 1], [e])
        T.buffer_store(starts, T.cast(rows, "int32"), [experts])
        with T.serial(rows) as i:
            row = rows - 1 - i
            T.buffer_store(starts, starts[expert_of(row)] - 1, [expert_of(row)])
            T.buffer_store(order, T.cast(row, "int32"), [starts[expert_of(row)]])
        with T.parallel(m) as row:
            reorder(x, ordered, row)
        if dots is not None:
            rounded = T.decl_buffer((m, packed.row_words(k)), "int32", scope="global")
            with T.If(counter[MOST] >= MANY), T.Then(), T.parallel(m) as row:

                def value(i: Expr | int, count: int) -> Expr:
                    return x.vload([row, i], vector("float32", count))

                # As if there were many rows, so that they lie in the order for panels.
                packed.emit_pack(k, value, rounded, row, T.int64(packed.FEW + 1), dots)

        def run_tile(size: int, number, first, count, expert, column) -> None:
            """All rows of a task's part of the matrix times one tile of x."""
            here = scratch(2 * size, "int64")
            for r in range(size):
                # Rows beyond the last repeat it, and write the same result.
                row = order[first + T.min(number * size + r, count - 1)]
                T.buffer_store(here, T.cast(row // repeat, "int64"), [2 * r])
                T.buffer_store(here, T.cast(row, "int64"), [2 * r + 1])
            places = [(here[2 * r], here[2 * r + 1]) for r in range(size)]
            with T.serial(chunk) as j:
                row = T.cast(expert, "int64") * n + column + j
                multiply(words, scales, ordered, out, row, column + j, places)

        def run_panels(first, count, expert, column, panels: cpu_int8_gemm.Panels) -> None:
            """All rows of an expert, rounded, times a task's part of its matrix."""
            tile_rows = cpu_int8_gemm.TILE
            with T.serial(chunk // panels.wide) as p:
                start = column + p * panels.wide
                panels.fill(T.cast(expert, "int64") * n + start, words, scales)
                with T.serial((count + tile_rows - 1) // tile_rows) as tile:
                    here = scratch(2 * tile_rows, "int64")
                    for r in range(tile_rows):
                        row = order[first + T.min(tile * tile_rows + r, count - 1)]
                        T.buffer_store(here, T.cast(row // repeat, "int64"), [2 * r])
                        T.buffer_store(here, T.cast(row, "int64"), [2 * r + 1])
                    panels.multiply(rounded, lambda r: here[2 * r], tile)
                    panels.store(out, lambda r: here[2 * r + 1], start)

        def run_task(number, panels: cpu_int8_gemm.Panels | None) -> None:
            expert = used[number // chunks]
            first, count = starts[expert], starts[expert + 1] - starts[expert]
            # The last part ends with the matrix; it may overlap the one before.
            column = T.min(number % chunks * chunk, n - chunk)

            def choose(sizes: tuple[int, ...]) -> None:
                size, *larger = sizes
                if not larger:
                    with T.serial((count + size - 1) // size) as tile:
                        run_tile(size, tile, first, count, expert, column)
                    return
                with T.If(count <= size):
                    with T.Then():
                        run_tile(size, 0, first, count, expert, column)
                    with T.Else():
                        choose(tuple(larger))

            if panels is None:
                choose(tiles)
                return
            with T.If(count >= MANY):
                with T.Then():
                    run_panels(first, count, expert, column, panels)
                with T.Else():
                    choose(tuple(size for size in tiles if size <= MANY))

        with T.parallel(T.min(counter[USED] * chunks, WORKERS)):
            task = scratch(1, "int32")
            panels = None if dots is None else cpu_int8_gemm.Panels(matrix)
            T.buffer_store(task, fetch_add(counter, NEXT), [0])
            with T.While(task[0] < counter[USED] * chunks):
                run_task(task[0], panels)
                T.buffer_store(task, fetch_add(counter, NEXT), [0])

    texts = [reduce_sum_ir(width), FETCH_ADD_IR]
    return emit(body, texts if dots is None else [*texts, *cpu_int8_gemm.imports(matrix, dots)])
