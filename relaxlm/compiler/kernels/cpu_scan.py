"""Linear recurrences on CPUs: `linear_scan` of models/state.py.

Columns of a head's state [K, V] do not depend on each other. A task is a sequence, a head and a
block of columns: it takes the block into the first-level cache, goes through the sequence's tokens,
and writes it back. Vectors lie along V.
"""

import functools
import math

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import emit, length, scratch, tensor
from relaxlm.compiler.kernels.cpu_elementwise import span
from relaxlm.compiler.kernels.state import ScanShape, StateSlots
from relaxlm.compiler.kernels.vector import VectorUnit, multiply_add, splat, to_float32, vector

# Vectors in a row of a block.
VECTORS = 2


@functools.cache  # every layer asks
def scan_kernel(shape: ScanShape, unit: VectorUnit) -> tirx.PrimFunc:
    """(q, k [n, groups, K], v [n, heads, V], decay, (a, b)?, bonus?, *state slots, out).

    The state's slots, [heads, K, V] each, are written in place.
    """
    heads, key_dim, value_dim, dtype = shape.heads, shape.key_dim, shape.value_dim, shape.dtype
    lanes = math.gcd(value_dim, unit.lanes)
    count = math.gcd(value_dim // lanes, VECTORS)
    width = count * lanes
    blocks = value_dim // width

    def body() -> None:
        n = length("n")
        q, k = (tensor(name, (n, shape.groups, key_dim), dtype) for name in ("q", "k"))
        v = tensor("v", (n, heads, value_dim), dtype)
        decay = tensor(
            "decay", (n, heads, key_dim) if shape.decay_per_key else (n, heads), "float32"
        )
        removal = [
            tensor(name, (n, heads, key_dim), "float32") for name in ("a", "b") if shape.removal
        ]
        bonus = tensor("bonus", (heads, key_dim), "float32") if shape.bonus else None
        slots = StateSlots.declare(n, (heads, key_dim, value_dim), "float32")
        out = tensor("out", (n, heads, value_dim), dtype)

        def get(buffer: tirx.Buffer, *index: Expr | int) -> Expr:
            return buffer.vload([*index], vector("float32", lanes))

        def put(buffer: tirx.Buffer, value: Expr, *index: Expr | int) -> None:
            *outer, last = index
            T.buffer_store(buffer, value, [*outer, span(last, lanes)])

        def scalar(value: Expr) -> Expr:
            return splat(T.cast(value, "float32"), lanes)

        def add_output(factor: Expr, state: Expr, total: tirx.Buffer, at: int) -> None:
            put(total, multiply_add(scalar(factor), state, get(total, at)), at)

        def one_token(row: Expr, head: Expr, first: Expr, block: tirx.Buffer) -> None:
            group = head // shape.share
            value, total, removed = (scratch(width, "float32") for _ in range(3))
            for j in range(count):
                loaded = v.vload([row, head, first + j * lanes], vector(dtype, lanes))
                put(value, to_float32(loaded, lanes), j * lanes)
                put(total, splat(0.0, lanes), j * lanes)
                put(removed, splat(0.0, lanes), j * lanes)
            if removal:
                with T.serial(key_dim) as i:
                    for j in range(count):
                        old = get(block, i * width + j * lanes)
                        more = multiply_add(
                            scalar(removal[0][row, head, i]), old, get(removed, j * lanes)
                        )
                        put(removed, more, j * lanes)
            if bonus is not None:
                weight = scratch(1, "float32")
                T.buffer_store(weight, T.float32(0), [0])
                with T.serial(key_dim) as i:
                    both = T.cast(q[row, group, i], "float32") * T.cast(k[row, group, i], "float32")
                    T.buffer_store(weight, multiply_add(both, bonus[head, i], weight[0]), [0])
                for j in range(count):
                    put(total, scalar(weight[0]) * get(value, j * lanes), j * lanes)
            with T.serial(key_dim) as i:
                kept = decay[row, head, i] if shape.decay_per_key else decay[row, head]
                for j in range(count):
                    place = i * width + j * lanes
                    if bonus is not None:
                        add_output(q[row, group, i], get(block, place), total, j * lanes)
                    state = scalar(kept) * get(block, place)
                    if removal:
                        state = multiply_add(
                            scalar(removal[1][row, head, i]), get(removed, j * lanes), state
                        )
                    state = multiply_add(scalar(k[row, group, i]), get(value, j * lanes), state)
                    put(block, state, place)
                    if bonus is None:
                        add_output(q[row, group, i], get(block, place), total, j * lanes)
            for j in range(count):
                result = T.cast(get(total, j * lanes), vector(dtype, lanes))
                T.buffer_store(out, result, [row, head, span(first + j * lanes, lanes)])

        def one_task(sequence: Expr, head: Expr, first: Expr) -> None:
            block = scratch(key_dim * width, "float32")

            def each(value) -> None:
                with T.serial(key_dim) as i:
                    for j in range(count):
                        put(block, value(i, j * lanes), i * width + j * lanes)

            with T.If(slots.is_new(sequence)):
                with T.Then():
                    each(lambda i, j: splat(0.0, lanes))
                with T.Else():
                    source = slots.source(sequence)
                    each(lambda i, j: get(slots.state, source, head, i, first + j))
            with T.serial(slots.rows(sequence)) as t:
                one_token(slots.start(sequence) + t, head, first, block)
            with T.serial(key_dim) as i:
                for j in range(count):
                    target, at = slots.target(sequence), first + j * lanes
                    put(slots.state, get(block, i * width + j * lanes), target, head, i, at)

        # Sequences are innermost: however different their lengths, threads get the same of each.
        with T.parallel(heads * blocks * slots.batch) as task:
            sequence, part = task % slots.batch, task // slots.batch
            with T.If(slots.rows(sequence) > 0), T.Then():
                one_task(sequence, part // blocks, part % blocks * width)

    return emit(body)
