"""The largest of every few neighbours in rows of logits (`runtime/peaks.py` says what for)."""

import functools

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.builder import emit, length, scratch, tensor
from relaxlm.compiler.kernels.vector import reduce_max, splat, vector
from relaxlm.runtime.peaks import BLOCK

_LANES = 16
# Blocks that one task looks at, one after the other.
_BLOCKS = 16
_WITHOUT_SIGN = 0x7FFFFFFF
_INFINITY_BITS = 0x7F800000


@functools.cache
def peaks_kernel(vocab: int) -> tirx.PrimFunc:
    """(logits [m, vocab] float32) -> [m, ceil(vocab / BLOCK)] float32; NaN for a block with NaN."""
    blocks = -(-vocab // BLOCK)
    tasks = -(-blocks // _BLOCKS)

    def body() -> None:
        m = length("m")
        logits = tensor("logits", (m, vocab), "float32")
        peaks = tensor("peaks", (m, blocks), "float32")

        def block(row: Expr, index: Expr, size: int) -> None:
            lanes = _LANES if size % _LANES == 0 else 1
            floats, ints = vector("float32", lanes), vector("int32", lanes)
            every = T.ramp(0, 1, lanes) if lanes > 1 else 0
            largest, magnitude = scratch(lanes, "float32"), scratch(lanes, "int32")

            def whole(number: int) -> Expr:
                return T.broadcast(T.int32(number), lanes) if lanes > 1 else T.int32(number)

            T.buffer_store(largest, splat(float("-inf"), lanes), [every])
            T.buffer_store(magnitude, whole(0), [every])
            with T.serial(size // lanes) as i:
                x = logits.vload([row, index * BLOCK + i * lanes], floats)
                T.buffer_store(largest, T.max(x, largest.vload([0], floats)), [every])
                # A maximum loses NaN, whose magnitude as a whole number is above that of infinity.
                bits = T.reinterpret(x, dtype=ints) & whole(_WITHOUT_SIGN)
                T.buffer_store(magnitude, T.max(bits, magnitude.vload([0], ints)), [every])
            top: Expr = largest[0] if lanes == 1 else reduce_max(largest.vload([0], floats))
            bits = magnitude[0] if lanes == 1 else _reduce_int_max(magnitude.vload([0], ints))
            is_number = bits <= T.int32(_INFINITY_BITS)
            T.buffer_store(peaks, T.Select(is_number, top, T.float32(float("nan"))), [row, index])

        whole_blocks, rest = divmod(vocab, BLOCK)
        with T.parallel(m * tasks) as task:
            row, first = task // tasks, task % tasks * _BLOCKS
            with T.serial(_BLOCKS) as i:
                with T.If(first + i < whole_blocks), T.Then():
                    block(row, first + i, BLOCK)
                if rest:
                    with T.If(first + i == whole_blocks), T.Then():
                        block(row, first + i, rest)

    return emit(body)


def _reduce_int_max(x: Expr) -> Expr:
    return T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id("llvm.vector.reduce.smax"), x, dtype="int32"
    )
