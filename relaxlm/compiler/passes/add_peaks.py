"""Add what finds the largest logits quickly (`runtime/peaks.py`), to modules that return logits.

    peaks(logits [m, vocab]) -> [m, blocks]
    gather_logits(logits [m, vocab], places [k]) -> [k, BLOCK]                  on a GPU
    weigh_logits(logits, rows, references, factors [b]) -> [b, blocks]          on a GPU

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
        self._add(builder, "peaks", kernels.peaks_kernel(self.vocab), [], "m", blocks)
        if self.kind == "cuda":
            gather = cuda_logits.gather_kernel(self.vocab)
            self._add(builder, "gather_logits", gather, ["places"], "places", BLOCK)
            weigh = cuda_logits.weigh_kernel(self.vocab)
            names = ["rows", "references", "factors"]
            self._add(builder, "weigh_logits", weigh, names, "b", blocks)
        return builder.finalize()

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
