"""x @ W.T on CPUs with x in int8 by groups of 32 (AVX-512 VNNI), for 4-bit weights row by row.

    x[m, k]   = x_code[m, k] * x_scale[m, g]                      k in group g, |x_code| <= 127
    y[m, n]   = sum over g: x_scale[m, g] * scale[n, g]
                            * (sum over k in g: code[n, k] * x_code[m, k] + x_sum[m, g])

with x_sum = -7 * the sum of the group's x_code, since 7 is the code of zero. The inner sum is
exact. The result differs from the float product by what rounding x costs: about 0.5 % of its norm.
The target must have `options.ACT_QUANT_FEATURES`: LLVM ends the process at an instruction that it
lacks.

    rows of x    kernel
    1, 2-4       _gemv: lanes along a row of W
    more         _gemm: lanes across rows of W, nibbles taken apart once for all of x
"""

import functools

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import (
    as_relax_kernel,
    import_reduce_sum,
    multiply_add,
    prefetch,
    reduce_sum,
    splat,
    spread,
    to_float32,
)

GROUP = 32
LANES = 16
# int32 words of x_code in a group: the even elements, then the odd ones, as nibbles meet them.
GROUP_WORDS = 8
AHEAD = 4096
# Rows of x in a tile of the kernel for many.
TILE = 6


def supports(matrix: StoredMatrix) -> bool:
    """Whether a matrix can be multiplied here: one vector of words at least, and of rows."""
    quant = matrix.quant
    return (
        quant is not None
        and (quant.bits, quant.group, quant.layout) == (4, GROUP, "NK")
        and matrix.words >= LANES
        and matrix.n >= LANES
    )


@functools.cache  # parsing TVMScript takes a while, and every layer asks
def quantize_kernel(k: int) -> tirx.PrimFunc:
    """(x [m, K] float32, x_code [m, groups * 8] int32, x_scale [m, groups], x_sum [m, groups])."""
    groups = -(-k // GROUP)

    def load(x, row, g, values) -> None:
        if k % GROUP == 0:
            T.buffer_store(values, x.vload([row, g * GROUP], "float32x32"), [T.ramp(0, 1, GROUP)])
            return
        with T.serial(GROUP) as i:
            at = g * GROUP + i
            value = T.if_then_else(at < k, x[row, T.min(at, k - 1)], T.float32(0))
            T.buffer_store(values, value, [i])

    def half(values, i) -> Expr:
        return values.vload([i * LANES], "float32x16")

    def largest(values) -> Expr:
        # Bits of magnitudes have their order, and LLVM reduces whole numbers in a tree.
        magnitude = T.broadcast(T.int32(0x7FFFFFFF), LANES)
        bits = [
            T.bitwise_and(T.reinterpret(half(values, i), dtype="int32x16"), magnitude)
            for i in range(2)
        ]
        most = T.call_llvm_pure_intrin(
            T.llvm_lookup_intrinsic_id("llvm.vector.reduce.smax"), T.max(*bits), dtype="int32"
        )
        return T.max(T.reinterpret(most, dtype="float32"), T.float32(1e-20))

    def codes(values, factor, i) -> Expr:
        return T.cast(T.nearbyint(half(values, i) * splat(factor[0], LANES)), "int32x16")

    def every_second(values, factor, odd) -> Expr:
        both = [codes(values, factor, 0), codes(values, factor, 1)]
        lanes = [tirx.const(2 * i + odd, "int32") for i in range(LANES)]
        return T.reinterpret(T.cast(tirx.Shuffle(both, lanes), "int8x16"), dtype="int32x4")

    def total(values, factor) -> Expr:
        return T.call_llvm_pure_intrin(
            T.llvm_lookup_intrinsic_id("llvm.vector.reduce.add"),
            codes(values, factor, 0) + codes(values, factor, 1),
            dtype="int32",
        )

    @T.prim_func(s_tir=True, check_well_formed=False)
    def quantize(x_h: T.handle, code_h: T.handle, scale_h: T.handle, sum_h: T.handle):
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        x = T.match_buffer(x_h, (m, k), "float32")
        x_code = T.match_buffer(code_h, (m, groups * GROUP_WORDS), "int32")
        x_scale = T.match_buffer(scale_h, (m, groups), "float32")
        x_sum = T.match_buffer(sum_h, (m, groups), "int32")
        for row in T.parallel(m):
            values = T.decl_buffer((GROUP,), "float32", scope="global")
            factor = T.decl_buffer((1,), "float32", scope="global")
            for g in T.serial(groups):
                load(x, row, g, values)
                x_scale[row, g] = largest(values) * T.float32(1 / 127)
                factor[0] = T.float32(127) / largest(values)
                x_code[row, T.ramp(g * GROUP_WORDS, 1, 4)] = every_second(values, factor, 0)
                x_code[row, T.ramp(g * GROUP_WORDS + 4, 1, 4)] = every_second(values, factor, 1)
                x_sum[row, g] = total(values, factor) * -7

    return as_relax_kernel(quantize)


def _dot(total: Expr, codes: Expr, x: Expr) -> Expr:
    """total + the sums of four products of unsigned and signed bytes; all int32x16."""
    return T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id("llvm.x86.avx512.vpdpbusd.512"),
        total,
        T.reinterpret(codes, dtype="uint8x64"),
        T.reinterpret(x, dtype="int8x64"),
        dtype="int32x16",
    )


def _nibbles(words: Expr, high: int) -> Expr:
    """The low or high nibble of each byte; every second element of a row starting at `high`."""
    if high:
        words = T.shift_right(words, T.broadcast(T.uint32(4), LANES))
    return T.bitwise_and(words, T.broadcast(T.uint32(0x0F0F0F0F), LANES))


def _gemv(matrix: StoredMatrix, rows: int):
    """A macro for 1 <= m <= `rows`: lanes along a row of W, a vector is four groups."""
    n, words_per_row, groups = matrix.n, matrix.words, matrix.groups
    steps = -(-words_per_row // LANES)
    line = 64 // 4

    def start(step):
        return T.min(step * LANES, words_per_row - LANES) if words_per_row % LANES else step * LANES

    def place(row, step, half):
        return ((row * steps + step) * 2 + half) * LANES

    def reorder(m, x_code, x_scale, x_sum, ordered, scaled, begun) -> None:
        """Vectors of x that meet vectors of words; words that overlap count once, with code 0."""
        with T.serial(rows) as row, T.serial(steps) as step, T.serial(LANES) as lane:
            word = start(step) + lane
            group, source = word // 4, T.min(row, m - 1)
            counts = word >= step * LANES
            for half in range(2):
                value = x_code[source, group * GROUP_WORDS + half * 4 + word % 4]
                value = T.if_then_else(counts, value, 0)
                T.buffer_store(ordered, value, [place(row, step, half) + lane])
            at = (row * steps + step) * LANES + lane
            T.buffer_store(scaled, x_scale[source, group], [at])
            once = T.And(counts, word % 4 == 0)
            T.buffer_store(begun, T.if_then_else(once, x_sum[source, group], 0), [at])

    def vector_of(buffer, at, dtype) -> Expr:
        return buffer.vload([at], dtype)

    def add_step(words, scales, ordered, scaled, begun, task, step, factor, sums) -> None:
        word = words.vload([task * words_per_row + start(step)], "uint32x16")
        four = scales.vload([task * groups + start(step) // 4], f"{matrix.dtype}x4")
        T.buffer_store(factor, spread(to_float32(four, 4), 4, 4), [T.ramp(0, 1, LANES)])
        for row in range(rows):
            at = (row * steps + step) * LANES
            dot = vector_of(begun, at, "int32x16")
            for high in range(2):
                x = vector_of(ordered, place(row, step, high), "int32x16")
                dot = _dot(dot, _nibbles(word, high), x)
            both = vector_of(factor, 0, "float32x16") * vector_of(scaled, at, "float32x16")
            before = vector_of(sums, row * LANES, "float32x16")
            total = multiply_add(T.cast(dot, "float32x16"), both, before)
            T.buffer_store(sums, total, [T.ramp(row * LANES, 1, LANES)])

    def store(m, task, sums, out, out_dtype) -> None:
        for row in range(rows):
            total = reduce_sum(vector_of(sums, row * LANES, "float32x16"), LANES)
            T.buffer_store(out, T.cast(total, out_dtype), [T.min(row, m - 1), task])

    @T.macro
    def run(m, x_code, x_scale, x_sum, words, scales, out, out_dtype):
        ordered = T.decl_buffer((rows * steps * 2 * LANES,), "int32", scope="global")
        scaled = T.decl_buffer((rows * steps * LANES,), "float32", scope="global")
        begun = T.decl_buffer((rows * steps * LANES,), "int32", scope="global")
        reorder(m, x_code, x_scale, x_sum, ordered, scaled, begun)
        for task in T.parallel(n):
            sums = T.decl_buffer((rows * LANES,), "float32", scope="global")
            factor = T.decl_buffer((LANES,), "float32", scope="global")
            for i in T.unroll(rows):
                sums[T.ramp(i * LANES, 1, LANES)] = splat(0.0, LANES)
            for step in T.serial(steps):
                prefetch(T.address_of(words[(task * steps + step) * line + AHEAD // 4]))
                add_step(words, scales, ordered, scaled, begun, task, step, factor, sums)
            store(m, task, sums, out, out_dtype)

    return run


def _gemm(matrix: StoredMatrix):
    """A macro for many rows: lanes are rows of W, nibbles are taken apart once into a panel."""
    n, groups = matrix.n, matrix.groups
    halves = 2 if n >= 2 * LANES else 1
    wide = halves * LANES

    def first(task, half):
        return T.min(task * wide, n - wide) + half * LANES

    def fill(task, words, scales, panel, factors) -> None:
        with T.serial(groups) as g:
            for half in range(halves):
                at = first(task, half) * groups + g
                factor = to_float32(scales[T.ramp(at, groups, LANES)], LANES)
                T.buffer_store(factors, factor, [T.ramp((g * halves + half) * LANES, 1, LANES)])
                for j in range(4):
                    at = first(task, half) * matrix.words + g * 4 + j
                    word = words[T.ramp(at, matrix.words, LANES)]
                    for high in range(2):
                        at = (((g * 2 + high) * 4 + j) * halves + half) * LANES
                        T.buffer_store(panel, _nibbles(word, high), [T.ramp(at, 1, LANES)])

    def row_of(m, number, r):
        # Rows beyond the last repeat it, and write the same result.
        return T.min(number * TILE + r, m - 1)

    def whole(buffer, at, dtype) -> Expr:
        return buffer.vload([at * LANES], dtype)

    def multiply(m, x_code, x_scale, x_sum, number, panel, factors, sums, dots) -> None:
        pairs = [(r, half) for r in range(TILE) for half in range(halves)]
        for i in range(len(pairs)):
            T.buffer_store(sums, splat(0.0, LANES), [T.ramp(i * LANES, 1, LANES)])
        with T.serial(groups) as g:
            for i, (r, _) in enumerate(pairs):
                begun = T.broadcast(x_sum[row_of(m, number, r), g], LANES)
                T.buffer_store(dots, begun, [T.ramp(i * LANES, 1, LANES)])
            for j in range(GROUP_WORDS):
                for i, (r, half) in enumerate(pairs):
                    x = x_code[row_of(m, number, r), g * GROUP_WORDS + j]
                    codes = whole(panel, (g * GROUP_WORDS + j) * halves + half, "uint32x16")
                    dot = _dot(whole(dots, i, "int32x16"), codes, T.broadcast(x, LANES))
                    T.buffer_store(dots, dot, [T.ramp(i * LANES, 1, LANES)])
            for i, (r, half) in enumerate(pairs):
                scale = splat(x_scale[row_of(m, number, r), g], LANES)
                both = whole(factors, g * halves + half, "float32x16") * scale
                dot = T.cast(whole(dots, i, "int32x16"), "float32x16")
                total = multiply_add(dot, both, whole(sums, i, "float32x16"))
                T.buffer_store(sums, total, [T.ramp(i * LANES, 1, LANES)])

    def store(m, task, number, sums, out, out_dtype) -> None:
        for r in range(TILE):
            for half in range(halves):
                total = T.cast(whole(sums, r * halves + half, "float32x16"), f"{out_dtype}x16")
                columns = T.ramp(first(task, half), 1, LANES)
                T.buffer_store(out, total, [row_of(m, number, r), columns])

    @T.macro
    def run(m, x_code, x_scale, x_sum, words, scales, out, out_dtype):
        for task in T.parallel((n + wide - 1) // wide):
            panel = T.decl_buffer((groups * GROUP_WORDS * wide,), "uint32", scope="global")
            factors = T.decl_buffer((groups * wide,), "float32", scope="global")
            sums = T.decl_buffer((TILE * wide,), "float32", scope="global")
            dots = T.decl_buffer((TILE * wide,), "int32", scope="global")
            fill(task, words, scales, panel, factors)
            for number in T.serial((m + TILE - 1) // TILE):
                multiply(m, x_code, x_scale, x_sum, number, panel, factors, sums, dots)
                store(m, task, number, sums, out, out_dtype)

    return run


@functools.cache  # parsing TVMScript takes a while, and every layer asks
def int8_matmul_kernel(matrix: StoredMatrix, out_dtype: str) -> tirx.PrimFunc:
    """(x_code, x_scale, x_sum, q_weight, q_scale, out [m, N]); see `quantize_kernel`."""
    assert supports(matrix), matrix
    n, groups, dtype = matrix.n, matrix.groups, matrix.dtype
    one, few, many = _gemv(matrix, 1), _gemv(matrix, 4), _gemm(matrix)

    @T.prim_func(s_tir=True, check_well_formed=False)
    def matmul(
        code_h: T.handle,
        x_scale_h: T.handle,
        sum_h: T.handle,
        weight: T.Buffer(matrix.word_shape, "uint32"),
        scale: T.Buffer(matrix.scale_shape, dtype),
        out_h: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        x_code = T.match_buffer(code_h, (m, groups * GROUP_WORDS), "int32")
        x_scale = T.match_buffer(x_scale_h, (m, groups), "float32")
        x_sum = T.match_buffer(sum_h, (m, groups), "int32")
        out = T.match_buffer(out_h, (m, n), out_dtype)
        words = T.decl_buffer((n * matrix.words,), "uint32", data=weight.data)
        scales = T.decl_buffer((n * groups,), dtype, data=scale.data)
        if m == 1:
            one(m, x_code, x_scale, x_sum, words, scales, out, out_dtype)
        else:
            if m <= 4:
                few(m, x_code, x_scale, x_sum, words, scales, out, out_dtype)
            else:
                many(m, x_code, x_scale, x_sum, words, scales, out, out_dtype)

    return as_relax_kernel(import_reduce_sum(matmul, LANES))
