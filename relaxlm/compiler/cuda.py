"""CUDA kernels ahead of time, also on a machine that has no GPU.

TVM's CUDA back end generates C++ and hands it to whoever makes a module of it. That is its CUDA
runtime library, which calls a compiler first (`tvm_callback_cuda_compile`); but that library needs
the driver's `libcuda.so.1`, and where it could not be loaded TVM puts the *source text* into the
model library without a word. Such a library would be compiled on the user's GPU machine at each
start, if that machine has a CUDA compiler at all, and a faulty kernel would show only there.

`cuda_compilation` therefore

- loads TVM's CUDA runtime library after the fact, which registers it just as an import would. On a
  machine without a driver a stand-in for `libcuda.so.1` is built with the C compiler that nvcc
  needs anyway: the nine functions that TVM calls, each of which answers "no device". The linker
  matches libraries by their internal name, so the stand-in is loaded by path from a temporary
  folder, touches no search path, and is gone with the process. It is never built when there is a
  driver.
- puts its own compile function in place of TVM's: nvcc, machine code for every requested
  architecture and PTX of the newest, for GPUs that come later. TVM's function compiles for one
  architecture, by default with NVRTC, and with approximate division and exponentials
  (`--use_fast_math`), which relaxlm's kernels do not want.

`check_device_code` then looks into the linked library, at the fat binary itself.

    with cuda_compilation(target.arch) as build:
        executable = tvm.compile(module, target=target.tvm_target())
    export_library(executable, path)
    check_device_code(path, target.arch)
    build.reports   # registers, shared memory and spills of each kernel on each architecture
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from relaxlm.compiler.cuda_report import (
    DynamicSharedMemory,
    KernelReport,
    find_fault,
    parse_ptxas,
)
from relaxlm.compiler.link import find_linker, run_tool
from relaxlm.compiler.target import arch_number
from relaxlm.errors import CompileError, ToolchainError
from relaxlm.runtime import cuda as runtime

if TYPE_CHECKING:
    import tvm

TOOLKIT = Path("/usr/local/cuda")  # where NVIDIA's installer puts it
INSTALL = 'install the CUDA 13 toolkit or run `pip install "relaxlm[cuda]"`'


@dataclass
class CudaBuild:
    """What happened during one `cuda_compilation`."""

    archs: tuple[str, ...]
    nvcc: Path
    debug_dir: Path | None = None
    ptx: bool = True
    sources: list[str] = field(default_factory=list)
    reports: list[KernelReport] = field(default_factory=list)
    launches: DynamicSharedMemory = field(default_factory=DynamicSharedMemory)
    error: CompileError | None = None

    def compile(self, source: str) -> bytes:
        """CUDA C++ -> a fat binary; what TVM calls. Keeps an error for the caller of TVM."""
        self.sources.append(source)
        suffix = "" if len(self.sources) == 1 else f"_{len(self.sources)}"
        try:
            binary, log = compile_fatbin(
                source, self.archs, self.nvcc, self.debug_dir, f"kernels{suffix}", self.ptx
            )
        except CompileError as error:
            self.error = error
            raise
        self.reports += self.launches.add_to(parse_ptxas(log))
        return binary


@contextlib.contextmanager
def cuda_compilation(
    archs: Sequence[str], debug_dir: Path | None = None, ptx: bool = True
) -> Iterator[CudaBuild]:
    """Within the block, TVM compiles CUDA kernels with nvcc into machine code.

    Args:
        archs: real architectures, ("sm_80", "sm_90").
        debug_dir: where to keep kernels.cu, kernels.fatbin and ptxas.txt.
        ptx: also PTX of the newest.

    Raises:
        ToolchainError: there is no nvcc or no CUDA runtime, or nvcc refused the kernels.
    """
    nvcc = find_nvcc()
    enable_cuda_modules(nvcc)
    import tvm_ffi

    build = CudaBuild(tuple(archs), nvcc, debug_dir, ptx)
    name = "tvm_callback_cuda_compile"
    theirs = tvm_ffi.get_global_func(name, allow_missing=True)
    forced_source = os.environ.pop("TVM_COMPILE_FORCE_FALLBACK", None)
    tvm_ffi.register_global_func(name, build.compile, override=True)
    try:
        with _watched_by(build.launches):
            yield build
    except Exception:
        # An exception that crosses TVM's C++ comes back with another type and a C++ stack trace.
        if build.error is not None:
            raise build.error from None
        raise
    finally:
        if theirs is None:
            tvm_ffi.remove_global_func(name)
        else:
            tvm_ffi.register_global_func(name, theirs, override=True)
        if forced_source is not None:
            os.environ["TVM_COMPILE_FORCE_FALLBACK"] = forced_source


def _watched_by(instrument: DynamicSharedMemory) -> tvm.transform.PassContext:
    """The pass context of now with one more instrument."""
    import tvm

    now = tvm.transform.PassContext.current()
    return tvm.transform.PassContext(
        opt_level=now.opt_level,
        required_pass=list(now.required_pass),
        disabled_pass=list(now.disabled_pass),
        instruments=[*now.instruments, instrument],
        config=dict(now.config),
    )


def find_nvcc() -> Path:
    """nvcc from PATH, $CUDA_HOME, $CUDA_PATH, /usr/local/cuda or the PyPI wheels, in this order.

    Raises:
        ToolchainError: it is in none of them.
    """
    looked = ["PATH"]
    if path := shutil.which("nvcc"):
        return Path(path)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if value := os.environ.get(variable):
            looked.append(f"{variable}={value}")
            if path := shutil.which("nvcc", path=str(Path(value) / "bin")):
                return Path(path)
    for folder in (TOOLKIT, *runtime.nvidia_wheel_folders()):
        looked.append(str(folder))
        if path := shutil.which("nvcc", path=str(folder / "bin")):
            return Path(path)
    raise ToolchainError(
        "compiling for device 'cuda' needs nvcc, the CUDA compiler, which is not on this machine "
        f"(looked in {', '.join(looked)}); {INSTALL}"
    )


def compile_fatbin(
    source: str,
    archs: Sequence[str],
    nvcc: Path,
    debug_dir: Path | None = None,
    name: str = "kernels",
    ptx: bool = True,
) -> tuple[bytes, str]:
    """Compile CUDA C++ to machine code for every architecture and PTX of the newest.

    Args:
        archs: real architectures, ("sm_80", "sm_90").
        debug_dir: where to keep NAME.cu, NAME.fatbin and NAME.ptxas.txt, if anywhere.
        ptx: False for no PTX.

    Returns:
        The fat binary, and what nvcc printed: ptxas's report. The same source gives the same bytes.

    Raises:
        ToolchainError: nvcc refused the source; the message has the kernel and the first error.
    """
    newest = arch_number(max(archs, key=arch_number))
    generate = [f"arch=compute_{arch_number(a)},code=sm_{arch_number(a)}" for a in archs]
    if ptx:
        generate.append(f"arch=compute_{newest},code=compute_{newest}")
    with tempfile.TemporaryDirectory(prefix="relaxlm-nvcc-") as temporary:
        folder = Path(temporary)
        (folder / f"{name}.cu").write_text(source, encoding="utf-8")
        if debug_dir is not None:
            debug_dir.mkdir(parents=True, exist_ok=True)
            (debug_dir / f"{name}.cu").write_text(source, encoding="utf-8")
        # What TVM generates has unused variables, and constants with a double's digits.
        command = [str(nvcc), "--fatbin", "-O3", "-std=c++17", "-diag-suppress=177,1046"]
        command += ["--threads", str(min(len(generate), os.cpu_count() or 1))]
        for option in generate:
            command += ["-gencode", option]
        # ptxas's report is always asked for: asking changes the bytes, and they should not depend
        # on whether anyone reads it.
        command += ["-Xptxas", "-v", "-o", f"{name}.fatbin", f"{name}.cu"]
        try:
            log = run_tool(command, f"compile {name}.cu", cwd=folder)
        except ToolchainError as error:
            raise _refusal(error, source, nvcc, folder / f"{name}.cu", newest, debug_dir) from None
        binary = (folder / f"{name}.fatbin").read_bytes()
    if debug_dir is not None:
        (debug_dir / f"{name}.fatbin").write_bytes(binary)
        (debug_dir / f"{name}.ptxas.txt").write_text(log, encoding="utf-8")
    return binary, log


def _refusal(
    error: ToolchainError,
    source: str,
    nvcc: Path,
    file: Path,
    newest: int,
    debug_dir: Path | None,
) -> ToolchainError:
    """An error that says which kernel nvcc refuses, and why."""

    def ptx(arch: str) -> str:
        text = file.with_suffix(".ptx")
        command = [str(nvcc), "--ptx", "-O3", "-std=c++17", f"-arch=compute_{arch or newest}"]
        # It is written, and then refused once more.
        with contextlib.suppress(ToolchainError):
            run_tool([*command, "-o", text.name, file.name], "write PTX", cwd=file.parent)
        return text.read_text(encoding="utf-8") if text.is_file() else ""

    kept = (
        "--debug-dump DIR keeps the source"
        if debug_dir is None
        else f"the source is {debug_dir / file.name}"
    )
    fault = find_fault(error.output, source, ptx)
    if fault is None:
        return ToolchainError(f"{error}; {kept}")
    kernel = f"kernel '{fault.kernel}'" if fault.kernel else file.name
    return ToolchainError(f"{nvcc} refuses {kernel}: {fault}; {kept}")


@dataclass(frozen=True)
class DeviceCode:
    """One image in a fat binary: machine code (`elf`) or PTX (`ptx`) for an architecture."""

    kind: str
    arch: str


_FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)
_ELF_MACHINE_CUDA = 190


def device_code(data: bytes) -> list[DeviceCode]:
    """The images of all fat binaries in the bytes of a library.

    A fat binary is a header (magic, version, header size, size of what follows) and images, each
    with a header of its own (kind, version, header size, size; the architecture at byte 28).
    """
    images = []
    start = data.find(_FATBIN_MAGIC)
    while 0 <= start <= len(data) - 16:
        _, header, size = struct.unpack_from("<HHQ", data, start + 4)
        position, end = start + header, min(start + header + size, len(data))
        while position + 32 <= end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, position)
            (number,) = struct.unpack_from("<I", data, position + 28)
            if header < 32 or position + header + size > end:  # truncated, or not a fat binary
                break
            payload = data[position + header : position + header + size]
            if kind == 1:
                images.append(DeviceCode("ptx", f"sm_{number}"))
            elif kind == 2 and _is_machine_code(payload):
                images.append(DeviceCode("elf", f"sm_{number}"))
            position += header + size
        start = data.find(_FATBIN_MAGIC, start + 4)
    return images


def _is_machine_code(payload: bytes) -> bool:
    """Whether it is an ELF file for a GPU, or compressed, in which case its header is believed."""
    if not payload.startswith(b"\x7fELF"):
        return bool(payload)
    return len(payload) >= 20 and struct.unpack_from("<H", payload, 18)[0] == _ELF_MACHINE_CUDA


def check_device_code(
    library: Path, archs: Sequence[str], name: Path | None = None, ptx: bool = True
) -> list[DeviceCode]:
    """Make sure that a linked library has machine code for every architecture, and no source.

    Args:
        archs: ("sm_80", "sm_90").
        name: what errors call the library, if it is not yet where it will be.
        ptx: PTX of the newest must be there, too.

    Returns:
        The images found.

    Raises:
        CompileError: something is missing, or the library carries CUDA source text.
    """
    data, name = library.read_bytes(), name or library
    if b"__global__ void" in data:
        raise CompileError(
            f"{name}: carries the kernels' source text instead of machine code; this is a fault "
            "of relaxlm: TVM's CUDA runtime was not in use when the kernels were compiled"
        )
    images = device_code(data)
    machine_code = {image.arch for image in images if image.kind == "elf"}
    wanted = [f"machine code for {arch}" for arch in archs if arch not in machine_code]
    newest = max(archs, key=arch_number)
    if ptx and DeviceCode("ptx", newest) not in images:
        wanted.append(f"PTX of {newest}")
    if wanted:
        found = ", ".join(f"{image.kind} {image.arch}" for image in images) or "no device code"
        raise CompileError(f"{name}: lacks {', '.join(wanted)}; found {found}")
    return images


def enable_cuda_modules(nvcc: Path | None = None) -> None:
    """Make TVM able to create CUDA modules in this process; nothing to do where it already is.

    Args:
        nvcc: also look for the CUDA runtime library in the toolkit of this nvcc.

    Raises:
        ToolchainError: the CUDA runtime library or the C compiler is missing.
    """
    import tvm  # noqa: F401  # loads the runtime itself where a driver and CUDA's runtime are found
    import tvm_ffi

    if tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None:
        return
    folders = []
    if nvcc is not None:
        # /usr/local/bin/nvcc can be a script that calls the toolkit's; then these do not exist.
        root = nvcc.resolve().parent.parent
        folders = [root / "lib64", root / "lib", *root.glob("targets/*/lib")]
    folders.append(TOOLKIT / "lib64")
    if runtime.load_cudart(tuple(folders)) is None:
        raise ToolchainError(
            f"compiling for device 'cuda' needs {runtime.CUDART}, the CUDA runtime library, "
            f"which is not on this machine; {INSTALL}"
        )
    try:
        ctypes.CDLL(runtime.DRIVER, ctypes.RTLD_GLOBAL)
    except OSError:
        _load_driver_stand_in()
    try:
        runtime.load_tvm_library()
    except OSError as error:
        raise ToolchainError(f"TVM's CUDA runtime library cannot be loaded: {error}") from error


def _load_driver_stand_in() -> None:
    """Load a `libcuda.so.1` that knows no device, so that what needs the real one can be loaded."""
    import tvm

    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    try:
        names = re.findall(rb"\0(cu[A-Z]\w+)(?=\0)", library.read_bytes())
    except OSError as error:
        raise ToolchainError(
            f"{library} is not there: this TVM was built without CUDA, install apache-tvm's "
            "released wheel for Linux"
        ) from error
    no_device = 100  # CUDA_ERROR_NO_DEVICE
    # The last two are what relaxlm itself asks a driver, to list GPUs.
    functions = sorted({name.decode() for name in names} | {"cuInit", "cuDeviceGetCount"})
    source = "".join(f"int {name}(void) {{ return {no_device}; }}\n" for name in functions)
    linker = find_linker()
    if not linker.is_compiler:
        raise ToolchainError(
            "compiling for device 'cuda' needs a C compiler, as nvcc itself does; only the linker "
            f"{linker.command[0]} was found; install one, for example with `apt install g++`"
        )
    with tempfile.TemporaryDirectory(prefix="relaxlm-libcuda-") as folder:
        (Path(folder) / "stub.c").write_text(source)
        command = [*linker.command, "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{runtime.DRIVER}"]
        run_tool([*command, "-o", "stub.so", "stub.c"], "build a stand-in for libcuda", cwd=folder)
        ctypes.CDLL(str(Path(folder) / "stub.so"), ctypes.RTLD_GLOBAL)
