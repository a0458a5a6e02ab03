from pathlib import Path

import pytest

from relaxlm.compiler import target as targets
from relaxlm.compiler.platforms import CPU_LEVELS
from relaxlm.compiler.target import DeviceTarget, parse_cuda_archs, resolve_device
from relaxlm.errors import CompileError, ConfigError, UnsupportedError
from relaxlm.runtime import cpu, cuda
from relaxlm.runtime.cuda import Gpu


@pytest.fixture(autouse=True)
def linux_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.sys, "platform", "linux")
    monkeypatch.setattr(cuda, "gpus", lambda: ())


def message(error: type[Exception], *arguments: str | None) -> str:
    with pytest.raises(error) as caught:
        resolve_device(*arguments)  # type: ignore[arg-type]
    return str(caught.value)


def test_auto_is_the_cpu_without_a_gpu() -> None:
    assert resolve_device("auto").kind == "cpu"


def test_auto_is_cuda_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cuda, "gpus", lambda: (Gpu("A", "sm_90"), Gpu("B", "sm_86"), Gpu("A", "sm_90"))
    )
    target = resolve_device("auto")
    assert target == DeviceTarget("cuda", ("sm_86", "sm_90"), ())
    assert target.suffix == ".so"


def test_devices_that_are_not() -> None:
    assert message(ConfigError, "gpu").startswith(
        "unknown device 'gpu'; the devices are auto, cpu, cuda, metal, opencl, rocm, wasm, webgpu, "
        "linux-x86_64, "
    )
    assert message(UnsupportedError, "vulkan") == (
        "device 'vulkan' is not supported: the released TVM has no Vulkan code generator; use cuda "
        "on an NVIDIA GPU, or cpu"
    )
    assert message(UnsupportedError, "nvptx") == (
        "device 'nvptx' is not supported: TVM's LLVM back end for it fails on float16 kernels; use "
        "cuda, which compiles with nvcc"
    )


def test_cuda_needs_an_architecture_or_a_gpu() -> None:
    assert message(ConfigError, "cuda") == (
        "device 'cuda': no NVIDIA GPU is here to take the architecture from; name it: --arch sm_80 "
        "(A100), --arch sm_90 (H100), or several, --arch sm_80,sm_90"
    )


def test_cuda_architectures_are_sorted_and_unique() -> None:
    assert parse_cuda_archs("sm_120, sm_80,sm_90,sm_80") == ("sm_80", "sm_90", "sm_120")


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        (
            "80",
            "arch '80': '80' is not the name of a GPU architecture, such as sm_80; several are "
            "separated by commas",
        ),
        (
            "sm_80;sm_90",
            "arch 'sm_80;sm_90': 'sm_80;sm_90' is not the name of a GPU architecture, such as "
            "sm_80; several are separated by commas",
        ),
        (
            "sm_90,sm_70",
            "arch 'sm_90,sm_70': CUDA 13 does not compile for sm_70; the oldest is sm_75",
        ),
        (
            "sm_91",
            "arch 'sm_91': sm_91 is not known; CUDA 13 compiles for sm_75, sm_80, sm_86, sm_87, "
            "sm_88, sm_89, sm_90, sm_100, sm_103, sm_110, sm_120, sm_121",
        ),
    ],
)
def test_architectures_that_are_not(arch: str, expected: str) -> None:
    assert message(ConfigError, "cuda", arch) == expected


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "gpus", lambda: (Gpu("Tesla V100", "sm_70"),))
    assert message(ConfigError, "cuda") == (
        "arch 'sm_70': CUDA 13 does not compile for sm_70; the oldest is sm_75"
    )


def test_cuda_is_for_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.sys, "platform", "darwin")
    monkeypatch.setattr(targets.platform, "system", lambda: "Darwin")
    assert message(UnsupportedError, "cuda", "sm_80") == (
        "device 'cuda' is not supported on Darwin: libraries for CUDA are compiled on Linux; use "
        "cpu"
    )


def test_cpu_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "architecture", lambda machine=None: "x86_64")
    assert set(resolve_device("cpu", "x86-64-v4").cpu_features) - set(
        resolve_device("cpu", "x86-64-v3").cpu_features
    ) == {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
    assert {"avx512vnni", "avx512bf16"} <= set(resolve_device("cpu:znver5").cpu_features)
    assert message(ConfigError, "cpu", "pentium9").startswith(
        "arch 'pentium9' is not known for linux-x86_64; expected x86-64-v2, x86-64-v3, "
        "x86-64-v3+avxvnni, x86-64-v4, x86-64-v4+vnni, x86-64-v4+vnni+bf16, x86-64-v4+amx, or one "
        "of LLVM's processors: "
    )
    monkeypatch.setattr(cpu, "architecture", lambda machine=None: "aarch64")
    assert message(ConfigError, "cpu", "x86-64-v3").startswith(
        "arch 'x86-64-v3' is not known for linux-arm64; expected armv8-a, "
    )


def test_output_names(tmp_path: Path) -> None:
    target = resolve_device("cpu")
    target.check_output(tmp_path / "model.so")
    with pytest.raises(ConfigError) as caught:
        target.check_output(Path("model.dll"))
    assert str(caught.value) == (
        "output model.dll: a library for cpu is a *.so file, not '.dll'; *.tar holds object files"
    )


def test_describe() -> None:
    target = DeviceTarget("cuda", ("sm_80", "sm_90"), ())
    assert target.describe() == {
        "kind": "cuda",
        "arch": ["sm_80", "sm_90"],
        "versions": [],
        "system": "linux",
        "cpu": cpu.architecture(),
        "cpu_features": [],
    }


def test_cuda_target_is_for_the_oldest_architecture() -> None:
    target = resolve_device("cuda", "sm_90,sm_80").tvm_target()
    assert (target.kind.name, target.arch, target.host.kind.name) == ("cuda", "sm_80", "llvm")


needs_x86 = pytest.mark.skipif(cpu.architecture() != "x86_64", reason="about LLVM's x86 names")


@needs_x86
@pytest.mark.parametrize("feature", [*cpu.X86_FEATURES, *cpu.UNUSABLE])
def test_llvm_knows_the_x86_features(feature: str) -> None:
    from tvm.target import Target, codegen

    plain = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"}
    assert not codegen.target_has_features(feature, Target(plain))
    assert codegen.target_has_features(feature, Target({**plain, "mattr": [f"+{feature}"]}))


@pytest.mark.parametrize("feature", cpu.ARM_FEATURES)
def test_llvm_knows_the_arm_features(feature: str) -> None:
    from tvm.target import Target, codegen

    plain = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "generic"}
    assert codegen.target_has_features(feature, Target({**plain, "mattr": [f"+{feature}"]}))


def enabled(device: DeviceTarget) -> set[str]:
    from tvm.target import codegen

    target = device.tvm_target()
    known = {*cpu.tracked_features(), *cpu.UNUSABLE}
    return {feature for feature in known if codegen.target_has_features(feature, target)}


@pytest.mark.parametrize("arch", [None, "native", *CPU_LEVELS["x86_64"]])
def test_llvm_uses_exactly_the_listed_features(arch: str | None) -> None:
    if arch in CPU_LEVELS["x86_64"] and cpu.architecture() != "x86_64":
        pytest.skip("a level of x86-64")
    device = resolve_device("cpu", arch)
    assert enabled(device) == set(device.cpu_features)


@needs_x86
@pytest.mark.parametrize("name", ["diamondrapids", "znver5", "skylake-avx512", "x86-64"])
def test_a_wrong_guess_of_the_processor_does_no_harm(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvm.target import codegen

    features = frozenset({"sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "cx16", "avx", "f16c"})
    monkeypatch.setattr(cpu, "host_cpu_features", lambda: features)
    monkeypatch.setattr(codegen, "llvm_get_system_cpu", lambda: name)
    assert enabled(resolve_device("cpu")) == features


@needs_x86
def test_features_that_stay_on_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # AVX2 builds on AVX: no machine has only the first, but a table with a fault could say so.
    monkeypatch.setattr(cpu, "host_cpu_features", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(cpu, "UNUSABLE", ())
    from tvm.target import codegen

    monkeypatch.setattr(codegen, "llvm_get_system_cpu", lambda: "x86-64")
    with pytest.raises(CompileError) as caught:
        resolve_device("cpu").tvm_target()
    assert str(caught.value) == (
        "LLVM's processor 'x86-64' keeps avx, sse3, sse4.1, sse4.2, ssse3 switched on, which this "
        "machine does not have; compile with --arch x86-64-v3 or an older level"
    )


def test_browsers_have_one_architecture_and_the_suffix_of_webassembly() -> None:
    target = resolve_device("wasm")
    assert (target.kind, target.kernels, target.suffix) == ("wasm", "cpu", ".wasm")
    assert target.describe() == {
        "kind": "wasm",
        "arch": ["wasm32"],
        "versions": [],
        "system": "web",
        "cpu": "wasm32",
        "cpu_features": ["nontrapping-fptoint", "sign-ext", "simd128"],
    }
    gpu = resolve_device("webgpu")
    assert (gpu.kind, gpu.kernels, gpu.suffix) == ("webgpu", "gpu", ".wasm")
    assert gpu.describe()["cpu"] == "wasm32"
    assert message(ConfigError, "wasm", "wasm64") == (
        "arch 'wasm64': device 'wasm' has one architecture; leave --arch out"
    )


def test_source_text_of_kernels_is_for_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    metal, opencl = resolve_device("metal"), resolve_device("opencl:android-arm64")
    assert (metal.kind, metal.arch, metal.kernels, metal.suffix) == (
        "metal",
        ("macos-arm64",),
        "gpu",
        ".dylib",
    )
    assert (metal.describe()["system"], metal.describe()["cpu"]) == ("darwin", "aarch64")
    assert (opencl.kind, opencl.suffix, opencl.platform.system) == ("opencl", ".so", "android")
    assert resolve_device("metal:ios").suffix == ".a"
    assert message(ConfigError, "metal", "linux-arm64") == (
        "arch 'linux-arm64': for device 'metal' it is the machine that loads the library: "
        "macos-arm64, ios"
    )
    # Without a name it is this machine, if it is one of them.
    monkeypatch.setattr(targets, "this_platform", lambda: targets.PLATFORMS["linux-arm64"])
    assert resolve_device("opencl").arch == ("linux-arm64",)
    assert resolve_device("metal").arch == ("macos-arm64",)


def test_rocm_has_one_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("rocm:gfx90a").arch == ("gfx90a",)
    assert message(ConfigError, "rocm") == (
        "device 'rocm': name the GPU's architecture, which rocminfo prints: --arch gfx90a (MI200), "
        "--arch gfx942 (MI300), --arch gfx1100 (RX 7900)"
    )
    assert message(ConfigError, "rocm", "gfx90a,gfx942").startswith(
        "arch 'gfx90a,gfx942' is not known; a library for ROCm is for one of gfx906, gfx908, "
    )
    monkeypatch.setattr(targets.sys, "platform", "darwin")
    monkeypatch.setattr(targets.platform, "system", lambda: "Darwin")
    assert message(UnsupportedError, "rocm", "gfx90a") == (
        "device 'rocm' is not supported on Darwin: libraries for ROCm are compiled on Linux; use "
        "cpu"
    )


@pytest.mark.parametrize("device", ["metal", "opencl", "rocm:gfx90a", "webgpu"])
def test_what_kernels_of_a_gpu_may_use(device: str) -> None:
    target = resolve_device(device).tvm_target()
    assert (target.kind.name, target.host.kind.name) == (device.partition(":")[0], "llvm")
    assert int(target.attrs["max_num_threads"]) == 256
    # Only Apple's GPUs are sure to have 32 lanes that move in step.
    assert int(target.attrs["thread_warp_size"]) == (32 if device == "metal" else 1)
