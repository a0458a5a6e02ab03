"""Which experts a token passes, on GPUs: the operators of `models/routing.py`, a warp per row.

TVM's schedules give a thread to each row, or none at all, and a token has a single row.
"""

import functools

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import length, tensor
from relaxlm.compiler.kernels.cuda_source import device_call, grid, launches

WARPS = 4
# A lane finds out about a group.
MOST_GROUPS = 32


@functools.cache  # every layer asks
def choose_kernel(experts: int, each: int) -> tirx.PrimFunc:
    """scores [n, experts] float32 -> the `each` largest, and their places int32, [n, each]."""

    def body() -> None:
        n = length("n")
        scores = tensor("scores", (n, experts), "float32")
        values = tensor("values", (n, each), "float32")
        numbers = tensor("numbers", (n, each), "int32")
        with grid([(n + WARPS - 1) // WARPS], WARPS) as (block,):
            device_call(
                "routing.cuh",
                f"relaxlm::choose_experts<{experts}, {each}>",
                *(scores.data, values.data, numbers.data, T.cast(n, "int32"), block),
            )

    return launches(body)


@functools.cache
def limit_kernel(
    experts: int, groups: int, kept: int, best: int, otherwise: float
) -> tirx.PrimFunc:
    """scores [n, experts] float32 -> the same, but `otherwise` outside of the best groups."""

    def body() -> None:
        n = length("n")
        scores = tensor("scores", (n, experts), "float32")
        limited = tensor("limited", (n, experts), "float32")
        with grid([(n + WARPS - 1) // WARPS], WARPS) as (block,):
            device_call(
                "routing.cuh",
                f"relaxlm::limit_to_groups<{experts}, {groups}, {best}>",
                *(scores.data, limited.data, T.cast(n, "int32"), kept),
                *(T.float32(otherwise), block),
            )

    return launches(body)
