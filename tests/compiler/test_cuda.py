import stat
import struct
import sys
from pathlib import Path

import pytest
import tvm
import tvm_ffi
from tvm.script import tirx as T

from relaxlm.compiler import cuda
from relaxlm.compiler.cuda import (
    DeviceCode,
    check_device_code,
    compile_fatbin,
    cuda_compilation,
    device_code,
    find_nvcc,
)
from relaxlm.compiler.cuda_report import KernelReport, find_fault, parse_ptxas, worst_first
from relaxlm.compiler.link import Linker, export_library
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import CompileError, ToolchainError
from relaxlm.runtime import cuda as runtime


def has_nvcc() -> bool:
    try:
        find_nvcc()
    except ToolchainError:
        return False
    return sys.platform == "linux"


needs_nvcc = pytest.mark.skipif(
    not has_nvcc(), reason="nvcc is neither installed nor among the installed wheels"
)

SOURCE = 'extern "C" __global__ void add_one(float* x) { x[threadIdx.x] += 1; }\n'


@T.prim_func(s_tir=True)
def add_one(x_h: T.handle):
    n = T.int32()
    x = T.match_buffer(x_h, (n, 64), "float16")
    T.func_attr({"global_symbol": "add_one"})
    for block in T.thread_binding(n, thread="blockIdx.x"):
        for lane in T.thread_binding(64, thread="threadIdx.x"):
            with T.sblock("add"):
                turned = T.sblock_alloc_buffer((64,), "float16", scope="shared.dyn")
                turned[lane] = x[block, lane]
                T.tvm_storage_sync("shared")
                x[block, lane] = turned[63 - lane] + T.float16(1)


@T.prim_func(s_tir=True)
def calls_what_is_not_there(x_h: T.handle):
    x = T.match_buffer(x_h, (64,), "float32")
    T.func_attr({"global_symbol": "broken"})
    for lane in T.thread_binding(64, thread="threadIdx.x"):
        with T.sblock("call"):
            x[lane] = T.call_pure_extern("float32", "no_such_function", x[lane])


def build(function: tvm.tirx.PrimFunc, arch: str):
    target = resolve_device("cuda", arch)
    return tvm.compile(tvm.IRModule({"main": function}), target=target.tvm_target())


@needs_nvcc
def test_library_has_machine_code_for_every_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archs = ("sm_80", "sm_90")
    monkeypatch.setenv("TVM_COMPILE_FORCE_FALLBACK", "1")  # does not matter to us
    theirs = tvm_ffi.get_global_func("tvm_callback_cuda_compile")
    with cuda_compilation(archs, debug_dir=tmp_path / "debug") as result:
        executable = build(add_one, "sm_80,sm_90")
    library = tmp_path / "add_one.so"
    export_library(executable, library)
    images = check_device_code(library, archs)
    assert set(images) == {
        *(DeviceCode("elf", "sm_80"), DeviceCode("elf", "sm_90"), DeviceCode("ptx", "sm_90"))
    }
    # ptxas knows nothing of shared memory that comes with the launch.
    assert [(report.arch, report.kernel, report.shared) for report in result.reports] == [
        *(("sm_80", "add_one_kernel", 128), ("sm_90", "add_one_kernel", 128))
    ]
    assert sorted(path.name for path in (tmp_path / "debug").iterdir()) == [
        *("kernels.cu", "kernels.fatbin", "kernels.ptxas.txt")
    ]
    assert tvm_ffi.get_global_func("tvm_callback_cuda_compile").same_as(theirs)
    # What the library lacks is an error even though it is well-formed.
    with pytest.raises(CompileError) as caught:
        check_device_code(library, ("sm_80", "sm_100"))
    assert str(caught.value).startswith(
        f"{library}: lacks machine code for sm_100, PTX of sm_100; found elf sm_80, "
    )
    # The runtime can read it again; without a GPU that is as far as it goes.
    assert tvm.runtime.load_module(str(library))["add_one"] is not None


@needs_nvcc
def test_same_source_gives_the_same_bytes() -> None:
    first, second = (compile_fatbin(SOURCE, ("sm_80",), find_nvcc())[0] for _ in range(2))
    assert first == second
    assert set(device_code(first)) == {DeviceCode("elf", "sm_80"), DeviceCode("ptx", "sm_80")}


@needs_nvcc
def test_faulty_kernel(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError) as caught, cuda_compilation(("sm_80",), tmp_path):
        build(calls_what_is_not_there, "sm_80")
    source = (tmp_path / "kernels.cu").read_text()
    number, line = next(
        (number, line.strip())
        for number, line in enumerate(source.splitlines(), 1)
        if "no_such_function" in line
    )
    assert str(caught.value) == (
        f"{find_nvcc()} refuses kernel 'broken_kernel': identifier \"no_such_function\" is "
        f"undefined (line {number}: {line}); the source is {tmp_path / 'kernels.cu'}"
    )


KERNEL = 'extern "C" __global__ void __launch_bounds__(64) %s(float* x) { %s }\n'
HELPER = "template <int N> __device__ float helper(float x) { return nothing<N>(x); }\n"


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            KERNEL % ("bad", "__shared__ float s[20000]; s[threadIdx.x] = x[1]; *x = s[2];"),
            "refuses kernel 'bad': uses too much shared data (0x13880 bytes, 0xc000 max)",
        ),
        (
            KERNEL % ("bad", 'asm("ldmatrixx;");'),
            "refuses kernel 'bad': Not a name of any known instruction: 'ldmatrixx' in "
            "`ldmatrixx;`",
        ),
        (
            "extern __device__ float nothing(float);\n" + KERNEL % ("bad", "*x = nothing(*x);"),
            "refuses kernel 'bad': Unresolved extern function '_Z7nothingf'",
        ),
        (
            HELPER + KERNEL % ("bad", "int y = also; *x = helper<3>(*x);"),
            "refuses kernel 'bad': identifier \"also\" is undefined (line 3: "
            'extern "C" __global__ void __launch_bounds__(64) bad(float* x) '
            "{ int y = also; *x = helper<3>(*x); }), and 1 more",
        ),
        ("#include <nowhere.h>\n", "failed to compile kernels.cu (status "),
    ],
    ids=["shared memory", "instruction", "linking", "two errors", "no kernel"],
)
def test_what_nvcc_refuses(source: str, message: str) -> None:
    with pytest.raises(ToolchainError) as caught:
        compile_fatbin(SOURCE + source, ("sm_80",), find_nvcc())
    assert f"{find_nvcc()} {message}" in str(caught.value)
    assert str(caught.value).endswith("; --debug-dump DIR keeps the source")


def test_an_error_in_a_template_names_the_kernel_that_uses_it() -> None:
    source = HELPER + SOURCE + KERNEL % ("bad", "*x = helper<3>(*x);")
    output = """kernels.cu(1): error: no instance of function template "nothing" matches
          detected during instantiation of "float helper<N>(float) [with N=3]" at line 3
kernels.cu(2): error: another
"""
    fault = find_fault(output, source, lambda arch: "")
    assert fault is not None and (fault.kernel, fault.line, fault.more) == ("bad", 1, 1)
    assert find_fault("nvcc fatal   : no luck", source, lambda arch: "") is None


def test_a_library_with_source_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What TVM makes by itself where its CUDA runtime is not loaded."""
    monkeypatch.setenv("TVM_COMPILE_FORCE_FALLBACK", "1")
    library = tmp_path / "fallback.so"
    export_library(build(add_one, "sm_80"), library)
    with pytest.raises(CompileError) as caught:
        check_device_code(library, ("sm_80",))
    assert str(caught.value) == (
        f"{library}: carries the kernels' source text instead of machine code; this is a fault of "
        "relaxlm: TVM's CUDA runtime was not in use when the kernels were compiled"
    )


def fatbin(*images: tuple[int, int, bytes]) -> bytes:
    body = b""
    for kind, number, payload in images:
        body += struct.pack("<HHIQIIII", kind, 0x101, 64, len(payload), 0, 0, 0, number)
        body += bytes(32) + payload
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def elf(machine: int) -> bytes:
    return b"\x7fELF" + bytes(14) + struct.pack("<H", machine) + bytes(4)


def test_device_code_of_a_fat_binary() -> None:
    data = b"before" + fatbin((2, 80, elf(190)), (1, 90, b"compressed"), (2, 90, b"compressed"))
    data += b"between" + fatbin((2, 100, elf(190)), (2, 86, elf(62))) + b"after"
    assert device_code(data) == [
        DeviceCode("elf", "sm_80"),
        DeviceCode("ptx", "sm_90"),
        DeviceCode("elf", "sm_90"),
        DeviceCode("elf", "sm_100"),  # sm_86 claims to be machine code of an x86 processor
    ]


@pytest.mark.parametrize("cut", [4, 20, 60, 100])
def test_a_truncated_fat_binary_lacks_code(cut: int, tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    library.write_bytes(fatbin((2, 80, elf(190)), (1, 80, b"ptx"))[:cut])
    with pytest.raises(CompileError, match="PTX of sm_80; found "):
        check_device_code(library, ("sm_80",))


def test_a_library_without_kernels(tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    library.write_bytes(b"\x7fELF and nothing else")
    with pytest.raises(CompileError) as caught:
        check_device_code(library, ("sm_80", "sm_90"))
    assert str(caught.value) == (
        f"{library}: lacks machine code for sm_80, machine code for sm_90, PTX of sm_90; "
        "found no device code"
    )


def test_ptxas_report() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attend' for 'sm_90'
ptxas info    : Function properties for attend
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 8 bytes cumulative stack size, 192 bytes smem
ptxas info    : Compile time = 13.555 ms
ptxas info    : Compiling entry function 'append' for 'sm_80'
ptxas info    : Function properties for append
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 372 bytes cmem[0]
"""
    reports = parse_ptxas(log)
    assert reports == [
        KernelReport("append", "sm_80", 8, 0, 0, 0),
        KernelReport("attend", "sm_90", 64, 8, 4, 12, shared=192),
    ]
    assert [str(report) for report in reports] == [
        "sm_80 append: 8 registers",
        "sm_90 attend: 64 registers, stack 8 B, spills 4/12 B",
    ]
    assert [report.kernel for report in worst_first(reports)] == ["attend", "append"]


def test_what_spills_comes_first_and_architectures_stay_together() -> None:
    reports = [
        KernelReport("small", "sm_90", 8, 0, 0, 0),
        KernelReport("large", "sm_90", 200, 0, 0, 0),
        KernelReport("large", "sm_100", 20, 0, 0, 0),
        KernelReport("spills", "sm_90", 16, 8, 4, 4),
        KernelReport("small", "sm_100", 8, 0, 0, 0),
        KernelReport("spills", "sm_100", 16, 0, 0, 0),
    ]
    order = [(report.kernel, report.arch) for report in worst_first(reports)]
    names = ("spills", "large", "small")
    assert order == [(name, arch) for name in names for arch in ("sm_90", "sm_100")]


@pytest.fixture
def no_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose only places for nvcc are a CUDA_HOME and a folder of wheels, both empty."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(cuda, "TOOLKIT", tmp_path / "usual")
    monkeypatch.setattr(runtime, "nvidia_wheel_folders", lambda: [tmp_path / "wheels"])
    return tmp_path


def test_missing_nvcc(no_nvcc: Path) -> None:
    with pytest.raises(ToolchainError) as caught, cuda_compilation(("sm_80",)):
        pass
    assert str(caught.value) == (
        "compiling for device 'cuda' needs nvcc, the CUDA compiler, which is not on this machine "
        f"(looked in PATH, CUDA_HOME={no_nvcc}/toolkit, {no_nvcc}/usual, {no_nvcc}/wheels); "
        'install the CUDA 13 toolkit or run `pip install "relaxlm[cuda]"`'
    )


def test_places_of_nvcc(no_nvcc: Path) -> None:
    for folder in ("wheels/bin", "usual/bin", "toolkit/bin", "."):
        path = no_nvcc / folder / "nvcc"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        assert find_nvcc() == path


def test_missing_cuda_runtime_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_ffi, "get_global_func", lambda *_, **__: None)
    monkeypatch.setattr(runtime, "load_cudart", lambda folders: None)
    with pytest.raises(ToolchainError) as caught:
        cuda.enable_cuda_modules()
    assert str(caught.value) == (
        "compiling for device 'cuda' needs libcudart.so.13, the CUDA runtime library, which is not "
        'on this machine; install the CUDA 13 toolkit or run `pip install "relaxlm[cuda]"`'
    )

    monkeypatch.setattr(cuda, "find_linker", lambda: Linker(("/usr/bin/ld",), is_compiler=False))
    with pytest.raises(ToolchainError) as caught:
        cuda._load_driver_stand_in()
    assert str(caught.value) == (
        "compiling for device 'cuda' needs a C compiler, as nvcc itself does; only the linker "
        "/usr/bin/ld was found; install one, for example with `apt install g++`"
    )


@needs_nvcc
def test_the_stand_in_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    if runtime.gpus():
        pytest.skip("there is a real driver")
    cuda.enable_cuda_modules(find_nvcc())
    runtime.gpus.cache_clear()
    assert runtime.gpus() == ()
    assert runtime.load_runtime() is False
