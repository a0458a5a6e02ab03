"""Rows of x, each times the matrix of its own expert, on GPUs: only chosen experts are read.

A single token's experts are as many products of one row, side by side in one kernel. With more
tokens, rows are sorted by expert on the GPU (`plan_kernel`, once for all products of a layer), in
tiles of rows that have an expert in common; each tile reads that expert's matrix once. The code is
that of `cuda_matmul`.
"""

import functools

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import length, tensor
from relaxlm.compiler.kernels.cuda_matmul import (
    CudaFormat,
    StoredTensors,
    Way,
    choose,
    skinny,
    skinny_float,
    tiled,
    tiled_float,
)
from relaxlm.compiler.kernels.cuda_source import (
    device_call,
    grid,
    launches,
    shared_bytes,
)

PLAN_THREADS = 1024


def plan_size(rows: Expr) -> Expr:
    """The int32 of a plan for so many rows."""
    return 1 + 4 * rows


def _ways(format: CudaFormat, shared_limit: int) -> list[tuple[int, Way]]:
    """Up to how many rows per expert, on average, which way is taken."""
    if format.dtype == "float32":
        return [(8, skinny_float(format, 8)), (0, tiled_float(format))]
    ways = [(4, skinny(format, 2, 1, 8)), (16, skinny(format, 4, 4, 4))]
    large, small = tiled(format, 4, 2, 8), tiled(format, 2, 2, 4)
    if large.shared > shared_limit:
        return [*ways, (0, small)]
    return [*ways, (128, small), (0, large)]


@functools.cache
def plan_kernel(format: CudaFormat, experts: int, shared_limit: int) -> tirx.PrimFunc:
    """chosen [n, each] int32 -> plan [1 + 4 n each] int32, for `expert_kernel` of the same format.

    Nothing is written for a single token. See `experts.cuh` for what is in it.
    """

    def body() -> None:
        n, each, size = length("n"), length("each"), length("size")
        chosen = tensor("chosen", (n, each), "int32")
        plan = tensor("plan", (size,), "int32")
        rows = n * each

        tile: Expr | int = 0
        for most, way in reversed(_ways(format, shared_limit)):
            tile = T.if_then_else(rows <= experts * most, way.tokens, tile) if most else way.tokens
        with T.If(n > 1), T.Then():
            with T.thread_binding(1, "blockIdx.x"), T.thread_binding(PLAN_THREADS, "threadIdx.x"):
                device_call(
                    "experts.cuh",
                    "relaxlm::plan_tiles",
                    chosen.data,
                    plan.data,
                    T.cast(rows, "int32"),
                    experts,
                    tile,
                    shared_bytes(8 * experts),
                )

    return launches(body)


@functools.cache
def expert_kernel(format: CudaFormat, experts: int, shared_limit: int) -> tirx.PrimFunc:
    """(x [m, K], chosen [n, each], plan, *stored matrices [E, N, K]) -> [n each, N].

    Row i of the output is row i // repeat of x times the matrix chosen[i // each, i % each], with
    repeat = n each / m; it has the dtype of x. n must not be 0.
    """
    assert not format.columns, "experts are stored row by row"

    def body() -> None:
        m, n_tokens, each, rows, size = (
            length(name) for name in ("m", "tokens", "each", "rows", "size")
        )
        n, k = length("n"), length("k")
        x = tensor("x", (m, k), format.dtype)
        chosen = tensor("chosen", (n_tokens, each), "int32")
        plan = tensor("plan", (size,), "int32")
        stored = StoredTensors(format, (tirx.const(experts, "int64"),), n, k)
        out = tensor("out", (rows, n), format.dtype)

        def run(way: Way, tiles: Expr, direct: bool) -> None:
            options = f"{way.rows}, {'true' if direct else 'false'}"
            blocks = [tiles, (n + way.rows - 1) // way.rows]
            with grid(blocks, way.warps, way.resident) as (tile_of_x, tile):
                device_call(
                    "linear.cuh",
                    f"relaxlm::expert_linear<{format.name}, {way.code}, {options}>",
                    x.data,
                    chosen.data,
                    plan.data,
                    stored.values,
                    stored.scales,
                    out.data,
                    shared_bytes(way.shared),
                    *(T.cast(number, "int32") for number in (rows, rows // m, n, k)),
                    tile,
                    tile_of_x,
                )

        alone = skinny_float(format, 1) if format.dtype == "float32" else skinny(format, 1, 1, 8)
        ways = [(experts * most, way) for most, way in _ways(format, shared_limit)]
        with T.If(n_tokens == 1):
            with T.Then():
                run(alone, rows, direct=True)
            with T.Else():
                # Every expert's last tile may be partly filled.
                choose(
                    ways,
                    rows,
                    lambda way: run(way, rows // way.tokens + T.min(rows, experts), direct=False),
                )

    return launches(body)
