"""Kernels written in CUDA C++: files of `kernels/cuda/`, called from PrimFuncs that launch them.

A PrimFunc has what TVM knows how to do: tensors with checked shapes, grids, which kernel runs for
how many rows. Its blocks consist of one call of a device function. What the function is compiled
for is in its template arguments, so the files are plain CUDA C++.

    with grid([blocks], warps=8) as (block,):
        device_call("linear.cuh", "relaxlm::linear<...>", x.data, ..., shared_bytes(4096))
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tvm import tirx
from tvm.backend.cuda.op import cuda_func_call
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import emit
from relaxlm.quantization.kv_cache import KVFormat

FOLDER = Path(__file__).parent / "cuda"
WARP = 32

# Names of dtypes in CUDA C++.
C_TYPES = {"float16": "half", "bfloat16": "nv_bfloat16", "float32": "float"}


def c_bool(value: bool) -> str:
    """A flag among template arguments."""
    return "true" if value else "false"


def activation_type(name: str) -> str:
    """An activation of `activations.ACTIVATIONS`."""
    return "relaxlm::" + "".join(word.capitalize() for word in name.split("_"))


def stored_type(format: KVFormat) -> str:
    """What pages of a cache hold."""
    return "relaxlm::Float8" if format.scaled else C_TYPES[format.dtype]


@functools.cache
def source(name: str) -> str:
    """A file with the files that it includes in front, each once."""
    files: dict[str, str] = {}

    def add(name: str) -> None:
        if name not in files:
            text = (FOLDER / name).read_text(encoding="utf-8")
            for included in re.findall(r'^#include "(.+)"$', text, re.MULTILINE):
                add(included)
            files[name] = re.sub(r'^#include ".+"\n', "", text, flags=re.MULTILINE)

    add(name)
    return "".join(files.values())


def launches(body: Callable[[], None]) -> tirx.PrimFunc:
    """The kernel that `body` emits, whose loops TVM does not see into."""
    # Without it, TVM takes what stores nothing that it can see for something to fuse.
    return emit(body)


def device_call(file: str, function: str, *arguments: Expr | int) -> None:
    """Emit the call of a device function, with its template arguments in the name."""
    T.evaluate(cuda_func_call(function, *arguments, source_code=source(file)))


@contextmanager
def grid(
    blocks: Sequence[Expr | int], warps: int, resident: int | None = None
) -> Iterator[list[Expr]]:
    """Blocks of `warps` warps along one to three axes: gives the block's place on each.

    Args:
        resident: blocks that a multiprocessor is to have room for at a time. With None the compiler
            gives up registers, and spills some, for blocks that a kernel's shared memory, of which
            it does not know, may have no room for.
    """
    with ExitStack() as stack:
        places = [
            stack.enter_context(T.thread_binding(extent, f"blockIdx.{axis}"))
            for extent, axis in zip(blocks, "xyz", strict=False)
        ]
        stack.enter_context(T.thread_binding(warps, "threadIdx.y"))
        stack.enter_context(T.thread_binding(WARP, "threadIdx.x"))
        if resident is not None:
            stack.enter_context(T.attr({"tirx.launch_bounds_min_blocks_per_sm": resident}))
        yield [T.cast(place, "int32") for place in places]


def shared_bytes(count: int) -> Expr:
    """The block's shared memory."""
    return T.alloc_buffer((max(count, 16),), "uint8", scope="shared.dyn").data
