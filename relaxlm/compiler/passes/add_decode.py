"""Add a function for steps in which every sequence has one token, to be recorded as a CUDA graph.

    forward(ids [n], .., kv, params)    ->    forward(ids [n], .., kv, params)
                                              decode(ids [n], .., kv, params), n at most `rows`

The same kernels in the same order. What differs is the memory plan: `decode` needs room for `rows`
tokens and not for a chunk of a prompt, and `OwnStorage` lets it keep that memory. Runs on scheduled
kernels.
"""

import tvm
from tvm import relax

from relaxlm.compiler.passes.own_storage import UPPER_BOUND
from relaxlm.runtime.decode_steps import DECODE


@tvm.transform.module_pass(opt_level=0, name="AddDecode")
class AddDecode:
    """The pass.

    Args:
        rows: tokens and sequences that a step may have.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        if DECODE in {var.name_hint for var in mod.get_global_vars()}:
            return mod
        forward = mod["forward"]
        decode = relax.utils.copy_with_new_vars(forward).with_attr("global_symbol", DECODE)
        # Tokens, sequences and rows of logits.
        bounds = {length: self.rows for length in ("n", "b", "m")}
        builder = relax.BlockBuilder(mod)
        builder.add_func(decode.with_attr(UPPER_BOUND, bounds), DECODE)
        return builder.finalize()
