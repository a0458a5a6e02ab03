"""What choosing tokens needs to know of logits on GPUs of any kind (`runtime/step_logits.py`).

Logits may be infinite and no numbers, which WGSL has no constants for, and fast modes of other
compilers assume away. So they are compared as whole numbers that have the same order.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import emit, tensor
from relaxlm.compiler.kernels.gpu_tiles import MOST_THREADS, length, private, put, shared
from relaxlm.compiler.kernels.workgroup import grid, reduce, when
from relaxlm.runtime.peaks import BLOCK

# Threads that look at a block, and blocks of a workgroup.
LANES = 32
SIDES = MOST_THREADS // LANES
_WITHOUT_SIGN = 0x7FFFFFFF
_INFINITY_BITS = 0x7F800000
_MINUS_INFINITY_BITS = 0xFF800000 - (1 << 32)
# Below all that are no NaN; WGSL does not take the very least number as a constant.
_LEAST = -0x7FFFFFFF
# exp of less is 0 in float32.
_SMALLEST = -104.0


def _bits(x: Expr) -> Expr:
    return T.reinterpret(x, dtype="int32")


def _ordered(bits: Expr) -> Expr:
    """The bits of a float as a number that is larger for a larger float, and the reverse."""
    return T.Select(bits < 0, T.bitwise_xor(bits, T.int32(_WITHOUT_SIGN)), bits)


@contextmanager
def _blocks(count: Expr, vocab: int) -> Iterator[tuple[Expr, Expr, Expr, Expr]]:
    """Threads for so many rows of blocks: gives row, block, the thread and its lane.

    Rows and blocks may be behind the last.
    """
    blocks = -(-vocab // BLOCK)
    with grid([-(-blocks // SIDES), count], MOST_THREADS) as (group, row, t):
        yield row, group * SIDES + t // LANES, t, t % LANES


@functools.cache
def peaks_kernel(vocab: int) -> tirx.PrimFunc:
    """(logits [m, vocab] float32) -> [m, ceil(vocab / BLOCK)] float32; NaN for a block with NaN.

    m must not be 0.
    """
    blocks = -(-vocab // BLOCK)

    def body() -> None:
        m = length("m")
        logits = tensor("logits", (m, vocab), "float32")
        peaks = tensor("peaks", (m, blocks), "float32")
        with _blocks(m, vocab) as (row, block, t, lane):
            most, bits, met = (
                private(1, "int32"),
                private(1, "int32"),
                shared(MOST_THREADS, "int32"),
            )
            put(most, T.int32(_LEAST))
            with T.serial(BLOCK // LANES) as i:
                at = T.min(block * BLOCK + i * LANES + lane, vocab - 1)
                put(bits, _bits(logits[row, at]))
                size = T.bitwise_and(bits[0], T.int32(_WITHOUT_SIGN))
                # The largest of these numbers is one of the floats that are none.
                is_none = size > _INFINITY_BITS
                new = T.Select(is_none, T.int32(_WITHOUT_SIGN), _ordered(bits[0]))
                put(most, T.max(most[0], new))
            put(met, most[0], t)
            reduce([met], t, lane, LANES, combine=T.max)
            with when(lane == 0, True if blocks % SIDES == 0 else block < blocks):
                found = T.reinterpret(_ordered(met[t]), dtype="float32")
                T.buffer_store(peaks, found, [row, block])

    return emit(body)


@functools.cache
def weigh_kernel(vocab: int) -> tirx.PrimFunc:
    """(logits [m, vocab] float32, rows, references, factors [k] int32) -> [k, blocks] float32.

    Sums of exp((logit - reference) * factor) over the blocks of rows; references and factors are
    float32, bit by bit. k must not be 0.
    """
    blocks = -(-vocab // BLOCK)

    def body() -> None:
        m, k = length("m"), length("k")
        logits = tensor("logits", (m, vocab), "float32")
        rows, references, factors = (
            tensor(name, (k,), "int32") for name in ("rows", "references", "factors")
        )
        sums = tensor("sums", (k, blocks), "float32")
        with _blocks(k, vocab) as (number, block, t, lane):
            total, met = private(1), shared(MOST_THREADS)
            put(total, 0.0)
            reference, factor = (
                T.reinterpret(given[number], dtype="float32") for given in (references, factors)
            )
            with T.serial(BLOCK // LANES) as i:
                at = block * BLOCK + i * LANES + lane
                x = logits[rows[number], T.min(at, vocab - 1)]
                weight = T.exp(T.max((x - reference) * factor, T.float32(_SMALLEST)))
                put(total, total[0] + T.Select(at < vocab, weight, T.float32(0)))
            put(met, total[0], t)
            reduce([met], t, lane, LANES)
            with when(lane == 0, True if blocks % SIDES == 0 else block < blocks):
                T.buffer_store(sums, met[t], [number, block])

    return emit(body)


@functools.cache
def gather_kernel(vocab: int) -> tirx.PrimFunc:
    """(logits [m, vocab] float32, places [k] int32) -> [k, BLOCK] float32: blocks of logits.

    Place i * ceil(vocab / BLOCK) + j is block j of row i; behind a row's end there is -inf. k must
    not be 0.
    """
    blocks = -(-vocab // BLOCK)

    def body() -> None:
        m, k = length("m"), length("k")
        logits = tensor("logits", (m, vocab), "float32")
        places = tensor("places", (k,), "int32")
        out = tensor("gathered", (k, BLOCK), "float32")
        with grid([k], BLOCK) as (number, t):
            row, at = places[number] // blocks, places[number] % blocks * BLOCK + t
            bits = _bits(logits[row, T.min(at, vocab - 1)])
            minus_infinity = T.int32(_MINUS_INFINITY_BITS)
            found = T.reinterpret(T.Select(at < vocab, bits, minus_infinity), dtype="float32")
            T.buffer_store(out, found, [number, t])

    return emit(body)


@functools.cache
def highest_kernel(vocab: int) -> tirx.PrimFunc:
    """(peaks [1, blocks] float32, counted [k] int32) -> [k] int32: blocks with the largest peaks.

    The block with the largest comes first; of equal ones, that with the lower number. k must be at
    most `blocks`, and not 0. Of `counted` only the length is read.
    """
    blocks = -(-vocab // BLOCK)

    def body() -> None:
        k = length("k")
        peaks = tensor("peaks", (1, blocks), "float32")
        tensor("counted", (k,), "int32")
        out = tensor("highest", (k,), "int32")
        with grid([-(-blocks // MOST_THREADS)], MOST_THREADS) as (group, t):
            mine, place = private(1, "int32"), private(1, "int32")
            block = group * MOST_THREADS + t
            put(mine, _ordered(_bits(peaks[0, T.min(block, blocks - 1)])))
            put(place, T.int32(0))
            with T.serial(blocks) as other:
                theirs = private(1, "int32")
                put(theirs, _ordered(_bits(peaks[0, other])))
                ahead = T.Or(theirs[0] > mine[0], T.And(theirs[0] == mine[0], other < block))
                put(place, place[0] + T.Select(ahead, T.int32(1), T.int32(0)))
            with when(block < blocks, place[0] < k):
                T.buffer_store(out, block, [place[0]])

    return emit(body)
