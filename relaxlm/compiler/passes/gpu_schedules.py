"""TVM's schedule rules for GPUs, for loop nests that no kernel of ours replaces."""

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight

_LIMITS = ("max_num_threads", "max_shared_memory_per_block")


class Matmul(dlight.gpu.Matmul):
    """In tiles, on Metal without its matrix units.

    TVM's rule for those loads a package that parses the instructions of all processors first, which
    takes half a minute.
    """

    def apply(
        self, func: tirx.PrimFunc, target: tvm.target.Target, _: bool
    ) -> s_tir.Schedule | None:
        if target.kind.name == "metal":
            limits = {name: int(target.attrs[name]) for name in _LIMITS}
            target = tvm.target.Target({"kind": "webgpu", **limits})
        return super().apply(func, target, _)


class GEMV(dlight.gpu.GEMV):
    """Leaves a matrix of one row, such as the gate of a shared expert, to the next rule."""

    def apply(self, func: tirx.PrimFunc, target: tvm.target.Target, _: bool):
        try:
            return super().apply(func, target, _)
        except ValueError:  # there are no loops over rows
            return None


class Reduction(dlight.gpu.Reduction):
    """Leaves functions to the next rule whose places depend on what they read, such as routing."""

    def apply(self, func: tirx.PrimFunc, target: tvm.target.Target, _: bool):
        try:
            return super().apply(func, target, _)
        except AssertionError:  # of its analysis of the places that are read
            return None


def gpu_schedules() -> tvm.transform.Pass:
    """The pass; the first rule that applies to a function schedules it."""
    return dlight.ApplyDefaultSchedule(
        Matmul(),
        GEMV(),
        Reduction(),
        dlight.gpu.GeneralReduction(),
        dlight.gpu.Fallback(),
    )
