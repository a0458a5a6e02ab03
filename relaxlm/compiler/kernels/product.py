"""What a product with a stored matrix computes on GPUs, for the kernels of all of them."""

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx

from relaxlm.quantization.groupwise import GroupQuant


@dataclass(frozen=True)
class Product:
    """(x [m, K], *stored matrix [N, K], bias [N]?, residual [m, N]?) -> out [m, N].

    out = x times the matrix + bias + residual, added up in float32 and rounded once. With an
    activation there is neither of them, and out [m, N / 2] is the activation of x times the first
    half of the rows, times x times the others.

    Attributes:
        shape: (N, K).
        quant: how the matrix is stored; None for plain values.
        stored: dtype of plain values, or of scales.
        dtype: of x.
        out_dtype: of out and the residual.
        bias: its dtype; None for none.
        activation: one of `activations.ACTIVATIONS`; None for a plain product.
    """

    shape: tuple[int, int]
    quant: GroupQuant | None
    stored: str
    dtype: str
    out_dtype: str
    bias: str | None = None
    residual: bool = False
    activation: str | None = None


# The kernel of a product, whose m must not be 0; None where there is none.
ProductKernel = Callable[[Product], tirx.PrimFunc | None]
