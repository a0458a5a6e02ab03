"""`causal_conv` and `previous_row` of models/state.py on CPUs.

Every row of the result depends on few rows of the input, so all rows are computed at once. What
sequences keep is written in a second loop: in the first one, others may still read it.
"""

import functools
import math

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import emit, length, scratch, tensor
from relaxlm.compiler.kernels.cpu_elementwise import for_each_row, span
from relaxlm.compiler.kernels.state import ConvShape, StateSlots, find_sequence
from relaxlm.compiler.kernels.vector import multiply_add, silu, splat, to_float32, vector


@functools.cache  # every layer asks
def conv_kernel(shape: ConvShape) -> tirx.PrimFunc:
    """(x [n, channels], weight [channels, taps], bias?, *state slots, out [n, channels]).

    The state's slots, [taps - 1, channels] float32 each, are written in place.
    """
    channels, taps, kept = shape.channels, shape.taps, shape.taps - 1
    lanes = math.gcd(channels, 16)

    def body() -> None:
        n = length("n")
        x = tensor("x", (n, channels), shape.dtype)
        weight = tensor("weight", (channels, taps), shape.weight)
        bias = tensor("bias", (channels,), shape.bias) if shape.bias else None
        slots = StateSlots.declare(n, (kept, channels), "float32")
        out = tensor("out", (n, channels), shape.dtype)
        # Of one tap after the other, to be read as vectors.
        taps_of = scratch(taps * channels, "float32")

        def of_row(row: Expr, c: Expr) -> Expr:
            return to_float32(x.vload([row, c], vector(shape.dtype, lanes)), lanes)

        def earlier(sequence: Expr, place: Expr, c: Expr) -> Expr:
            """Row `place` of what the sequence came with."""
            loaded = slots.state.vload([slots.source(sequence), place, c], vector("float32", lanes))
            zero = splat(0.0, lanes)
            return T.if_then_else(slots.is_new(sequence), zero, loaded)

        def one_row(row: Expr) -> None:
            sequence, past = scratch(2, "int64"), scratch(1, "int64")
            find_sequence(slots, row, sequence)
            T.buffer_store(past, row - slots.start(sequence[0]), [0])
            total = scratch(lanes, "float32")
            with T.serial(channels // lanes) as i:
                c = i * lanes
                first = splat(0.0, lanes)
                if bias is not None:
                    first = to_float32(bias.vload([c], vector(str(bias.dtype), lanes)), lanes)
                T.buffer_store(total, first, [span(0, lanes)])
                for j in range(taps):
                    back = kept - j
                    value = of_row(row - back, c)
                    if back:
                        value = T.if_then_else(
                            past[0] >= back, value, earlier(sequence[0], past[0] + j, c)
                        )
                    factor = taps_of.vload([j * channels + c], vector("float32", lanes))
                    added = multiply_add(value, factor, total.vload([0], vector("float32", lanes)))
                    T.buffer_store(total, added, [span(0, lanes)])
                result = total.vload([0], vector("float32", lanes))
                result = silu(result, lanes) if shape.silu else result
                T.buffer_store(
                    out, T.cast(result, vector(shape.dtype, lanes)), [row, span(c, lanes)]
                )

        def keep(sequence: Expr) -> None:
            with T.serial(channels // lanes) as i:
                for j in range(kept):  # a row is read before it, or one in front of it, is written
                    behind = slots.rows(sequence) - kept + j
                    value = T.if_then_else(
                        behind >= 0,
                        of_row(slots.start(sequence) + T.max(behind, 0), i * lanes),
                        earlier(sequence, T.min(behind + kept, kept - 1), i * lanes),
                    )
                    at = [slots.target(sequence), j, span(i * lanes, lanes)]
                    T.buffer_store(slots.state, value, at)

        with T.serial(channels) as c:
            for j in range(taps):
                T.buffer_store(taps_of, T.cast(weight[c, j], "float32"), [j * channels + c])
        for_each_row(n, channels * taps, one_row)
        keep_all(slots, channels * kept, keep)

    return emit(body)


@functools.cache
def previous_row_kernel(size: int, dtype: str, state_dtype: str) -> tirx.PrimFunc:
    """(x [n, size], *state slots, out [n, size]): each row is that before it in its sequence.

    The state's slots, [size] each, are written in place.
    """
    lanes = math.gcd(size, 16)

    def body() -> None:
        n = length("n")
        x = tensor("x", (n, size), dtype)
        slots = StateSlots.declare(n, (size,), state_dtype)
        out = tensor("out", (n, size), dtype)

        def one_row(row: Expr) -> None:
            sequence = scratch(2, "int64")
            find_sequence(slots, row, sequence)
            own = sequence[0]
            with T.serial(size // lanes) as i:
                c = i * lanes
                zero = T.cast(splat(0.0, lanes), vector(dtype, lanes))
                kept = slots.state.vload([slots.source(own), c], vector(state_dtype, lanes))
                kept = T.cast(kept, vector(dtype, lanes))
                kept = T.if_then_else(slots.is_new(own), zero, kept)
                inside = row > slots.start(own)
                value = T.if_then_else(inside, x.vload([row - 1, c], vector(dtype, lanes)), kept)
                T.buffer_store(out, value, [row, span(c, lanes)])

        def keep(sequence: Expr) -> None:
            with T.serial(size // lanes) as i:
                last = slots.start(sequence + 1) - 1
                value = x.vload([last, i * lanes], vector(dtype, lanes))
                at = [slots.target(sequence), span(i * lanes, lanes)]
                T.buffer_store(slots.state, T.cast(value, vector(state_dtype, lanes)), at)

        for_each_row(n, size, one_row)
        keep_all(slots, size, keep)

    return emit(body)


def keep_all(slots: StateSlots, elements: int, keep) -> None:
    """Emit the loop over sequences with rows, each of which keeps so many elements."""

    def one(sequence: Expr) -> None:
        with T.If(slots.rows(sequence) > 0), T.Then():
            keep(sequence)

    for_each_row(slots.batch, elements, one)
