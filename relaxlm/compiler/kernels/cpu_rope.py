"""From the product with the fused q, k, v matrix to rotated queries and pages, in one kernel."""

import functools
import math
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.arguments import without_arguments
from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.cpu_append import store_macro
from relaxlm.compiler.kernels.cpu_elementwise import span, sum_of
from relaxlm.compiler.kernels.vector import (
    as_relax_kernel,
    import_reduce_sum,
    multiply_add,
    splat,
    to_float32,
    vector,
)
from relaxlm.quantization.kv_cache import KVFormat


@dataclass(frozen=True)
class RopeOptions:
    """What happens to q, k and v on the way.

    Attributes:
        bias: dtype of a bias on the product; None for none.
        norm: dtype of the weights of a norm on each query and key head; None for none.
        eps: of that norm.
    """

    bias: str | None
    norm: str | None
    eps: float = 0.0


@functools.cache  # parsing TVMScript takes 0.2 s, and every layer asks
def rope_append_kernel(
    shape: AttentionShape, format: KVFormat, options: RopeOptions
) -> tirx.PrimFunc:
    """Add the bias, normalize q and k, rotate them, append k and v to their pages.

    (x [n, (q_heads + 2 kv_heads) dim], cos, sin [n, dim / 2], slots [n], bias?, q_norm?, k_norm?,
    *page tensors) -> q [n, q_heads, dim], and the page tensors written in place. Feature i is
    paired with i + dim / 2. Optional arguments that do not apply are left out.
    """
    q_heads, heads, dim, page = shape.q_heads, shape.kv_heads, shape.head_dim, shape.page_size
    width, half = (q_heads + 2 * heads) * dim, dim // 2
    lanes = math.gcd(half, 16)
    bias_dtype, norm_dtype = options.bias or "float32", options.norm or "float32"
    store = store_macro(shape, format)

    def at(buffer: tirx.Buffer, index: Expr, dtype: str = "float32") -> Expr:
        return to_float32(buffer.vload([index], vector(dtype, lanes)), lanes)

    @T.macro
    def load(x, bias, token, head, row):
        """x of one head, bias added."""
        for i in T.serial(dim // lanes):
            if options.bias is None:
                row[span(i * lanes, lanes)] = x.vload(
                    [token, head * dim + i * lanes], vector("float32", lanes)
                )
            else:
                row[span(i * lanes, lanes)] = x.vload(
                    [token, head * dim + i * lanes], vector("float32", lanes)
                ) + at(bias, head * dim + i * lanes, bias_dtype)

    @T.macro
    def normalize(row, weight, work):
        work[span(0, lanes)] = splat(0.0, lanes)
        for i in T.serial(dim // lanes):
            work[span(0, lanes)] = multiply_add(at(row, i * lanes), at(row, i * lanes), at(work, 0))
        work[lanes] = T.float32(1) / T.sqrt(
            sum_of(at(work, 0), lanes) * T.float32(1 / dim) + T.float32(options.eps)
        )
        for i in T.serial(dim // lanes):
            row[span(i * lanes, lanes)] = (
                at(row, i * lanes) * splat(work[lanes], lanes) * at(weight, i * lanes, norm_dtype)
            )

    @T.macro
    def rotate(row, cos, sin, token, work):
        for i in T.serial(half // lanes):
            work[span(0, lanes)] = at(row, i * lanes)
            row[span(i * lanes, lanes)] = at(work, 0) * cos.vload(
                [token, i * lanes], vector("float32", lanes)
            ) - at(row, half + i * lanes) * sin.vload([token, i * lanes], vector("float32", lanes))
            row[span(half + i * lanes, lanes)] = at(row, half + i * lanes) * cos.vload(
                [token, i * lanes], vector("float32", lanes)
            ) + at(work, 0) * sin.vload([token, i * lanes], vector("float32", lanes))

    @T.macro
    def one_token(x, cos, sin, slots, bias, q_norm, k_norm, pages, q, token):
        key = T.decl_buffer((dim,), "float32", scope="global")
        value = T.decl_buffer((dim,), "float32", scope="global")
        work = T.decl_buffer((2 * lanes,), "float32", scope="global")
        for head in T.serial(q_heads):
            load(x, bias, token, head, key)
            if options.norm is not None:
                normalize(key, q_norm, work)
            rotate(key, cos, sin, token, work)
            for i in T.serial(dim // lanes):
                q[token, head, span(i * lanes, lanes)] = at(key, i * lanes)
        for head in T.serial(heads):
            load(x, bias, token, q_heads + head, key)
            load(x, bias, token, q_heads + heads + head, value)
            if options.norm is not None:
                normalize(key, k_norm, work)
            rotate(key, cos, sin, token, work)
            store(head, slots[token], key, value, pages[0], pages[1], pages[-2], pages[-1])

    @T.macro
    def all_tokens(n, x, cos, sin, slots, bias, q_norm, k_norm, pages, q):
        if n == 1:
            one_token(x, cos, sin, slots, bias, q_norm, k_norm, pages, q, T.int64(0))
        else:
            for token in T.parallel(n):
                one_token(x, cos, sin, slots, bias, q_norm, k_norm, pages, q, token)

    @T.prim_func(s_tir=True, check_well_formed=False)
    def rope_append(
        x_h: T.handle,
        cos_h: T.handle,
        sin_h: T.handle,
        slots_h: T.handle,
        bias: T.Buffer((width,), bias_dtype),
        q_norm: T.Buffer((dim,), norm_dtype),
        k_norm: T.Buffer((dim,), norm_dtype),
        k_pages_h: T.handle,
        v_pages_h: T.handle,
        k_scales_h: T.handle,
        v_scales_h: T.handle,
        q_h: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        n, total = T.int64(), T.int64()
        x = T.match_buffer(x_h, (n, width), "float32")
        cos = T.match_buffer(cos_h, (n, half), "float32")
        sin = T.match_buffer(sin_h, (n, half), "float32")
        slots = T.match_buffer(slots_h, (n,), "int32")
        k_pages = T.match_buffer(k_pages_h, (total, heads, dim, page), format.dtype)
        v_pages = T.match_buffer(v_pages_h, (total, heads, page, dim), format.dtype)
        k_scales = T.match_buffer(k_scales_h, (total, heads, page), "float32")
        v_scales = T.match_buffer(v_scales_h, (total, heads, page), "float32")
        q = T.match_buffer(q_h, (n, q_heads, dim), "float32")
        all_tokens(
            n,
            x,
            cos,
            sin,
            slots,
            bias,
            q_norm,
            k_norm,
            (k_pages, v_pages, k_scales, v_scales),
            q,
        )

    unused = [
        *([] if options.bias else ["bias"]),
        *([] if options.norm else ["q_norm", "k_norm"]),
        *([] if format.scaled else ["k_scales", "v_scales"]),
    ]
    kernel = without_arguments(rope_append, unused)
    return as_relax_kernel(import_reduce_sum(kernel, lanes) if lanes > 1 else kernel)
