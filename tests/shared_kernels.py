"""Models that are compiled one after another share the kernels that they have in common.

LLVM takes most of the time that a tiny model takes to compile, and most of its kernels are those of
the model before: two families may differ in a norm, two variants in a rotation. Here every kernel
is a module of its own that libraries import, and one that was compiled already, equal to the last
expression, with its name and for the same target, is taken as it is.

Only for libraries that are run where they were compiled: what is written to a file goes to LLVM as
a whole.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import tvm
from tvm import tirx
from tvm_ffi import structural_equal, structural_hash
from tvm_ffi.structural import structural_walk

# The least recently used are forgotten: a kernel takes up to a megabyte.
KEPT = 512
_DEFINED = re.compile(r"^define [^@\n]*@([\w.]+)\(", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """`imported` is the LLVM IR of what it calls by name: name -> text that defines it."""

    function: tirx.PrimFunc
    module: tvm.runtime.Module
    imported: dict[str, str]


_kernels: OrderedDict[tuple[str, str, int], list[Kernel]] = OrderedDict()


@contextmanager
def shared_kernels() -> Iterator[None]:
    """For models that are compiled for the CPU inside."""
    build = tirx.build

    def build_apart(module: tvm.IRModule, target: Any, pipeline: Any) -> tvm.runtime.Module:
        def alone(functions: dict[tvm.ir.GlobalVar, tirx.PrimFunc]) -> tvm.runtime.Module:
            one = tvm.IRModule(functions, attrs=module.attrs)
            return build(one, target=target, pipeline=pipeline)

        if target.kind.name != "llvm":
            return build(module, target=target, pipeline=pipeline)
        library = alone({})
        imported: dict[str, str] = {}
        for name, function in module.functions_items():
            key = (name.name_hint, str(target), structural_hash(function))
            same = _kernels.setdefault(key, [])
            _kernels.move_to_end(key)
            kernel = next((k for k in same if structural_equal(k.function, function)), None)
            if kernel is None:
                kernel = Kernel(function, alone({name: function}), _imported(function))
                same.append(kernel)
            # In one module the first of a name would stand for all.
            for called, text in kernel.imported.items():
                assert imported.setdefault(called, text) == text, f"two functions {called}"
            library.import_module(kernel.module)
        while len(_kernels) > KEPT:
            _kernels.popitem(last=False)
        return library

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tirx, "build", build_apart)
        yield


def _imported(function: tirx.PrimFunc) -> dict[str, str]:
    found: dict[str, str] = {}

    def visit(statement: tirx.AttrStmt) -> None:
        if statement.attr_key == "pragma_import_llvm":
            text = statement.value.value
            names = _DEFINED.findall(text)
            assert names, text
            found.update(dict.fromkeys(names, text))

    structural_walk(function.body, (tirx.AttrStmt, visit))
    return found
