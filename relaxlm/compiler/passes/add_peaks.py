"""Add what finds the largest logits quickly (`runtime/peaks.py`), to modules that return logits.

    peaks(logits [m, vocab]) -> [m, blocks]
    gather_logits(logits [m, vocab], places [k]) -> [k, BLOCK]                  on a GPU
    weigh_logits(logits, rows, references, factors [b]) -> [b, blocks]          on a GPU
    highest_blocks(peaks [1, blocks], counted [places]) -> [places] int32       on a plain GPU

Runs on scheduled kernels.
"""

import tvm
from tvm import relax, tirx

from relaxlm.compiler.kernels import cpu_peaks, cuda_logits, gpu_logits
from relaxlm.runtime.peaks import BLOCK


@tvm.transform.module_pass(opt_level=0, name="AddPeaks")
class AddPeaks:
    """The pass.

    Args:
        vocab: columns of the logits.
        kind: of the target's kernels: "cpu", "cuda" or "gpu".
    """

    def __init__(self, vocab: int, kind: str) -> None:
        self.vocab, self.kind = vocab, kind

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        builder = relax.BlockBuilder(mod)
        blocks = -(-self.vocab // BLOCK)
        kernels = {"cpu": cpu_peaks, "cuda": cuda_logits, "gpu": gpu_logits}[self.kind]
        self._add(builder, "peaks", kernels.peaks_kernel(self.vocab), [], "m", blocks)
        if self.kind == "cpu":
            return builder.finalize()
        gather = kernels.gather_kernel(self.vocab)
        self._add(builder, "gather_logits", gather, ["places"], "places", BLOCK)
        weigh = kernels.weigh_kernel(self.vocab)
        self._add(builder, "weigh_logits", weigh, ["rows", "references", "factors"], "b", blocks)
        if self.kind == "gpu":
            self._add_highest(builder, blocks)
        return builder.finalize()

    def _add_highest(self, builder: relax.BlockBuilder, blocks: int) -> None:
        """A function of one row's peaks, and of integers [places] of which the length counts."""
        count = tirx.Var("places", "int64")
        peaks = relax.Var("peaks", relax.TensorType((1, blocks), "float32"))
        counted = relax.Var("counted", relax.TensorType((count,), "int32"))
        with builder.function("highest_blocks", [peaks, counted]):
            with builder.dataflow():
                kernel = builder.add_func(gpu_logits.highest_kernel(self.vocab), "highest_kernel")
                call = relax.call_tir(kernel, [peaks, counted], relax.TensorType((count,), "int32"))
                found = builder.emit_output(builder.emit(call))
            builder.emit_func_output(found)

    def _add(
        self,
        builder: relax.BlockBuilder,
        name: str,
        kernel: tirx.PrimFunc,
        names: list[str],
        count: str,
        width: int,
    ) -> None:
        """A function of the logits and of integers [count], which decide the rows of the result."""
        rows = tirx.Var("m", "int64")
        length = rows if count == "m" else tirx.Var(count, "int64")
        given = [relax.Var("logits", relax.TensorType((rows, self.vocab), "float32"))]
        given += [relax.Var(each, relax.TensorType((length,), "int32")) for each in names]
        with builder.function(name, given):
            with builder.dataflow():
                function = builder.add_func(kernel, f"{name}_kernel")
                ty = relax.TensorType((length, width), "float32")
                found = builder.emit_output(builder.emit(relax.call_tir(function, given, ty)))
            builder.emit_func_output(found)
