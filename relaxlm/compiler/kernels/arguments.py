"""Kernels with optional arguments, which TVMScript's fixed signatures don't have."""

from collections.abc import Collection

from tvm import tirx


def without_arguments(function: tirx.PrimFunc, names: Collection[str]) -> tirx.PrimFunc:
    """The kernel without the arguments that are called so; its body must not use them."""
    kept = [param for param in function.params if param.name not in names]
    return tirx.PrimFunc(kept, function.body, function.ret_type, function.attrs)
