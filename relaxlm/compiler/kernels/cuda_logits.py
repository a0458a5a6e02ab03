"""What choosing tokens needs to know of logits on GPUs (`runtime/step_logits.py`)."""

import functools

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import length, tensor
from relaxlm.compiler.kernels.cuda_source import device_call, grid, launches
from relaxlm.runtime.peaks import BLOCK

WARPS = 4


def _launch(name: str, count: Expr, *arguments: Expr | int) -> None:
    """A warp for each of so many blocks of logits."""
    with grid([(count + WARPS - 1) // WARPS], WARPS) as (group,):
        device_call("logits.cuh", f"relaxlm::{name}<{BLOCK}>", *arguments, group)


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
        _launch("logit_peaks", m * blocks, logits.data, peaks.data, T.cast(m, "int32"), vocab)

    return launches(body)


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
        given = [tensor(name, (k,), "int32") for name in ("rows", "references", "factors")]
        sums = tensor("sums", (k, blocks), "float32")
        pointers = (logits.data, *(buffer.data for buffer in given), sums.data)
        _launch("weigh_logits", k * blocks, *pointers, T.cast(k, "int32"), vocab)

    return launches(body)


@functools.cache
def gather_kernel(vocab: int) -> tirx.PrimFunc:
    """(logits [m, vocab] float32, places [k] int32) -> [k, BLOCK] float32: blocks of logits.

    Place i * ceil(vocab / BLOCK) + j is block j of row i; behind a row's end there is -inf. k must
    not be 0.
    """

    def body() -> None:
        m, k = length("m"), length("k")
        logits = tensor("logits", (m, vocab), "float32")
        places = tensor("places", (k,), "int32")
        out = tensor("gathered", (k, BLOCK), "float32")
        pointers = (logits.data, places.data, out.data)
        _launch("gather_logits", k, *pointers, T.cast(k, "int32"), vocab)

    return launches(body)
