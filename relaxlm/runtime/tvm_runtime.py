"""TVM's runtime, called without its compiler.

`import tvm` loads the compiler as well: a library of 260 MB and a second of start-up that running
a compiled model has no use for. What it needs is in `libtvm_runtime` (3 MB), reached through
`tvm_ffi`. Both ways work side by side in one process, in any order.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches NumPy the names bfloat16 and float8_e4m3fn
import numpy as np

from relaxlm.errors import LibraryError

# What the kernels that TVM compiles expect of every tensor's address, in bytes.
ALIGNMENT = 64
# relax::VMAllocType of TVM: freed buffers are kept for the next step.
_POOLED = 2
# threading::ThreadGroup::AffinityMode of TVM: the fast cores, where they differ.
_FAST_CORES = 1
# Code and bits of a dtype: bytes.
_BYTES = (1, 8)
# Kinds of dtypes that NumPy passes through DLPack: its own, not those of ml_dtypes.
_EXCHANGED = "iuf"


def library_folder() -> Path:
    """Where the installed TVM keeps its shared libraries.

    Raises:
        LibraryError: TVM is not installed.
    """
    spec = importlib.util.find_spec("tvm")
    if spec is None or not spec.submodule_search_locations:
        raise LibraryError("apache-tvm is not installed: run `pip install relaxlm` again")
    return Path(spec.submodule_search_locations[0]) / "lib"


@functools.cache
def load() -> None:
    """Make the runtime's functions available; does nothing where `import tvm` did."""
    with _torch_hidden():
        import tvm_ffi
    from tvm_ffi.libinfo import load_lib_ctypes

    if tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope", allow_missing=True) is None:
        load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=[library_folder()])


@contextmanager
def _torch_hidden() -> Iterator[None]:
    """Keep `tvm_ffi` from importing torch, where it is installed: a second, and 200 MB.

    It does so to convert torch's tensors, which relaxlm has none of, and to be loaded after it on
    Windows, where the order matters.
    """
    if sys.platform == "win32" or "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def load_module(path: Path | str) -> Any:
    """The `tvm_ffi.Module` of a compiled library's file."""
    load()
    import tvm_ffi

    # A name without a folder would be looked for among the system's libraries.
    return tvm_ffi.load_module(os.path.abspath(path))


def load_library(path: str) -> Any:
    """The same for a shared library whatever its file is called."""
    load()
    import tvm_ffi

    module = tvm_ffi.get_global_func("ffi.Module.load_from_file.so")(path, "so")
    # As `tvm_ffi.load_module` does: what a library has made may outlive what holds on to it.
    tvm_ffi.get_global_func("ffi.ModuleGlobalsAdd")(module)
    return module


def device(kind: str) -> Any:
    """The first device of a kind, such as "cpu" or "metal"; it may not be there."""
    load()
    import tvm_ffi

    return tvm_ffi.device(kind, 0)


def exists(device: Any) -> bool:
    """Whether a device is there and its runtime is loaded."""
    return bool(_function("GetDeviceAttr")(device.dlpack_device_type(), device.index, 0))


def machine(module: Any, device: Any) -> Any:
    """The virtual machine of a compiled library: its functions by name, `machine["forward"]`."""
    vm = module["vm_load_executable"]()
    cpu = _cpu()
    devices = [device] if device == cpu else [device, cpu]  # shapes are computed on the CPU
    setup = [value for d in devices for value in (d.dlpack_device_type(), d.index, _POOLED)]
    vm["vm_initialization"](*setup)
    return vm


def use_threads(count: int) -> None:
    """Use that many threads of this thread's pool, or all if it has fewer."""
    _function("config_threadpool")(_FAST_CORES, count)


def share(array: np.ndarray) -> Any:
    """A tensor on the CPU that shares an array's memory.

    Args:
        array: contiguous and at an address divisible by 64, as `WeightFolder.load` returns it.
            bfloat16 and float8 are passed under TVM's names for them.
    """
    load()
    import tvm_ffi

    def wrap(plain: np.ndarray) -> Any:
        return tvm_ffi.from_dlpack(plain, require_alignment=ALIGNMENT, require_contiguous=True)

    if array.dtype.kind in _EXCHANGED:
        return wrap(array)
    return view(wrap(array.view(f"u{array.dtype.itemsize}")), array.shape, array.dtype.name)


def view(tensor: Any, shape: Sequence[int], dtype: str) -> Any:
    """The same memory under another shape or dtype."""
    import tvm_ffi

    return _function("TVMTensorCreateView")(tensor, tvm_ffi.Shape(shape), tvm_ffi.dtype(dtype), 0)


def part(tensor: Any, start: int, count: int) -> Any:
    """The numbers start .. start + count - 1 of a tensor [k], at an address of their own.

    A plain view would have the tensor's address and an offset, which compiled kernels refuse. Only
    for devices whose pointers are addresses: CPUs and CUDA.
    """
    import tvm_ffi

    offset = start * tensor.dtype.itemsize
    create = _function("TVMTensorCreateView")
    shape = tvm_ffi.Shape((count,))
    moved = _Moved(create(tensor, shape, tvm_ffi.dtype(str(tensor.dtype)), offset))
    return tvm_ffi.from_dlpack(moved, require_alignment=ALIGNMENT)


class _Moved:
    """Offers a view through DLPack with its offset added to its address."""

    def __init__(self, view: Any) -> None:
        self._device = view.__dlpack_device__()
        self._capsule = view.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        exchanged = _DLTensor.from_address(pointer(self._capsule, b"dltensor"))
        exchanged.data = (exchanged.data or 0) + exchanged.byte_offset
        exchanged.byte_offset = 0

    def __dlpack__(self, **_: object) -> object:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device


class _DLTensor(ctypes.Structure):
    """As DLPack's header has it; it is the first field of what a capsule holds."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint32),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


def aligned(count: int, dtype: Any) -> np.ndarray:
    """[count] numbers that are not set, at an address that tensors may have."""
    size = count * np.dtype(dtype).itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype)


def empty(shape: Sequence[int], dtype: str, device: Any) -> Any:
    """A tensor whose values are not set."""
    load()
    import tvm_ffi

    allocate = _function("TVMTensorAllocWithScope")
    return allocate(tvm_ffi.Shape(shape), tvm_ffi.dtype(dtype), device, None)


def upload(array: np.ndarray, device: Any) -> Any:
    """A copy of a contiguous array of NumPy's own dtypes on a device."""
    tensor = empty(array.shape, array.dtype.name, device)
    overwrite(tensor, array)
    return tensor


def overwrite(tensor: Any, array: np.ndarray) -> None:
    """Replace a tensor's values by those of a contiguous array of the same shape and dtype."""
    if array.nbytes:
        copy = _function("TVMTensorCopyFromBytes")
        copy(tensor, array.ctypes.data_as(ctypes.c_void_p), array.nbytes)


def copy(source: Any, target: Any) -> None:
    """Copy a tensor's values into another one, possibly on another device."""
    _function("TVMTensorCopyFromTo")(source, target)


def copied_to(tensor: Any, device: Any) -> Any:
    """A copy of a tensor on a device."""
    target = empty(tensor.shape, str(tensor.dtype), device)
    copy(tensor, target)
    return target


def download(tensor: Any) -> np.ndarray:
    """A tensor's values; on the CPU in the tensor's own memory, which lives as long as they do."""
    if tensor.device == _cpu() and np.dtype(str(tensor.dtype)).kind in _EXCHANGED:
        return np.from_dlpack(tensor)
    array = np.empty(tuple(tensor.shape), str(tensor.dtype))
    if array.nbytes:
        copy = _function("TVMTensorCopyToBytes")
        copy(tensor, array.ctypes.data_as(ctypes.c_void_p), array.nbytes)
    return array


def new_stream(device: Any) -> int:
    """A queue of work on a GPU, beside the one that everything is in; there for good."""
    return int(_function("Device_StreamCreate")(device))


def use_stream(device: Any, stream: int) -> AbstractContextManager[object]:
    """Within the block, what this thread launches goes into a queue."""
    import tvm_ffi

    return tvm_ffi.use_raw_stream(device, stream)


def scratch_address(device: Any) -> int:
    """Where the memory lies that this thread's kernels take while they are launched.

    There is one such buffer per thread, as no kernel takes two, and it moves only to grow.
    """
    take, give_back = _scratch_functions()
    kind = device.dlpack_device_type(), device.index
    address = take(*kind, 1, *_BYTES)
    give_back(*kind, address)
    return address or 0


@functools.cache
def _scratch_functions() -> tuple[Any, Any]:
    """As compiled host code calls them: TVMBackendAllocWorkspace and TVMBackendFreeWorkspace."""
    load()
    name = "tvm_runtime.dll" if sys.platform == "win32" else "libtvm_runtime.so"
    library = ctypes.CDLL(str(library_folder() / name))
    take, give_back = library.TVMBackendAllocWorkspace, library.TVMBackendFreeWorkspace
    number = ctypes.c_int
    take.argtypes = (number, number, ctypes.c_uint64, number, number)
    take.restype = ctypes.c_void_p
    give_back.argtypes = (number, number, ctypes.c_void_p)
    return take, give_back


@functools.cache
def _cpu() -> Any:
    return device("cpu")


@functools.cache
def _function(name: str) -> Any:
    load()
    import tvm_ffi

    return tvm_ffi.get_global_func(f"runtime.{name}")
