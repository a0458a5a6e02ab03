"""What a library is compiled for: a device, its architectures and the CPU features of host code.

`resolve_device` turns the options `--device` and `--arch` into a `DeviceTarget` and refuses what
relaxlm cannot compile, before any work starts. It does not import TVM; `DeviceTarget.tvm_target`
does.

On the CPU, LLVM gets a processor name for its cost model and an explicit list of instruction-set
extensions. The name comes from LLVM, which guesses it from family and model numbers; in a virtual
machine the guess can name a processor that has more or fewer extensions than this one. Hence the
list comes from the operating system (`relaxlm.runtime.cpu`): every extension there is switched on,
every other one that the name implies is switched off, and the result is read back from LLVM.
"""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from relaxlm.compiler.kernels.isa import NEEDS, best_isa
from relaxlm.compiler.platforms import (
    PLATFORMS,
    PORTABLE,
    WEB,
    Platform,
    features_of,
    portable_levels,
    this_platform,
)
from relaxlm.errors import CompileError, ConfigError, UnsupportedError
from relaxlm.runtime import cpu, cuda

if TYPE_CHECKING:
    import tvm

Kind = Literal["cpu", "cuda", "metal", "opencl", "rocm", "wasm", "webgpu"]
KINDS = get_args(Kind)
DEVICES = ("auto", *KINDS, *PLATFORMS)

REFUSED = {
    "vulkan": "the released TVM has no Vulkan code generator; use cuda on an NVIDIA GPU, or cpu",
    "nvptx": "TVM's LLVM back end for it fails on float16 kernels; use cuda, which compiles "
    "with nvcc",
}

# GPU architectures that CUDA 13 compiles for, and a card of each. Code for sm_XY also runs on
# later minor versions of the same major one; PTX of the newest covers what comes after.
CUDA_ARCHITECTURES = {
    "sm_75": "T4, RTX 20",
    "sm_80": "A100",
    "sm_86": "RTX 30, A10",
    "sm_87": "Jetson Orin",
    "sm_88": "",
    "sm_89": "RTX 40, L4, L40",
    "sm_90": "H100, H200",
    "sm_100": "B200",
    "sm_103": "B300",
    "sm_110": "Jetson Thor",
    "sm_120": "RTX 50",
    "sm_121": "DGX Spark",
}

# AMD's, and a card of each. Code is for one of them only.
ROCM_ARCHITECTURES = {
    "gfx906": "MI50, Radeon VII",
    "gfx908": "MI100",
    "gfx90a": "MI200",
    "gfx942": "MI300",
    "gfx950": "MI350",
    "gfx1030": "RX 6800, RX 6900",
    "gfx1100": "RX 7900",
    "gfx1101": "RX 7800",
    "gfx1102": "RX 7600",
    "gfx1151": "Ryzen AI Max",
    "gfx1200": "RX 9060",
    "gfx1201": "RX 9070",
}
# Where Metal's and OpenCL's libraries can be loaded, by default first. Their kernels are source
# text, which the device's driver compiles, so what is their architecture is that of the machine.
HOSTS = {
    "metal": ("macos-arm64", "ios"),
    "opencl": ("linux-x86_64", "linux-arm64", "android-arm64", "windows-x86_64"),
}

# What kernels may use of a GPU, as TVM's targets spell it. WebGPU's and OpenCL's are what every
# device has: subgroups of any size, or none, so that threads meet in workgroup memory only. It is
# so on AMD's, too, which have 32 or 64 lanes. Apple's have 32.
GPU_LIMITS: dict[str, dict[str, int]] = {
    "cuda": {
        "max_threads_per_block": 1024,
        "max_shared_memory_per_block": 48 * 1024,
        "thread_warp_size": 32,
    },
    "metal": {
        "max_num_threads": 256,
        "max_threads_per_block": 256,
        "max_shared_memory_per_block": 32 * 1024,
        "max_function_args": 31,
        "thread_warp_size": 32,
    },
    "opencl": {
        "max_num_threads": 256,
        "max_threads_per_block": 256,
        "max_shared_memory_per_block": 32 * 1024,
        "thread_warp_size": 1,
    },
    "rocm": {
        "max_num_threads": 256,
        "max_threads_per_block": 256,
        "max_shared_memory_per_block": 64 * 1024,
        "thread_warp_size": 1,
    },
    "webgpu": {"max_num_threads": 256, "max_shared_memory_per_block": 16 * 1024},
}

# What WebAssembly code may use beyond its first version: all browsers have had it since 2023.
WASM_FEATURES = ("nontrapping-fptoint", "sign-ext", "simd128")

# Bytes of shared memory that a block may use where it is less than 227 KB (CUDA C++ programming
# guide, technical specifications per compute capability).
_SHARED_KILOBYTES = {
    "sm_75": 64,
    "sm_80": 163,
    "sm_86": 99,
    "sm_87": 163,
    "sm_88": 99,
    "sm_89": 99,
    "sm_120": 99,
    "sm_121": 99,
}


@dataclass(frozen=True)
class DeviceTarget:
    """A device to compile for.

    Attributes:
        kind: "wasm" and "webgpu" are the CPU and the GPU as browsers show them.
        arch: cuda: the real architectures, oldest first. rocm: one. cpu: ("native",), a level of
            `platforms.CPU_LEVELS`, or a processor that LLVM knows. metal, opencl: the platform's
            name. wasm: ("wasm32",). webgpu: ("wgsl",).
        cpu_features: LLVM names, sorted, of what the CPU code in the library may use beyond the
            architecture's baseline. Empty for GPUs: host code only launches kernels.
        platform: the machine that the library is loaded on.
        further: with code for several CPUs in one library, those after this one, the plainest.
        ptx: cuda: whether PTX of the newest architecture is there, for GPUs that come later.
    """

    kind: Kind
    arch: tuple[str, ...]
    cpu_features: tuple[str, ...]
    platform: Platform = field(default_factory=this_platform)
    further: tuple[DeviceTarget, ...] = ()
    ptx: bool = True

    @property
    def versions(self) -> tuple[DeviceTarget, ...]:
        """Each that the library has code for by itself, from the plainest to the best."""
        return (replace(self, further=()), *self.further)

    @property
    def suffix(self) -> str:
        """Of libraries' file names."""
        return self.platform.suffixes[0]

    @property
    def name(self) -> str:
        """For people: the platform where code is for the CPU of another one, else the kind."""
        own = self.kind != "cpu" or self.platform.is_here
        return self.kind if own else self.platform.name

    @property
    def kernels(self) -> str:
        """Whose kernels the library has: "cpu", "cuda" or "gpu", the plain ones of any GPU."""
        return {"cpu": "cpu", "wasm": "cpu", "cuda": "cuda"}.get(self.kind, "gpu")

    def tvm_target(self, opt_level: int = 2) -> tvm.target.Target:
        """The target with its host, as TVM wants it. Imports TVM.

        Args:
            opt_level: LLVM's, 0 to 3, for code of the CPU.

        Raises:
            CompileError: LLVM would use CPU features that are not in `cpu_features`.
        """
        from tvm.target import Target

        if self.kind == "cuda":
            device = {
                "kind": "cuda",
                # Kernels are generated once and compiled for every architecture.
                "arch": self.arch[0],
                **GPU_LIMITS["cuda"],
            }
            return Target(device, host={"kind": "llvm", "opt-level": opt_level})
        if self.kind == "wasm":
            return Target(_wasm_code(opt_level))
        if self.kernels == "gpu":
            gpu: dict[str, Any] = {"kind": self.kind, **GPU_LIMITS[self.kind]}
            if self.kind == "rocm":
                gpu["mcpu"] = self.arch[0]
            web = self.platform is WEB
            return Target(gpu, host=_wasm_code(opt_level) if web else _host(self, opt_level))
        return _llvm_target(self, opt_level)

    @property
    def shared_memory(self) -> int:
        """Bytes that a block may use on every GPU that the library is for; 0 without one."""
        if self.kind != "cuda":
            return 0
        return min(_SHARED_KILOBYTES.get(arch, 227) for arch in self.arch) << 10

    def describe(self) -> dict[str, Any]:
        """What a library's metadata says of its target, as JSON values."""
        return {
            "kind": self.kind,
            "arch": list(self.arch),
            "versions": [one.arch[0] for one in self.versions] if self.further else [],
            "system": self.platform.system,
            "cpu": self.platform.cpu,
            "cpu_features": list(self.cpu_features),
        }

    def check_output(self, path: Path) -> None:
        """Refuse a file name with another suffix than the platform's libraries have.

        Raises:
            ConfigError: says which ones there are.
        """
        if path.suffix not in self.platform.suffixes:
            library, *others = self.platform.suffixes
            raise ConfigError(
                f"output {path}: a library for {self.name} is a *{library} file, not "
                f"'{path.suffix}'" + "".join(f"; *{one} holds object files" for one in others)
            )
        if self.further and path.suffix == ".tar":
            raise ConfigError(
                f"output {path}: object files are for one version of the code, not for "
                f"{', '.join(one.arch[0] for one in self.versions)}; name one of them with --arch"
            )


def resolve_device(device: str, arch: str | None = None) -> DeviceTarget:
    """The target that `--device` and `--arch` name.

    Args:
        device: "auto" (cuda if there is a usable GPU, else cpu), one of `KINDS` or one of
            `PLATFORMS`; the architecture may follow behind a colon, "cpu:x86-64-v3".
        arch: cuda: comma-separated real architectures, "sm_80,sm_90"; the machine's GPUs if None.
            cpu: "native" (the same as None), a level of `CPU_LEVELS` or a processor that LLVM
            knows. Platforms: the same but "native"; None is the platform's own level. Several,
            separated by commas, for a library that has a version of its code for each; "portable"
            are those of `portable_levels`. metal, opencl: one of `HOSTS`, the first or this machine
            if None. rocm: one of `ROCM_ARCHITECTURES`. wasm, webgpu: none.

    Raises:
        ConfigError: an unknown device or architecture, or no GPU to take the architecture from.
        UnsupportedError: a device that TVM has, and that relaxlm does not compile for.
    """
    device, _, behind = device.partition(":")
    if behind and arch and behind != arch:
        raise ConfigError(
            f"device '{device}:{behind}' and arch '{arch}' name two architectures: give one"
        )
    arch = arch or behind or None
    if device in REFUSED:
        raise UnsupportedError(f"device '{device}' is not supported: {REFUSED[device]}")
    if device not in DEVICES:
        raise ConfigError(f"unknown device '{device}'; the devices are {', '.join(DEVICES)}")
    if device == "auto":
        device = "cuda" if usable_gpu() else "cpu"
    if device == "cuda":
        return _cuda(arch)
    if device in ("wasm", "webgpu"):
        return _browser(device, arch)
    if device == "metal":
        return _source_text("metal", arch)
    if device == "opencl":
        return _source_text("opencl", arch)
    if device == "rocm":
        return _rocm(arch)
    platform = PLATFORMS.get(device)
    here = platform is None
    platform = platform or this_platform()
    arch = arch or ("native" if here else platform.level)
    if arch is None:
        return DeviceTarget("cpu", (), (), platform)
    versions = [_cpu(name, platform, here) for name in _cpu_names(arch, platform)]
    # By the kernels of the most work, then by the number of extensions; as named where all agree.
    versions.sort(key=lambda one: (-_rank(one), len(one.cpu_features)))
    return replace(versions[0], further=tuple(versions[1:]))


def usable_gpu() -> bool:
    """Whether CUDA libraries can run here: Linux, a driver and at least one GPU."""
    return sys.platform == "linux" and bool(cuda.gpus())


def _cuda(arch: str | None) -> DeviceTarget:
    if sys.platform != "linux":
        raise UnsupportedError(
            f"device 'cuda' is not supported on {platform.system()}: libraries for CUDA are "
            "compiled on Linux; use cpu"
        )
    if arch is not None:
        names = parse_cuda_archs(arch)
    else:
        found = {gpu.arch for gpu in cuda.gpus()}
        if not found:
            raise ConfigError(
                "device 'cuda': no NVIDIA GPU is here to take the architecture from; name it: "
                "--arch sm_80 (A100), --arch sm_90 (H100), or several, --arch sm_80,sm_90"
            )
        names = parse_cuda_archs(",".join(sorted(found)))
    return DeviceTarget("cuda", names, ())


def parse_cuda_archs(text: str) -> tuple[str, ...]:
    """The architectures in "sm_90,sm_80", oldest first, each once.

    Raises:
        ConfigError: a malformed name, or one that CUDA 13 does not compile for.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        match = re.fullmatch(r"sm_(\d+)", name)
        if match is None:
            raise ConfigError(
                f"arch '{text}': '{name}' is not the name of a GPU architecture, such as sm_80; "
                "several are separated by commas"
            )
        if int(match[1]) < 75:
            raise ConfigError(
                f"arch '{text}': CUDA 13 does not compile for {name}; the oldest is sm_75"
            )
        if name not in CUDA_ARCHITECTURES:
            raise ConfigError(
                f"arch '{text}': {name} is not known; CUDA 13 compiles for "
                + ", ".join(CUDA_ARCHITECTURES)
            )
    return tuple(sorted(set(names), key=arch_number))


def arch_number(arch: str) -> int:
    """80 for "sm_80"."""
    return int(arch.removeprefix("sm_"))


def _cpu_names(text: str, platform: Platform) -> list[str]:
    """The CPUs in "x86-64-v2,x86-64-v3", each once.

    Raises:
        ConfigError: a name is missing, or several are for a platform without relaxlm's runtime.
    """
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if not name:
            raise ConfigError(f"arch '{text}': a name is missing between commas")
        levels = portable_levels(platform) if name == PORTABLE else ()
        names += levels or [name]
    if len(set(names)) > 1 and not platform.runs_python:
        raise ConfigError(
            f"arch '{text}': nothing chooses among versions of a library for {platform.name} when "
            "it is loaded; name one processor or level"
        )
    return list(dict.fromkeys(names))


def _cpu(arch: str, platform: Platform, here: bool) -> DeviceTarget:
    if here and arch == "native":
        return DeviceTarget("cpu", ("native",), tuple(sorted(cpu.host_cpu_features())), platform)
    return DeviceTarget("cpu", (arch,), features_of(platform, arch), platform)


def _rank(device: DeviceTarget) -> int:
    """The place of a CPU's dot products among all, from the best on."""
    isa = best_isa(device.cpu_features.__contains__)
    return len(NEEDS) if isa is None else list(NEEDS).index(isa)


def _browser(device: str, arch: str | None) -> DeviceTarget:
    if arch is not None:
        raise ConfigError(
            f"arch '{arch}': device '{device}' has one architecture; leave --arch out"
        )
    if device == "wasm":
        return DeviceTarget("wasm", ("wasm32",), WASM_FEATURES, WEB)
    return DeviceTarget("webgpu", ("wgsl",), WASM_FEATURES, WEB)


def _source_text(kind: Literal["metal", "opencl"], host: str | None) -> DeviceTarget:
    hosts = HOSTS[kind]
    if host is None:
        here = this_platform().name
        host = here if here in hosts else hosts[0]
    if host not in hosts:
        raise ConfigError(
            f"arch '{host}': for device '{kind}' it is the machine that loads the library: "
            + ", ".join(hosts)
        )
    return DeviceTarget(kind, (host,), (), PLATFORMS[host])


def _rocm(arch: str | None) -> DeviceTarget:
    if sys.platform != "linux":
        raise UnsupportedError(
            f"device 'rocm' is not supported on {platform.system()}: libraries for ROCm are "
            "compiled on Linux; use cpu"
        )
    if arch is None:
        raise ConfigError(
            "device 'rocm': name the GPU's architecture, which rocminfo prints: --arch gfx90a "
            "(MI200), --arch gfx942 (MI300), --arch gfx1100 (RX 7900)"
        )
    if arch not in ROCM_ARCHITECTURES:
        raise ConfigError(
            f"arch '{arch}' is not known; a library for ROCm is for one of "
            + ", ".join(ROCM_ARCHITECTURES)
        )
    return DeviceTarget("rocm", (arch,), ())


def _host(device: DeviceTarget, opt_level: int) -> dict[str, Any]:
    """How LLVM compiles what starts kernels: for any processor of the platform."""
    known = {"kind": "llvm", "opt-level": opt_level, **device.platform.attributes}
    return known if device.platform.has_linker else {**known, "mtriple": device.platform.triple}


def _wasm_code(opt_level: int) -> dict[str, Any]:
    """How LLVM compiles for browsers: all code, or what starts shaders.

    The processor is the plainest one, with extensions by name: LLVM's others have extensions whose
    names are younger than most installed emscriptens, which then refuse the object.
    """
    return {
        "kind": "llvm",
        "mtriple": WEB.triple,
        "mcpu": "mvp",
        "vector-width": 128,
        "mattr": [f"+{feature}" for feature in WASM_FEATURES],
        "opt-level": opt_level,
    }


def _llvm_target(device: DeviceTarget, opt_level: int) -> tvm.target.Target:
    from tvm.target import Target, codegen

    platform = device.platform
    known: dict[str, Any] = {"kind": "llvm", "opt-level": opt_level, **platform.attributes}
    if not platform.has_linker:
        known["mtriple"] = platform.triple
    if not platform.level:
        return Target(known)
    name = codegen.llvm_get_system_cpu() if device.arch == ("native",) else device.arch[0]
    name = name if platform.cpu != "x86_64" else name.partition("+")[0]
    if codegen.llvm_is_valid_cpu(name, platform.triple):
        known["mcpu"] = name
    wanted = set(device.cpu_features)
    optional = sorted((cpu.tracked_features(platform.cpu) | set(cpu.UNUSABLE)) - wanted)
    implied = Target(known)
    off = [feature for feature in optional if codegen.target_has_features(feature, implied)]
    # Removals last: to switch on an extension also switches on what it builds upon.
    attributes = [f"+{feature}" for feature in sorted(wanted)] + [f"-{feature}" for feature in off]
    target = Target({**known, "mattr": attributes})
    surplus = [feature for feature in optional if codegen.target_has_features(feature, target)]
    if surplus:
        raise CompileError(
            f"LLVM's processor '{name}' keeps {', '.join(surplus)} switched on, which this "
            "machine does not have; compile with --arch x86-64-v3 or an older level"
        )
    return target
