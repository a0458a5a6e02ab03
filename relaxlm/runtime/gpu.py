"""TVM's runtimes for GPUs, each a library of its own beside TVM's, where its wheel has one."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from relaxlm.errors import LibraryError
from relaxlm.runtime import cuda, tvm_runtime

# What TVM calls the loader of a library's GPU code, for each kind of device.
LOADERS = {"cuda": "cuda", "metal": "metal", "opencl": "opencl", "hip": "rocm", "rocm": "rocm"}
# Those without kernels of their own, by the names of what drives them.
PLAIN_GPUS = {"metal": "Metal", "opencl": "OpenCL", "rocm": "ROCm"}
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


def why_missing(kind: str) -> str | None:
    """Why nothing that is compiled for a kind of GPU can run here; None if it can."""
    if kind == "cuda":
        usable = load_runtime(kind) and tvm_runtime.exists(tvm_runtime.device(kind))
        return None if usable else "no usable NVIDIA GPU is here"
    if not load_runtime(kind):
        has = "only the one for macOS on ARM has" if kind == "metal" else "none has"
        return f"the TVM installed here has no runtime for it; of the released wheels {has}"
    if not tvm_runtime.exists(tvm_runtime.device(kind)):
        return f"no GPU is here that {PLAIN_GPUS[kind]} can use"
    return None


def missing_gpu(library: Path, kind: str) -> LibraryError:
    """The error that a library cannot run here."""
    return LibraryError(
        f"{library} was compiled for {kind}, and {why_missing(kind)}. Compile for this machine "
        "with `relaxlm compile FOLDER --device cpu`"
    )
