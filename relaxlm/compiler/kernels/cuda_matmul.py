"""Products with stored matrices on GPUs: weights are read once, as they are stored.

The code is in `kernels/cuda/`: `skinny.cuh` for few rows of x, `tiled.cuh` for many, `simt.cuh` for
float32. Which one runs is decided when it is launched, by the number of rows. Shapes are not
constants of a kernel, so the matrices of a model that are stored alike share its code, and a model
compiles in the time of a few kernels.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import length, tensor
from relaxlm.compiler.kernels.cuda_source import (
    C_TYPES,
    WARP,
    activation_type,
    c_bool,
    device_call,
    grid,
    launches,
    shared_bytes,
)
from relaxlm.compiler.kernels.product import Product
from relaxlm.quantization.groupwise import GroupQuant

# What stages of a small tile take at most: any GPU has it.
SMALL_TILE_BYTES = 60 << 10
# Blocks of small tiles that keep a GPU busy, and most parts that columns are cut into for it.
BUSY_BLOCKS, MOST_PARTS = 256, 8
# Rows of a tile that belong to as many others, of a gated product.
PAIRED_ROWS = 16
# Threads that add up parts.
ADD_WARPS = 8


@dataclass(frozen=True)
class CudaFormat:
    """How the kernels read a matrix.

    Attributes:
        dtype: of x, and of scales or plain values.
        quant: None for plain values.
        aligned: rows of x and of the matrix can be read 16 bytes at a time.
    """

    dtype: str
    quant: GroupQuant | None
    aligned: bool

    @staticmethod
    def of(shape: Sequence[int], quant: GroupQuant | None, dtype: str) -> "CudaFormat":
        """The format of a matrix [..., N, K]."""
        *_, n, k = shape
        aligned = k % (16 // _itemsize(dtype)) == 0
        if quant is not None and quant.layout == "KN":
            aligned = aligned and n % 4 == 0
        return CudaFormat(dtype, quant, aligned)

    @property
    def columns(self) -> bool:
        return self.quant is not None and self.quant.layout == "KN"

    @property
    def name(self) -> str:
        """Its type in CUDA C++."""
        quant, dtype = self.quant, C_TYPES[self.dtype]
        if quant is None:
            return f"relaxlm::Format<{dtype}, {8 * _itemsize(self.dtype)}, 1, false>"
        return f"relaxlm::Format<{dtype}, {quant.bits}, {quant.group}, {c_bool(self.columns)}>"

    @property
    def codes(self) -> int:
        """Values in 16 bytes of a row."""
        return 16 // _itemsize(self.dtype) if self.quant is None else 4 * self.quant.per_word


@dataclass(frozen=True)
class Way:
    """One of the ways to multiply.

    Attributes:
        code: its type in CUDA C++.
        rows, tokens: of the matrix and of x, that a block takes.
        shared: bytes.
        splits: whether blocks may share out the columns, too.
        resident: see `grid`.
    """

    code: str
    rows: int
    tokens: int
    warps: int
    shared: int
    splits: bool = False
    resident: int | None = None


def skinny(format: CudaFormat, row_tiles: int, token_tiles: int, warps: int) -> Way:
    """For few rows of x, tensor cores."""
    rows, tokens = 16 * row_tiles, 8 * token_tiles
    code = (
        f"relaxlm::Skinny<{format.name}, {c_bool(format.aligned)}, {row_tiles}, {token_tiles}, "
        f"{warps}>"
    )
    return Way(code, rows, tokens, warps, 4 * warps * tokens * (rows + 4))


def tiled(format: CudaFormat, row_warps: int, token_warps: int, token_tiles: int) -> Way:
    """For many rows of x, tensor cores."""
    row_tiles = 2
    rows, tokens = 16 * row_tiles * row_warps, 8 * token_tiles * token_warps
    steps = 1 if format.codes >= 32 else 2
    stage = 16 * (tokens * format.codes * steps // 2 + rows * 4 * steps)
    warps = row_warps * token_warps
    stages = 2 if warps > 4 else max(2, min(4, SMALL_TILE_BYTES // stage))
    out = warps * 16 * (16 * row_tiles + 4) * 4
    code = (
        f"relaxlm::Tiled<{format.name}, {c_bool(format.aligned)}, {row_warps}, {token_warps}, "
        f"{row_tiles}, {token_tiles}, {stages}>"
    )
    shared = max(stages * stage, out) + tokens * 4
    return Way(code, rows, tokens, warps, shared, splits=warps <= 4, resident=1)


def skinny_float(format: CudaFormat, tokens: int) -> Way:
    """For few rows of x, in float32."""
    code = f"relaxlm::SkinnyFloat<{format.name}, {c_bool(format.aligned)}, {tokens}>"
    return Way(code, 8, tokens, 8, 0)


def tiled_float(format: CudaFormat) -> Way:
    """For many rows of x, in float32."""
    columns = format.codes if format.codes >= 16 else 32
    code = f"relaxlm::TiledFloat<{format.name}, {c_bool(format.aligned)}>"
    return Way(code, 64, 64, 8, 2 * columns * 68 * 4)


def ways(format: CudaFormat, out_dtype: str, shared_limit: int) -> list[tuple[int, Way]]:
    """Up to how many rows of x which way is taken; the last for any number.

    Few rows are as fast as the matrix can be read, as long as x is read less often than that: it
    comes from the second-level cache once for every block, hence blocks with more rows for more x.
    """
    if format.dtype == "float32":
        return [
            (1, skinny_float(format, 1)),
            (8, skinny_float(format, 8)),
            (0, tiled_float(format)),
        ]
    few = [
        (8, skinny(format, 2, 1, 8)),
        (16, skinny(format, 2, 2, 8)),
        (32, skinny(format, 4, 4, 4)),
    ]
    if not format.columns:
        few.insert(0, (4, skinny(format, 1, 1, 8)))
    large, small = tiled(format, 4, 2, 8), tiled(format, 2, 2, 4)
    # Logits have few rows, and choices of experts few columns.
    if large.shared > shared_limit or out_dtype != format.dtype:
        return [*few, (0, small)]
    return [*few, (512, small), (0, large)]


def choose(choices: Sequence[tuple[int, Way]], count: Expr, run: Callable[[Way], None]) -> None:
    """Emit `run` for every way, of which the number `count` takes one."""
    (most, way), *others = choices
    if not others:
        run(way)
        return
    with T.If(count <= most):
        with T.Then():
            run(way)
        with T.Else():
            choose(others, count, run)


class StoredTensors:
    """The parameters of a kernel that a matrix consists of, and what its calls pass on."""

    def __init__(self, format: CudaFormat, outer: tuple[Expr, ...], n: Expr, k: Expr) -> None:
        quant = format.quant
        if quant is None:
            values = tensor("weight", (*outer, n, k), format.dtype)
            self.values = self.scales = values.data
            return
        words, groups = length("words"), length("groups")
        shapes = [(*outer, n, extent) for extent in (words, groups)]
        if format.columns:
            shapes = [(words, n), (groups, n)]
        self.values = tensor("q_weight", shapes[0], "uint32").data
        self.scales = tensor("q_scale", shapes[1], format.dtype).data


@functools.cache
def matmul_kernel(
    format: CudaFormat,
    out_dtype: str,
    shared_limit: int,
    bias: str | None = None,
    residual: bool = False,
) -> tirx.PrimFunc:
    """(x [m, K], *stored matrix, bias [N]?, residual [m, N]?) -> out [m, N]. m must not be 0.

    out = x times the matrix + bias + residual, added up in float32 and rounded once.

    Args:
        out_dtype: of the output and the residual.
        bias: its dtype; None for none.
    """

    def body() -> None:
        m, n, k = length("m"), length("n"), length("k")
        x = tensor("x", (m, k), format.dtype)
        stored = StoredTensors(format, (), n, k)
        added = tensor("bias", (n,), bias).data if bias else x.data
        kept = tensor("residual", (m, n), out_dtype).data if residual else None
        out = tensor("out", (m, n), out_dtype)

        dtypes = f"{C_TYPES[out_dtype]}, {C_TYPES[bias or format.dtype]}"
        flags = f"{c_bool(bias is not None)}, {c_bool(residual)}, {dtypes}"
        given = out.data if kept is None else kept

        def run(way: Way) -> None:
            of_x, of_matrix = (m + way.tokens - 1) // way.tokens, (n + way.rows - 1) // way.rows
            if not way.splits:
                multiply(way, of_x, of_matrix, tirx.const(1, "int64"), out.data)
                return
            blocks = of_x * of_matrix
            parts = T.max(T.min(BUSY_BLOCKS // blocks, MOST_PARTS), 1)
            # Only sums of parts go there.
            size = T.min(parts - 1, 1) * parts * m * n + 1
            partial = T.alloc_buffer((size,), "float32", scope="global").data
            multiply(way, of_x, of_matrix, parts, partial)
            with T.If(parts > 1), T.Then():
                add(parts, partial)

        def multiply(way: Way, of_x: Expr, of_matrix: Expr, parts: Expr, partial: Expr) -> None:
            options = f"{format.name}, {way.code}, {way.rows}, {way.tokens}, {flags}"
            blocks = [of_x, of_matrix, parts]
            with grid(blocks, way.warps, way.resident) as (tile_of_x, tile, part):
                device_call(
                    "linear.cuh",
                    f"relaxlm::linear<{options}>",
                    x.data,
                    stored.values,
                    stored.scales,
                    added,
                    given,
                    out.data,
                    shared_bytes(way.shared),
                    *(T.cast(size, "int32") for size in (m, n, k)),
                    tile,
                    tile_of_x,
                    part,
                    T.cast(parts, "int32"),
                    partial,
                )

        def add(parts: Expr, partial: Expr) -> None:
            width = ADD_WARPS * WARP
            with grid([m, (n + width - 1) // width], ADD_WARPS) as (token, block):
                device_call(
                    "linear.cuh",
                    f"relaxlm::add_parts<{flags}>",
                    partial,
                    added,
                    given,
                    out.data,
                    *(T.cast(size, "int32") for size in (m, n, parts)),
                    token,
                    block,
                )

        choose(ways(format, out_dtype, shared_limit), m, run)

    return launches(body)


@functools.cache
def gated_matmul_kernel(format: CudaFormat, activation: str, shared_limit: int) -> tirx.PrimFunc:
    """(x [m, K], *stored matrix of 2 N rows) -> out [m, N]. m must not be 0.

    out = activation(x times the first N rows) * (x times the others), rounded once. N is a multiple
    of `PAIRED_ROWS`, and the dtype not float32.
    """

    def body() -> None:
        m, n, k = length("m"), length("n"), length("k")
        x = tensor("x", (m, k), format.dtype)
        stored = StoredTensors(format, (), n, k)
        out = tensor("out", (m, n // 2), format.dtype)

        def run(way: Way) -> None:
            of_x, of_matrix = (m + way.tokens - 1) // way.tokens, (n + way.rows - 1) // way.rows
            options = f"{format.name}, {way.code}, {way.rows}, {way.tokens}"
            with grid([of_x, of_matrix], way.warps, way.resident) as (tile_of_x, tile):
                device_call(
                    "linear.cuh",
                    f"relaxlm::gated_linear<{options}, {activation_type(activation)}>",
                    *(x.data, stored.values, stored.scales, out.data, shared_bytes(way.shared)),
                    *(T.cast(size, "int32") for size in (m, n, k)),
                    *(tile, tile_of_x),
                )

        few = [(8, skinny(format, 2, 1, 8)), (16, skinny(format, 2, 2, 8))]
        few.append((32, skinny(format, 2, 4, 4)))
        many = [way for way in ways(format, format.dtype, shared_limit) if not 0 < way[0] <= 32]
        choose([*few, *many], m, run)

    return launches(body)


def product_kernel(product: Product, shared_limit: int) -> tirx.PrimFunc | None:
    """The kernel of a product; None where there is none."""
    n, _ = product.shape
    if product.stored != product.dtype:
        return None
    format = CudaFormat.of(product.shape, product.quant, product.dtype)
    if product.activation is None:
        return matmul_kernel(
            format, product.out_dtype, shared_limit, product.bias, product.residual
        )
    if product.dtype == "float32" or n % (2 * PAIRED_ROWS):
        return None
    return gated_matmul_kernel(format, product.activation, shared_limit)


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
