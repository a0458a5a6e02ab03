"""Multi-head latent attention on GPUs: arguments and pages of `cpu_latent_attention`.

The code is in `kernels/cuda/latent.cuh` for tensor cores, and `plain_attention.cuh` for float32
and sizes that are no multiple of 8. All heads read the same vectors, so a block takes as many of
them as it has rows. Long contexts of few tokens are split, as in `cuda_attention`.
"""

import functools
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.attention import PAGE_SIZE
from relaxlm.compiler.kernels.builder import emit, length, tensor
from relaxlm.compiler.kernels.cpu_latent_attention import LatentShape
from relaxlm.compiler.kernels.cuda_attention import (
    MERGE_WARPS,
    PLAIN_WARPS,
    context_parts,
)
from relaxlm.compiler.kernels.cuda_matmul import CudaFormat, Way, choose, ways
from relaxlm.compiler.kernels.cuda_source import (
    C_TYPES,
    device_call,
    grid,
    launches,
    shared_bytes,
    stored_type,
)
from relaxlm.compiler.kernels.vector import LOG2E
from relaxlm.quantization.kv_cache import KVFormat

WARPS = 8
APPEND_THREADS = 128
# Of the plain kernel: registers of a lane for the queries of a block.
MAX_QUERY_REGISTERS = 80


@dataclass(frozen=True)
class LatentTile:
    """What a block works on: 16 rows per row tile, and so many tokens at a time.

    Attributes:
        stages: of tokens in shared memory at a time.
    """

    row_tiles: int
    tokens: int
    stages: int

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles

    def shared(self, width: int) -> int:
        """Bytes of shared memory for vectors of so many values."""
        pieces = -(-width // 32) * 4
        scores = 4 * self.rows * (self.tokens + 8)
        return 16 * pieces * (self.rows + self.stages * self.tokens) + scores


def latent_tile(width: int, rows: int, shared_limit: int) -> LatentTile:
    """The largest tile that fits, for so many rows of a sequence."""
    most = 1 if rows <= 16 else 2 if rows <= 32 else 4
    for row_tiles in (4, 2, 1):
        for stages in (2, 1):
            tile = LatentTile(row_tiles, 32, stages)
            if row_tiles <= most and tile.shared(width) <= shared_limit:
                return tile
    return LatentTile(1, 16, 1)


@functools.cache  # every layer asks
def append_kernel(shape: LatentShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    """(latent [n, latent], k_rope [n, rope], slots [n], pages) -> pages, written in place.

    A block per token. n must not be 0.
    """

    def body() -> None:
        n, total = length("n"), length("pages")
        latent = tensor("latent", (n, shape.latent), dtype)
        k_rope = tensor("k_rope", (n, shape.rope), dtype)
        slots = tensor("slots", (n,), "int32")
        pages = tensor("pages", (total, PAGE_SIZE, shape.width), format.dtype)
        with (
            T.thread_binding(n, "blockIdx.x") as token,
            T.thread_binding(APPEND_THREADS, "threadIdx.x") as thread,
        ):
            page = T.cast(slots[token] // PAGE_SIZE, "int64")

            def copy(source: tirx.Buffer, first: int, size: int) -> None:
                with T.serial(-(-size // APPEND_THREADS)) as step:
                    i = step * APPEND_THREADS + thread
                    with T.If(i < size), T.Then():
                        value = T.cast(source[token, i], format.dtype)
                        T.buffer_store(pages, value, [page, slots[token] % PAGE_SIZE, first + i])

            copy(latent, 0, shape.latent)
            copy(k_rope, shape.latent, shape.rope)

    return emit(body)


@functools.cache
def attend_kernel(
    shape: LatentShape, format: KVFormat, dtype: str, shared_limit: int
) -> tirx.PrimFunc:
    """Attention of n tokens over the pages of their sequences, with an online softmax.

    (q_latent [n, heads, latent], q_rope [n, heads, rope], positions [n], row_offsets [b + 1],
    page_offsets [b + 1], page_ids [p], kv_lengths [b], pages) -> [n, heads, latent]. n must not be
    0.
    """
    heads, latent, rope = shape.heads, shape.latent, shape.rope
    types = f"{C_TYPES[dtype]}, {stored_type(format)}, {latent}, {rope}"

    def body() -> None:
        n, batch, table, held = (length(name) for name in ("n", "batch", "table", "pages"))
        q = [
            tensor("q_latent", (n, heads, latent), dtype),
            tensor("q_rope", (n, heads, rope), dtype),
        ]
        tables = [tensor("positions", (n,), "int32")]
        tables += [tensor(name, (batch + 1,), "int32") for name in ("row_offsets", "page_offsets")]
        tables += [tensor("page_ids", (table,), "int32"), tensor("kv_lengths", (batch,), "int32")]
        pages = tensor("latent_pages", (held, PAGE_SIZE, shape.width), format.dtype)
        out = tensor("out", (n, heads, latent), dtype)

        def run(code: str, warps: int, blocks: list[Expr], shared: int) -> None:
            along = blocks[0] if len(blocks) == 1 else blocks[0] * blocks[1]
            parts = context_parts(along, table)
            # Only results of parts go there.
            size = T.min(parts - 1, 1) * parts * n * heads * (latent + 2) + 1
            partial = T.alloc_buffer((size,), "float32", scope="global").data
            with grid([*blocks, parts], warps, resident=1) as places:
                device_call(
                    "latents.cuh",
                    code,
                    *(buffer.data for buffer in (*q, *tables, pages, out)),
                    partial,
                    *(T.cast(count, "int32") for count in (n, batch)),
                    *(T.int32(heads), T.float32(shape.scale * LOG2E)),
                    *(*places, T.cast(parts, "int32"), shared_bytes(shared)),
                )
            with T.If(parts > 1), T.Then():
                with grid([(n * heads + MERGE_WARPS - 1) // MERGE_WARPS], MERGE_WARPS) as (block,):
                    device_call(
                        "latents.cuh",
                        f"relaxlm::merge<{C_TYPES[dtype]}, {latent}>",
                        *(partial, partial, out.data, T.cast(n, "int32")),
                        *(T.int32(heads), T.int32(0), T.cast(parts, "int32"), block),
                    )

        if dtype == "float32" or latent % 8 or rope % 8:
            steps = -(-shape.width // 32)
            fitting = [g for g in range(1, heads + 1) if heads % g == 0]
            share = max(g for g in fitting if g == 1 or g * steps <= MAX_QUERY_REGISTERS)
            shared = 4 * PLAIN_WARPS * share * (latent + 2)
            code = f"relaxlm::attend_latent_tokens<{types}, {share}>"
            run(code, PLAIN_WARPS, [n, tirx.const(heads // share, "int64")], shared)
            return

        def run_tile(tile: LatentTile) -> None:
            numbers = f"{tile.row_tiles}, {tile.tokens}, {tile.stages}"
            code = f"relaxlm::attend_latent_tiles<relaxlm::LatentAttention<{types}, {numbers}>>"
            # Every sequence's last tile may be partly filled.
            count = n * heads // tile.rows + batch
            run(code, WARPS, [count], tile.shared(shape.width))

        few = latent_tile(shape.width, heads, shared_limit)
        many = latent_tile(shape.width, 64, shared_limit)
        if few == many:
            run_tile(many)
            return
        with T.If(n * heads <= few.rows * batch):
            with T.Then():
                run_tile(few)
            with T.Else():
                run_tile(many)

    return launches(body)


@functools.cache
def head_matmul_kernel(
    heads: int, outputs: int, inputs: int, weight_dtype: str, dtype: str, shared_limit: int
) -> tirx.PrimFunc:
    """(x [n, heads, inputs], weight [heads, outputs, inputs]) -> [n, heads, outputs].

    Every head has a matrix of its own. n must not be 0.
    """
    assert weight_dtype == dtype, "weights are stored in the dtype that GPUs compute in"
    format = CudaFormat.of((outputs, inputs), None, dtype)

    def body() -> None:
        n = length("n")
        x = tensor("x", (n, heads, inputs), dtype)
        weight = tensor("weight", (heads, outputs, inputs), dtype)
        out = tensor("out", (n, heads, outputs), dtype)

        def run(way: Way) -> None:
            blocks = [(n + way.tokens - 1) // way.tokens, -(-outputs // way.rows), heads]
            with grid(blocks, way.warps, way.resident) as (tile_of_x, tile, head):
                device_call(
                    "linear.cuh",
                    f"relaxlm::head_linear<{format.name}, {way.code}, {way.rows}, {way.tokens}>",
                    *(x.data, weight.data, out.data, shared_bytes(way.shared)),
                    *(T.cast(n, "int32"), heads, outputs, inputs, tile, tile_of_x, head),
                )

        choose(ways(format, dtype, shared_limit), n, run)

    return launches(body)
