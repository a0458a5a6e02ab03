"""Functions of TVM's global table, replaced for a while."""

from collections.abc import Callable
from typing import Any

import tvm_ffi


class GlobalFunctions:
    """Replaces functions, and puts the old ones back."""

    def __init__(self) -> None:
        self._replaced: dict[str, Any] = {}

    def replace(self, name: str, function: Callable) -> None:
        self._replaced[name] = tvm_ffi.get_global_func(name, allow_missing=True)
        tvm_ffi.register_global_func(name, function, override=True)

    def restore(self) -> None:
        for name, function in self._replaced.items():
            if function is None:
                tvm_ffi.remove_global_func(name)
            else:
                tvm_ffi.register_global_func(name, function, override=True)
        self._replaced.clear()
