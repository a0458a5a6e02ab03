"""Add `peaks(logits [m, vocab]) -> [m, blocks]`, with which a CPU finds the largest logits quickly.

Only in modules whose `forward` returns logits. Runs on scheduled kernels.
"""

import tvm
from tvm import relax, tirx

from relaxlm.compiler.kernels.cpu_peaks import peaks_kernel
from relaxlm.runtime.peaks import BLOCK


@tvm.transform.module_pass(opt_level=0, name="AddPeaks")
class AddPeaks:
    """The pass.

    Args:
        vocab: columns of the logits.
    """

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        builder = relax.BlockBuilder(mod)
        rows = tirx.Var("m", "int64")
        logits = relax.Var("logits", relax.TensorType((rows, self.vocab), "float32"))
        shape = (rows, -(-self.vocab // BLOCK))
        with builder.function("peaks", [logits]):
            with builder.dataflow():
                kernel = builder.add_func(peaks_kernel(self.vocab), "logit_peaks")
                call = relax.call_tir(kernel, [logits], relax.TensorType(shape, "float32"))
                found = builder.emit_output(builder.emit(call))
            builder.emit_func_output(found)
        return builder.finalize()
