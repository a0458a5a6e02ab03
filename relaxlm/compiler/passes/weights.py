"""Recognise where a matrix comes from: shared by the passes that fuse a weight into its use."""

from dataclasses import dataclass

import tvm
from tvm import relax

from relaxlm.quantization.groupwise import GroupQuant
from relaxlm.quantization.transform import DEQUANTIZE, read_tag


@dataclass(frozen=True)
class StoredWeight:
    """A weight [N, K] behind a float expression: the stored variables and how they are read.

    `quant` is None where the single stored tensor holds the values themselves.
    """

    stored: tuple[relax.Expr, ...]
    quant: GroupQuant | None
    shape: tuple[int, ...]


def stored_weight(mod: tvm.IRModule, expr: relax.Expr, lookup) -> StoredWeight | None:
    """The parameter that `expr` is made of, if it is one directly, cast or dequantized.

    Args:
        lookup: from a variable to what it is bound to, or None.
    """
    shape = expr.ty.shape
    if shape is None or any(not isinstance(extent, tvm.tirx.IntImm) for extent in shape):
        return None
    extents = tuple(int(extent) for extent in shape)

    def is_parameter(expr: relax.Expr) -> bool:
        # Bundled parameters are items of a tuple.
        return isinstance(expr, relax.Var) and isinstance(
            lookup(expr), relax.TupleGetItem | type(None)
        )

    if is_parameter(expr):
        return StoredWeight((expr,), None, extents)
    value = lookup(expr) if isinstance(expr, relax.Var) else expr
    if not isinstance(value, relax.Call):
        return None
    if value.op == tvm.ir.Op.get("relax.astype"):
        source = value.args[0]
        return StoredWeight((source,), None, extents) if is_parameter(source) else None
    if value.op == tvm.ir.Op.get("relax.call_tir"):
        function = mod[value.args[0]]
        if DEQUANTIZE in (function.attrs or {}):
            quant = read_tag(str(function.attrs[DEQUANTIZE]))
            return StoredWeight(tuple(value.args[1]), quant, extents)
    return None
