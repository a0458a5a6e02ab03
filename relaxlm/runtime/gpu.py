"""TVM's runtimes for GPUs, each a library of its own beside TVM's, where its wheel has one."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from relaxlm.errors import LibraryError
from relaxlm.runtime import cuda, tvm_runtime

# What TVM calls the loader of a library's GPU code, for each kind of device.
LOADERS = {"cuda": "cuda", "metal": "metal", "opencl": "opencl", "hip": "rocm", "rocm": "rocm"}
_SUFFIXES = {"darwin": ".dylib", "win32": ".dll"}


def load_runtime(kind: str) -> bool:
    """Make TVM's runtime for a kind of GPU available in this process; True if it is.

    TVM loads it during `import tvm`, and passes over one that does not load.
    """
    if kind == "cuda":
        return cuda.load_runtime()
    tvm_runtime.load()
    if not _is_loaded(kind):
        name = f"libtvm_runtime_{kind}{_SUFFIXES.get(sys.platform, '.so')}"
        try:
            ctypes.CDLL(str(tvm_runtime.library_folder() / name))
        except OSError:
            return False
    return _is_loaded(kind)


def _is_loaded(kind: str) -> bool:
    import tvm_ffi

    return tvm_ffi.get_global_func(f"device_api.{kind}", allow_missing=True) is not None


def why_missing(kind: str) -> str:
    """Why nothing that is compiled for a kind of GPU can run here."""
    if kind == "cuda":
        return "no usable NVIDIA GPU is here"
    if load_runtime(kind):
        return f"no GPU is here that {_NAMES[kind]} can use"
    has = "the one for macOS on ARM has" if kind == "metal" else "none has"
    return f"the TVM installed here has no runtime for it (of the released wheels, {has})"


def missing_gpu(library: Path, kind: str) -> LibraryError:
    """The error that a library cannot run here."""
    return LibraryError(
        f"{library} was compiled for {kind}, and {why_missing(kind)}; compile for this machine "
        "with `relaxlm compile FOLDER --device cpu`"
    )


_NAMES = {"metal": "Metal", "opencl": "OpenCL", "rocm": "ROCm"}
