"""Turn the operators of recurrent layers (`models/state.py`) into kernels for one target."""

from tvm import relax

from relaxlm.compiler.passes.signature import PagedSignature
from relaxlm.errors import UnsupportedError
from relaxlm.models.state import CAUSAL_CONV, LINEAR_SCAN, PREVIOUS_ROW


def lower_state_operator(
    call: relax.Call, builder: relax.BlockBuilder, signature: PagedSignature, kind: str
) -> relax.Expr | None:
    """What takes the place of a call; None if it is none of the operators.

    Args:
        call: of `relax.call_dps_packed`, its arguments rewritten already.
        kind: of the target.

    Raises:
        UnsupportedError: there is no kernel for this operator on this target.
    """
    name = str(call.args[0].global_symbol)
    if name not in (LINEAR_SCAN, CAUSAL_CONV, PREVIOUS_ROW):
        return None
    raise UnsupportedError(f"{name} is not supported on {kind}: there is no kernel for it")
