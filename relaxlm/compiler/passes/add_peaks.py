"""Add what finds the largest logits quickly (`runtime/peaks.py`), to modules that return logits.

    peaks(logits [m, vocab]) -> [m, blocks]
    gather_logits(logits [m, vocab], places [k]) -> [k, BLOCK]      where a GPU has the logits

Runs on scheduled kernels.
"""

import tvm
from tvm import relax, tirx

from relaxlm.compiler.kernels import cpu_peaks, cuda_logits
from relaxlm.runtime.peaks import BLOCK


@tvm.transform.module_pass(opt_level=0, name="AddPeaks")
class AddPeaks:
    """The pass.

    Args:
        vocab: columns of the logits.
        kind: of the target, "cpu" or "cuda".
    """

    def __init__(self, vocab: int, kind: str) -> None:
        self.vocab, self.kind = vocab, kind

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        builder = relax.BlockBuilder(mod)
        blocks = -(-self.vocab // BLOCK)
        kernels = {"cpu": cpu_peaks, "cuda": cuda_logits}[self.kind]
        self._add(builder, "peaks", "logit_peaks", kernels.peaks_kernel(self.vocab), None, blocks)
        if self.kind == "cuda":
            places = relax.Var("places", relax.TensorType((tirx.Var("places", "int64"),), "int32"))
            kernel = cuda_logits.gather_kernel(self.vocab)
            self._add(builder, "gather_logits", "gather", kernel, places, BLOCK)
        return builder.finalize()

    def _add(
        self,
        builder: relax.BlockBuilder,
        name: str,
        kernel_name: str,
        kernel: tirx.PrimFunc,
        places: relax.Var | None,
        width: int,
    ) -> None:
        """A function of the logits and perhaps of places, which then decide the result's rows."""
        rows = tirx.Var("m", "int64")
        logits = relax.Var("logits", relax.TensorType((rows, self.vocab), "float32"))
        given = [logits] if places is None else [logits, places]
        with builder.function(name, given):
            with builder.dataflow():
                function = builder.add_func(kernel, kernel_name)
                ty = relax.TensorType((given[-1].ty.shape[0], width), "float32")
                found = builder.emit_output(builder.emit(relax.call_tir(function, given, ty)))
            builder.emit_func_output(found)
