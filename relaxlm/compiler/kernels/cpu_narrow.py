"""x @ W.T with x in int8 on CPUs without AVX-512: which kernel runs when.

    rows of x       kernel
    1, 2, 3-4       cpu_narrow_rows: lanes along a row of W, as fast as W can be read
    more            cpu_narrow_panel: lanes across rows of W, as fast as the CPU multiplies;
                    cpu_narrow_squares: the same with i8mm and 4-bit codes;
                    cpu_narrow_rows, if the kernel is to be invariant

W is stored row by row, with 4 or 8 bits in groups of 32, x is `packed` in the order `linear`, and

    y[m, n] = sum over groups g: x_scale[m, g] * scale[n, g]
                                 * (dot(code[n, g], x_code[m, g]) - zero * x_sum[m, g])

The dot products are exact, so what differs from the float product is what rounding x costs.
"""

from tvm import tirx
from tvm.ir import Expr

from relaxlm.compiler.kernels.builder import T, flat
from relaxlm.compiler.kernels.cpu_narrow_dots import dots
from relaxlm.compiler.kernels.cpu_narrow_panel import Panel
from relaxlm.compiler.kernels.cpu_narrow_rows import FewRows, lanes_for
from relaxlm.compiler.kernels.cpu_narrow_squares import Squares
from relaxlm.compiler.kernels.isa import Isa
from relaxlm.compiler.kernels.packed import GROUP
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import reduce_sum_ir

LANES: dict[Isa, int] = {"avxvnni": 8, "avx2": 8, "i8mm": 4, "dotprod": 4}
# Vectors of rows of W and rows of x in a tile: with their sums, what the registers hold.
TILES: dict[Isa, tuple[int, int]] = {
    "avxvnni": (2, 4),
    "avx2": (2, 4),
    "i8mm": (4, 4),
    "dotprod": (4, 4),
}
# The same in pairs of rows of W, for `Squares`.
SQUARES = (4, 8)
# Rows of x for which the lanes lie along a row of W.
FEW = (1, 2, 4)


def supports(matrix: StoredMatrix, isa: Isa) -> bool:
    """Whether a matrix can be multiplied here on CPUs of a kind."""
    quant = matrix.quant
    return (
        isa in LANES
        and quant is not None
        and quant.bits in (4, 8)
        and (quant.group, quant.layout) == (GROUP, "NK")
    )


def imports(matrix: StoredMatrix, isa: Isa) -> list[str]:
    """LLVM IR that the kernels call."""
    assert matrix.quant is not None
    along, widest = lanes_for(matrix, LANES[isa]), LANES[isa]
    texts = [
        text for lanes in (along, widest) for text in dots(isa, lanes, matrix.quant.bits).imports
    ]
    return list(dict.fromkeys([reduce_sum_ir(along), *texts]))


def emit_matmul(
    matrix: StoredMatrix,
    isa: Isa,
    m: Expr,
    packed: tirx.Buffer,
    weight: tirx.Buffer,
    scale: tirx.Buffer,
    out: tirx.Buffer,
    invariant: bool = False,
) -> None:
    """Emit the loops for any number of rows.

    Args:
        m: rows of x, int64, at least 1.
        packed: [m, row_words(K)] int32.
        weight, scale: as stored; see `StoredMatrix`.
        out: [m, N] float32.
        invariant: whether a row's result may not depend on m.
    """
    assert supports(matrix, isa) and matrix.quant is not None, (matrix, isa)
    bits, words, scales = matrix.quant.bits, flat(weight), flat(scale)
    along = dots(isa, lanes_for(matrix, LANES[isa]), bits)
    across = dots(isa, LANES[isa], bits)
    squares = isa == "i8mm" and Squares.fits(matrix, SQUARES[0])
    many = Squares(matrix, across, *SQUARES) if squares else Panel(matrix, across, *TILES[isa])

    def few(sizes: tuple[int, ...]) -> None:
        if not sizes:
            if invariant:
                FewRows(matrix, along, FEW[-1]).emit_many(m, packed, words, scales, out)
            else:
                many.emit(m, packed, words, scales, out)
            return
        with T.If(m <= sizes[0]):
            with T.Then():
                FewRows(matrix, along, sizes[0]).emit(m, packed, words, scales, out)
            with T.Else():
                few(sizes[1:])

    few(FEW)
