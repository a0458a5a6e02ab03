"""NVIDIA GPUs of this machine, and the shared libraries that TVM's CUDA runtime needs.

TVM loads `libtvm_runtime_cuda.so` during `import tvm`, and passes over it without a word when
`libcudart.so.13` or the driver's `libcuda.so.1` is not found. The CUDA runtime of the PyPI wheels
lies where the dynamic linker does not look (`site-packages/nvidia/cu13/lib`), so `load_runtime`
loads it by its path first and TVM's library after it: the linker then recognises both by name.
This works before, after and without `import tvm`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from relaxlm.runtime import tvm_runtime

CUDART = "libcudart.so.13"
DRIVER = "libcuda.so.1"

# CUdevice_attribute of the driver API.
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU: its marketing name and its real architecture (`sm_90`)."""

    name: str
    arch: str


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs that this machine's driver offers, in the driver's order; none without a driver.

    Asks the driver's library, so that `CUDA_VISIBLE_DEVICES` is respected, and `nvidia-smi` where
    that library is not to be had (a container that has the tool alone, for example).
    """
    found = _gpus_of_driver()
    return _gpus_of_nvidia_smi() if found is None else found


def _gpus_of_driver() -> tuple[Gpu, ...] | None:
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else DRIVER)
    except OSError:
        return None
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = []
    for index in range(count.value):
        device = ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        major, minor = ctypes.c_int(), ctypes.c_int()
        calls = (
            driver.cuDeviceGet(ctypes.byref(device), index),
            driver.cuDeviceGetName(name, len(name), device),
            driver.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device),
            driver.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device),
        )
        if not any(calls):
            text = name.value.decode(errors="replace")
            found.append(Gpu(text, f"sm_{major.value}{minor.value}"))
    return tuple(found)


def _gpus_of_nvidia_smi() -> tuple[Gpu, ...]:
    try:
        result = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap,name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if result.returncode != 0:
        return ()
    found = []
    for line in result.stdout.splitlines():
        capability, _, name = line.partition(",")
        major, dot, minor = capability.strip().partition(".")
        if dot and major.isdigit() and minor.isdigit():
            found.append(Gpu(name.strip(), f"sm_{major}{minor}"))
    return tuple(found)


def nvidia_wheel_folders() -> list[Path]:
    """The `nvidia/cu13` folders of the PyPI wheels on this interpreter's path."""
    spec = importlib.util.find_spec("nvidia")
    parents = [] if spec is None else list(spec.submodule_search_locations or [])
    return [Path(parent) / "cu13" for parent in parents if (Path(parent) / "cu13").is_dir()]


def load_cudart(more_folders: tuple[Path, ...] = ()) -> str | None:
    """Load the CUDA runtime library for the whole process; None if it is nowhere.

    Args:
        more_folders: where else to look, after the linker's own places and the PyPI wheels.

    Returns:
        The name under which it was loaded.
    """
    folders = [*(folder / "lib" for folder in nvidia_wheel_folders()), *more_folders]
    for name in (CUDART, *(str(folder / CUDART) for folder in folders)):
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


def load_runtime() -> bool:
    """Make TVM's CUDA runtime available in this process, if it can be; True if it is.

    It is not when there is no GPU, no CUDA runtime library, or a TVM without CUDA.
    """
    if not gpus():
        return False
    tvm_runtime.load()
    import tvm_ffi

    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None:
        return True
    if load_cudart() is None:
        return False
    try:
        load_tvm_library()
    except OSError:
        return False
    return True


def load_tvm_library() -> None:
    """Load `libtvm_runtime_cuda.so`; its initialisers register CUDA with TVM's global functions.

    Raises:
        OSError: it is not there, or a library that it needs is not.
    """
    tvm_runtime.load()
    ctypes.CDLL(str(tvm_runtime.library_folder() / "libtvm_runtime_cuda.so"))
