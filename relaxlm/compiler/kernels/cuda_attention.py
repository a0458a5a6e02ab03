"""Attention over pages on GPUs: arguments of `cpu_attention`, pages of `cuda_rope`.

The code is in `kernels/cuda/`: `attention.cuh` for tensor cores, `plain_attention.cuh` for float32
and heads that are no multiple of 8. A block takes all query heads that share keys and values, so
these are read once. Sequences with few new tokens are split along their context, and a second
kernel puts the parts together.
"""

import functools
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.attention import PAGE_SIZE, AttentionShape, page_tensors
from relaxlm.compiler.kernels.builder import length, tensor
from relaxlm.compiler.kernels.cuda_source import (
    C_TYPES,
    device_call,
    grid,
    launches,
    shared_bytes,
    stored_type,
)
from relaxlm.errors import UnsupportedError
from relaxlm.quantization.kv_cache import KVFormat

MAX_HEAD_DIM = 256
# Of the plain kernel: registers of a lane for the heads of a block.
MAX_ACCUMULATORS = 32
PLAIN_WARPS = MERGE_WARPS = 4
# Query rows per sequence up to which a block has 16.
FEW_ROWS = 16
# Blocks that keep a GPU busy; up to how many parts the context is cut for it, and the fewest tokens
# of a part.
BUSY_BLOCKS, MOST_PARTS, PART_TOKENS = 256, 32, 256


def check_shape(shape: AttentionShape) -> None:
    """Refuse what the kernels cannot take.

    Raises:
        UnsupportedError: head_dim is above 256, or the heads do not divide into groups.
    """
    if shape.head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"head_dim = {shape.head_dim} is not supported on cuda: its attention kernels go up "
            f"to {MAX_HEAD_DIM}"
        )
    if shape.q_heads % shape.kv_heads:
        raise UnsupportedError(
            f"num_attention_heads = {shape.q_heads} is not a multiple of num_key_value_heads = "
            f"{shape.kv_heads}"
        )


@dataclass(frozen=True)
class Tile:
    """What a block of the tensor-core kernel works on: 16 rows per row warp, and tokens at a time.

    Attributes:
        token_warps: that share out the tokens of a row.
        stages: of tokens in shared memory at a time.
    """

    row_warps: int
    token_warps: int
    tokens: int
    stages: int

    @property
    def rows(self) -> int:
        return 16 * self.row_warps

    @property
    def warps(self) -> int:
        return self.row_warps * self.token_warps

    def shared(self, dim: int, scaled: bool) -> int:
        """Bytes of shared memory."""
        pieces = -(-dim // 32) * 4
        pipeline = 16 * pieces * (self.rows + 2 * self.stages * self.tokens)
        scales = 8 * self.stages * self.tokens if scaled else 0
        merge = 4 * self.warps * 16 * (dim + 6) if self.token_warps > 1 else 0
        return max(pipeline + scales, merge)


def tiles(shape: AttentionShape, format: KVFormat, shared_limit: int) -> tuple[Tile, Tile]:
    """For sequences with few rows, and with many."""

    def first(*choices: Tile) -> Tile:
        return next(
            tile for tile in choices if tile.shared(shape.head_dim, format.scaled) <= shared_limit
        )

    if shape.head_dim <= 128:
        return first(Tile(1, 4, 64, 2), Tile(1, 2, 32, 2)), first(
            Tile(4, 1, 64, 2), Tile(4, 1, 32, 2)
        )
    return first(Tile(1, 2, 32, 2), Tile(1, 2, 32, 1)), first(Tile(4, 1, 32, 2), Tile(2, 1, 32, 1))


def context_parts(blocks: Expr, table: Expr) -> Expr:
    """How many parts the context is cut into if there are so many blocks without.

    Args:
        table: pages of all sequences.
    """
    most = T.min((table * PAGE_SIZE + PART_TOKENS - 1) // PART_TOKENS, MOST_PARTS)
    return T.max(T.min(BUSY_BLOCKS // blocks, most), 1)


@functools.cache
def attend_kernel(
    shape: AttentionShape, format: KVFormat, dtype: str, shared_limit: int
) -> tirx.PrimFunc:
    """Attention of n query rows over the pages of their sequences, with an online softmax.

    (q [n, q_heads, dim], positions [n], row_offsets [b + 1], page_offsets [b + 1], page_ids [p],
    kv_lengths [b], dropped [b], *page tensors, and, if the shape has them, sink_logits [q_heads]
    float32 and slopes [q_heads] float32) -> [n, q_heads, dim]. n must not be 0.
    """
    check_shape(shape)
    heads, kv_heads, dim = shape.q_heads, shape.kv_heads, shape.head_dim
    group = heads // kv_heads

    def body() -> None:
        n, batch, table, pages = (length(name) for name in ("n", "batch", "table", "pages"))
        q = tensor("q", (n, heads, dim), dtype)
        tables = [tensor("positions", (n,), "int32")]
        tables += [tensor(name, (batch + 1,), "int32") for name in ("row_offsets", "page_offsets")]
        tables += [tensor("page_ids", (table,), "int32")]
        tables += [tensor(name, (batch,), "int32") for name in ("kv_lengths", "dropped")]
        cached = [
            tensor(f"{spec.name}_pages", (pages, *spec.page_shape), spec.dtype)
            for spec in page_tensors(shape, format)
        ]
        logits = tensor("sink_logits", (heads,), "float32") if shape.sink_logits else None
        slope = tensor("slopes", (heads,), "float32") if shape.alibi else None
        out = tensor("out", (n, heads, dim), dtype)

        # In the order that attend.cuh has them.
        options = [
            *(T.int32(value) for value in (heads, kv_heads, shape.window, shape.sinks)),
            *(T.int32(value) for value in (shape.chunked, shape.sink_logits)),
            *(T.float32(value) for value in (shape.exponent_scale, shape.cap)),
        ]
        k, v, *scales = (buffer.data for buffer in cached)
        k_scales, v_scales = scales or (k, v)
        sink_logits, slopes = (k if each is None else each.data for each in (logits, slope))
        alibi = str(shape.alibi).lower()

        def run(code: str, warps: int, blocks: tuple[Expr, Expr], shared: int) -> None:
            """Blocks along rows and heads, and as many parts as keep the GPU busy."""
            parts = context_parts(blocks[0] * blocks[1], table)
            # Only results of parts go there.
            size = T.min(parts - 1, 1) * parts * n * heads * (dim + 2) + 1
            partial = T.alloc_buffer((size,), "float32", scope="global").data
            with grid([*blocks, parts], warps, resident=1) as (x, y, part):
                device_call(
                    "attend.cuh",
                    code,
                    q.data,
                    *(buffer.data for buffer in tables),
                    *(k, v, k_scales, v_scales, sink_logits, slopes, out.data, partial),
                    *(T.cast(count, "int32") for count in (n, batch)),
                    *options,
                    *(x, y, part, T.cast(parts, "int32"), shared_bytes(shared)),
                )
            with T.If(parts > 1), T.Then():
                with grid([(n * heads + MERGE_WARPS - 1) // MERGE_WARPS], MERGE_WARPS) as (block,):
                    device_call(
                        "attend.cuh",
                        f"relaxlm::merge<{C_TYPES[dtype]}, {dim}>",
                        *(partial, sink_logits, out.data, T.cast(n, "int32")),
                        *(
                            T.int32(heads),
                            T.int32(shape.sink_logits),
                            T.cast(parts, "int32"),
                            block,
                        ),
                    )

        if dtype == "float32" or dim % 8:
            steps = -(-dim // 32)
            share = max(
                g for g in range(1, group + 1) if group % g == 0 and g * steps <= MAX_ACCUMULATORS
            )
            types = f"{C_TYPES[dtype]}, {stored_type(format)}"
            code = f"relaxlm::attend_tokens<{types}, {dim}, {share}, {alibi}>"
            shared = 4 * PLAIN_WARPS * share * (dim + 2)
            run(code, PLAIN_WARPS, (n, tirx.const(heads // share, "int64")), shared)
            return
        few, many = tiles(shape, format, shared_limit)

        def run_tiles(tile: Tile) -> None:
            numbers = f"{dim}, {tile.row_warps}, {tile.token_warps}, {tile.tokens}, {tile.stages}"
            types = f"{C_TYPES[dtype]}, {stored_type(format)}"
            code = f"relaxlm::Attention<{types}, {numbers}, {alibi}>"
            # Every sequence's last tile may be partly filled.
            count = n * group // tile.rows + batch
            run(
                f"relaxlm::attend_tiles<{code}>",
                tile.warps,
                (count, tirx.const(kv_heads, "int64")),
                tile.shared(dim, format.scaled),
            )

        with T.If(n * group <= FEW_ROWS * batch):
            with T.Then():
                run_tiles(few)
            with T.Else():
                run_tiles(many)

    return launches(body)
