"""The operators of recurrent layers (`models/state.py`) for CUDA. Arguments are those of the CPU.

`scan_kernel` runs one block per sequence, head and 32 columns of the state, all tokens of the
sequence one after the other. A column is shared out among `PARTS` lanes of a warp, which keep its
elements in registers; what a token brings for the keys of a head lies in memory of the block, and
what the next one brings is on its way into registers meanwhile. Sums over the keys are made in the
same order whatever else is in the step.

Rows of the other two do not wait for each other: a thread computes one element. What sequences keep
is written by a kernel behind it, since in the first one others may still read it.

Plain kernels: a prompt's tokens are not brought together into products of matrices.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.builder import emit, length, tensor
from relaxlm.compiler.kernels.cuda_script import ALL_LANES, LANES, local
from relaxlm.compiler.kernels.state import (
    ConvShape,
    Declare,
    ScanShape,
    Slots,
    StateSlots,
    Tokens,
    find_sequence,
)

# Lanes that share a column: lane c + COLUMNS p has the elements p, p + PARTS, ... of column c.
PARTS = 4
COLUMNS = LANES // PARTS
WARPS = 4
THREADS = WARPS * LANES
# Of the other kernels.
ELEMENTS = 256
# (row, head, key feature): what a token brings for it.
PerKey = Callable[[Expr, Expr, Expr], Expr]


@functools.cache  # every layer asks
def scan_kernel(shape: ScanShape) -> tirx.PrimFunc:
    """(q, k, v, decay, (a, b)?, strength?, bonus?, *state slots, out [n, heads, V]).

    Tensors are those of the operator; a slot of the state is [heads, K, V], written in place.

    Raises:
        UnsupportedError: K is above 256.
    """
    key_dim, value_dim, dtype = shape.key_dim, shape.value_dim, shape.dtype
    shape.check_for_gpu()
    rows = -(-key_dim // PARTS)

    def body() -> None:
        tokens = Tokens.declare(shape)
        width = WARPS * COLUMNS
        with (
            T.thread_binding(tokens.slots.batch, "blockIdx.x") as sequence,
            T.thread_binding(shape.heads, "blockIdx.y") as head,
            T.thread_binding(-(-value_dim // width), "blockIdx.z") as block,
            T.thread_binding(WARPS, "threadIdx.y") as warp,
            T.thread_binding(LANES, "threadIdx.x") as lane,
            T.sblock("scan"),
        ):
            column = block * width + warp * COLUMNS + lane % COLUMNS
            one_block(tokens, sequence, head, column, lane // COLUMNS, warp * LANES + lane)

    def one_block(
        tokens: Tokens, sequence: Expr, head: Expr, column: Expr, part: Expr, thread: Expr
    ) -> None:
        slots, last = tokens.slots, value_dim - 1
        assert isinstance(slots, StateSlots)
        start, count = slots.start(sequence), slots.rows(sequence)
        state, sums, value = local(rows), local(3), local(1)
        # Where there is no such column, another is computed, and written by nobody.
        at = T.min(column, last)
        present = [column < value_dim] if value_dim % (WARPS * COLUMNS) else []

        def key(i: int) -> Expr:
            """A thread's i-th key feature; the last one again where there is none."""
            return T.min(i * PARTS + part, key_dim - 1)

        def exists(i: int) -> list[Expr]:
            return [] if (i + 1) * PARTS <= key_dim else [i * PARTS + part < key_dim]

        # The first token of the next sequence, or some other, stands in for one that is missing.
        first = T.min(start, tokens.q.shape[0] - 1)
        known = T.And(count > 0, slots.positions[first] != 0)
        for i in range(rows):
            old = slots.state[slots.source(sequence), head, key(i), at]
            put(state, all_of(known, *exists(i), then=old), i)
        # What tokens bring: per key, and by itself.
        per_key: dict[str, PerKey] = {"q": tokens.query, "k": tokens.key}
        alone = {"v": lambda row: T.cast(tokens.v[row, head, at], "float32")}
        if shape.removal:
            per_key |= {"a": by_key(tokens.removal[0]), "b": by_key(tokens.removal[1])}
        if shape.decay_per_key:
            per_key["decay"] = tokens.kept
        else:
            alone["decay"] = lambda row: tokens.decay[row, head]
        if tokens.strength is not None:
            strength = tokens.strength
            alone["strength"] = lambda row: strength[row, head]
        steps = -(-key_dim // THREADS)
        staged = {name: shared(key_dim) for name in per_key}
        # Of the next token, on its way there.
        coming = {name: local(steps) for name in per_key} | {name: local(1) for name in alone}
        now = {name: local(1) for name in alone}

        def load(row: Expr) -> None:
            for name, of in per_key.items():
                for step in range(steps):
                    i = T.min(step * THREADS + thread, key_dim - 1)
                    put(coming[name], of(row, head, i), step)
            for name, of_row in alone.items():
                put(coming[name], of_row(row), 0)

        def stage() -> None:
            for step in range(steps):
                i = step * THREADS + thread
                with when(*([i < key_dim] if (step + 1) * THREADS > key_dim else [])):
                    for name in per_key:
                        T.buffer_store(staged[name], coming[name][step], [i])

        load(first)
        stage()
        with T.serial(count) as t:
            row = start + t
            for name in alone:
                put(now[name], coming[name][0], 0)
            T.evaluate(T.tvm_storage_sync("shared"))
            load(T.min(row + 1, tokens.q.shape[0] - 1))

            def brought(name: str, i: int) -> Expr:
                return staged[name][key(i)]

            def summed(place: int, term: Callable[[int], Expr]) -> None:
                """sums[place]: of a term for each key feature, over all lanes of the column."""
                put(sums, T.float32(0), place)
                for i in range(rows):
                    put(sums, sums[place] + all_of(*exists(i), then=term(i)), place)
                for distance in (COLUMNS, 2 * COLUMNS):
                    other = T.tvm_warp_shuffle_xor(
                        T.uint32(ALL_LANES), sums[place], distance, LANES, LANES
                    )
                    put(sums, sums[place] + other, place)

            found, total, own = 0, 1, 2
            put(value, now["v"][0], 0)
            if shape.removal:
                summed(found, lambda i: brought("a", i) * state[i])
            if tokens.bonus is not None:
                bonus = tokens.bonus
                summed(total, lambda i: brought("q", i) * state[i])
                summed(own, lambda i: brought("q", i) * bonus[head, key(i)] * brought("k", i))
                put(sums, sums[total] + sums[own] * value[0], total)
            for i in range(rows):
                kept = brought("decay", i) if shape.decay_per_key else now["decay"][0]
                put(state, state[i] * kept, i)
            if tokens.strength is not None:
                summed(found, lambda i: brought("k", i) * state[i])
                put(value, (value[0] - sums[found]) * now["strength"][0], 0)
            for i in range(rows):
                if shape.removal:
                    put(state, state[i] + brought("b", i) * sums[found], i)
                put(state, state[i] + brought("k", i) * value[0], i)
            if tokens.bonus is None:
                summed(total, lambda i: brought("q", i) * state[i])
            with when(part == 0, *present):
                T.buffer_store(tokens.out, T.cast(sums[total], dtype), [row, head, at])
            # Other threads may still read what this token brought.
            T.evaluate(T.tvm_storage_sync("shared"))
            stage()
        for i in range(rows):
            with when(count > 0, *present, *exists(i)):
                place = [slots.target(sequence), head, i * PARTS + part, at]
                T.buffer_store(slots.state, state[i], place)

    return emit(body)


@functools.cache
def conv_kernel(shape: ConvShape, declare: Declare = StateSlots.declare) -> tirx.PrimFunc:
    """(x [n, channels], weight [channels, taps], bias?, *state slots, out [n, channels]).

    The state's slots, [taps - 1, channels] float32 each, are written in place.
    """
    channels, taps, kept = shape.channels, shape.taps, shape.taps - 1

    def body() -> None:
        n = length("n")
        x = tensor("x", (n, channels), shape.dtype)
        weight = tensor("weight", (channels, taps), shape.weight)
        bias = tensor("bias", (channels,), shape.bias) if shape.bias else None
        slots = declare(n, (kept, channels), "float32")
        out = tensor("out", (n, channels), shape.dtype)

        def before(sequence: Expr, place: Expr, c: Expr) -> Expr:
            """Input number `place` - (taps - 1) of a sequence's step."""
            inside = x[slots.start(sequence) + T.max(place - kept, 0), c]
            old = slots.state[slots.source(sequence), T.min(place, kept - 1), c]
            old = T.if_then_else(slots.is_new(sequence), T.float32(0), old)
            return T.if_then_else(place >= kept, T.cast(inside, "float32"), old)

        def one(row: Expr, c: Expr) -> None:
            sequence, total = local(2, dtype=slots.index), local(1)
            find_sequence(slots, row, sequence)
            past = row - slots.start(sequence[0])
            put(total, T.float32(0) if bias is None else T.cast(bias[c], "float32"), 0)
            for j in range(taps):
                factor = T.cast(weight[c, j], "float32")
                put(total, total[0] + before(sequence[0], past + j, c) * factor, 0)
            if shape.silu:
                put(total, total[0] / (T.float32(1) + T.exp(-total[0])), 0)
            T.buffer_store(out, T.cast(total[0], shape.dtype), [row, c])

        def keep(sequence: Expr, c: Expr) -> None:
            for j in range(kept):  # a row is read before it, or one in front of it, is written
                value = before(sequence, slots.rows(sequence) + j, c)
                T.buffer_store(slots.state, value, [slots.target(sequence), j, c])

        _each_element("conv", n, channels, one)
        _keep_all(slots, channels, keep)

    return emit(body)


@functools.cache
def previous_row_kernel(
    size: int, dtype: str, state_dtype: str, declare: Declare = StateSlots.declare
) -> tirx.PrimFunc:
    """(x [n, size], *state slots, out [n, size]): each row is that before it in its sequence.

    The state's slots, [size] each, are written in place.
    """

    def body() -> None:
        n = length("n")
        x = tensor("x", (n, size), dtype)
        slots = declare(n, (size,), state_dtype)
        out = tensor("out", (n, size), dtype)

        def one(row: Expr, c: Expr) -> None:
            sequence = local(2, dtype=slots.index)
            find_sequence(slots, row, sequence)
            own = sequence[0]
            old = T.cast(slots.state[slots.source(own), c], dtype)
            old = T.if_then_else(slots.is_new(own), T.cast(T.float32(0), dtype), old)
            value = T.if_then_else(row > slots.start(own), x[T.max(row - 1, 0), c], old)
            T.buffer_store(out, value, [row, c])

        def keep(sequence: Expr, c: Expr) -> None:
            value = T.cast(x[slots.start(sequence) + slots.rows(sequence) - 1, c], state_dtype)
            T.buffer_store(slots.state, value, [slots.target(sequence), c])

        _each_element("previous", n, size, one)
        _keep_all(slots, size, keep)

    return emit(body)


def _each_element(name: str, rows: Expr, size: int, one: Callable[[Expr, Expr], None]) -> None:
    """Emit a kernel with a thread for each element of `rows` rows of so many."""
    with (
        T.thread_binding(rows, "blockIdx.x") as row,
        T.thread_binding(-(-size // ELEMENTS), "blockIdx.y") as block,
        T.thread_binding(ELEMENTS, "threadIdx.x") as thread,
        T.sblock(name),
    ):
        c = block * ELEMENTS + thread
        with when(*([c < size] if size % ELEMENTS else [])):
            one(row, c)


def _keep_all(slots: Slots, size: int, keep: Callable[[Expr, Expr], None]) -> None:
    """Emit a kernel with a thread for each of `size` elements of sequences with rows."""

    def one(sequence: Expr, c: Expr) -> None:
        with when(slots.rows(sequence) > 0):
            keep(sequence, c)

    _each_element("keep", slots.batch, size, one)


def put(buffer: tirx.Buffer, value: Expr, at: int) -> None:
    """Store one element."""
    T.buffer_store(buffer, value, [at])


def shared(*shape: int) -> tirx.Buffer:
    """Memory of one block, float32."""
    return T.sblock_alloc_buffer(shape, "float32", scope="shared")


@contextlib.contextmanager
def when(*conditions: Expr) -> Iterator[None]:
    """Statements under conditions, all of which must hold; there may be none."""
    with contextlib.ExitStack() as stack:
        if conditions:
            stack.enter_context(T.If(functools.reduce(T.And, conditions)))
            stack.enter_context(T.Then())
        yield


def all_of(*conditions: Expr, then: Expr) -> Expr:
    """`then` if all conditions hold, else 0."""
    if not conditions:
        return then
    return T.if_then_else(functools.reduce(T.And, conditions), then, T.float32(0))


def by_key(buffer: tirx.Buffer) -> PerKey:
    return lambda row, head, i: buffer[row, head, i]
