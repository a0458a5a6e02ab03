"""Runs the source text that TVM generates for Metal and OpenCL on the CPU.

    with GpuEmulation("metal", "random") as gpu:
        ...  # executables for `resolve_device("metal")` run in the VM with `gpu.device`

Metal's language is C++, and OpenCL's C nearly is: `gpu_emulation.hpp` has what they add, in terms
of the emulation of CUDA (`cuda_emulation.py`), which says what is checked. A kernel with a double,
or a type or function that is not emulated, does not compile.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import tvm
import tvm_ffi

from relaxlm.compiler.platforms import this_platform
from relaxlm.compiler.target import resolve_device
from tests.compiler.cuda_emulation import ORDERS, load, of_arrays
from tests.compiler.global_functions import GlobalFunctions

# In MSL, where a pointer points to is part of its type; C++ has one kind of memory.
_SPACES = re.compile(r"\b(__global|__local|__private|device|constant|thread|threadgroup) ")
_SHARED = re.compile(r"^(\s*)(?:threadgroup|__local) (?=\w+ \w+\[\d+\];)", re.MULTILINE)
_VECTOR = re.compile(r"\b(bool|u?char|u?short|u?int|half|float)([234])\b")
_METAL_KERNEL = re.compile(r"kernel void (\w+)\((.*?)\) \{", re.DOTALL)


def use_cpu_memory(kind: str) -> bool:
    """Make a device's memory the CPU's, for the rest of this process; False where it is there.

    TVM asks for a device's functions once and keeps them.
    """
    name = f"device_api.{kind}"
    if tvm_ffi.get_global_func(name, allow_missing=True) is not None:
        return False
    tvm_ffi.register_global_func(name, tvm_ffi.get_global_func("device_api.cpu"))
    there = tvm.runtime.device(kind).exist
    tvm_ffi.remove_global_func(name)
    return there


class GpuEmulation:
    """While entered, a device's kernels run on the CPU.

    Args:
        order: in which order the threads of a workgroup take turns: a key of `ORDERS`.
        driver: leave the kernels to this machine's OpenCL driver, which has to be PoCL, instead.
    """

    def __init__(
        self, kind: Literal["metal", "opencl"], order: str = "forward", driver: bool = False
    ) -> None:
        assert use_cpu_memory(kind)
        self.driver = driver
        self.kind, self.order, self.device = kind, order, tvm.runtime.device(kind)
        self.sources: list[str] = []
        self._modules: list[Any] = []
        self._loaded: list[Any] = []
        self._functions = GlobalFunctions()

    def __enter__(self) -> GpuEmulation:
        create = {"metal": self._create_metal, "opencl": self._create_opencl}[self.kind]
        self._functions.replace(f"ffi.Module.create.{self.kind}", create)
        self._functions.replace("__tvm_set_device", lambda device_type, device_id: None)
        os.environ["CUDA_EMULATION_ORDER"] = ORDERS[self.order]
        return self

    def __exit__(self, *_: object) -> None:
        self._functions.restore()
        del os.environ["CUDA_EMULATION_ORDER"]

    def build_all(self, functions: Sequence[tvm.tirx.PrimFunc]) -> list[Callable[..., None]]:
        """Compile PrimFuncs with thread bindings: as `CudaEmulation.build_all`."""
        device = replace(resolve_device(self.kind), platform=this_platform())
        named = {f"kernel{i}": function for i, function in enumerate(functions)}
        module = tvm.IRModule(
            {name: function.with_attr("global_symbol", name) for name, function in named.items()}
        )
        with device.tvm_target():
            module = tvm.tirx.transform.ForceNarrowIndexToInt32()(module)
            compiled = tvm.compile(module, target=device.tvm_target()).mod
        self._modules.append(compiled)  # a function does not keep its module's library loaded
        return [of_arrays(compiled[name], self.device.dlpack_device_type()) for name in named]

    def _create_metal(self, codes: Any, format: str, functions: Any, source: Any) -> Any:
        """A module of Metal's kernels, each of which TVM writes into a text of its own."""
        assert format == "metal"
        texts = {str(name): bytes(code).decode() for name, code in codes.items()}
        self.sources += texts.values()
        parts = [metal_as_cpp(text, functions[name]) for name, text in texts.items()]
        return self._load("\n".join(['#include "gpu_emulation.hpp"', *parts]))

    def _create_opencl(self, code: Any, format: str, functions: Any, source: Any) -> Any:
        assert format == "cl"
        text = bytes(code).decode()
        self.sources.append(text)
        if self.driver:
            return load(_for_driver(text, functions))
        entries = [_entry(name, info) for name, info in functions.items()]
        return self._load(
            "\n".join(['#include "gpu_emulation.hpp"', opencl_as_cpp(text), *entries])
        )

    def _load(self, text: str) -> Any:
        self._loaded.append(load(text))
        return self._loaded[-1]

    def started(self) -> int:
        """How many kernels of what was compiled here have been started."""
        return sum(module["kernels_started"]() for module in self._loaded)


def has_opencl_driver() -> bool:
    """Whether the first OpenCL driver of this machine is PoCL, which runs kernels on CPUs."""
    try:
        library = ctypes.CDLL("libOpenCL.so.1")
    except OSError:
        return False
    platform, name = ctypes.c_void_p(), ctypes.create_string_buffer(100)
    if library.clGetPlatformIDs(1, ctypes.byref(platform), None):
        return False
    library.clGetPlatformInfo(
        platform, 0x0902, ctypes.c_size_t(100), name, None
    )  # CL_PLATFORM_NAME
    return name.value == b"Portable Computing Language"


def _for_driver(code: str, functions: Any) -> str:
    lines = ['#include "opencl_driver.hpp"', f'static const char* source = R"CL({code})CL";']
    for name, info in functions.items():
        letters = {"handle": "p", "float32": "f"}
        types = "".join(letters.get(str(dtype), "i") for dtype in info.arg_types)
        tags = ", ".join(f'"{tag}"' for tag in info.launch_param_tags)
        lines.append(
            f'extern "C" int __tvm_ffi_{name}(void*, const TVMFFIAny* args, int32_t, TVMFFIAny*) '
            f'{{ return driver::run(source, "{name}", "{types}", {{{tags}}}, args); }}'
        )
    return "\n".join(lines) + "\n"


def _common(code: str) -> str:
    assert not re.search(r"\b(double|long)\b", code), "not every GPU has 64-bit numbers"
    code = _SHARED.sub(r"\1__shared__ ", code)
    return _VECTOR.sub(r"gpu_\1\2", _SPACES.sub("", code))


def opencl_as_cpp(code: str) -> str:
    """OpenCL C for a host compiler: types of vectors in parentheses make them."""
    code = re.sub(r"#ifdef cl_khr_.*?#endif\n", "", code, flags=re.DOTALL)
    code = re.sub(r"#pragma OPENCL.*\n", "", code)
    code = _common(code)
    # ((float2)(a, b)) is a vector of two in OpenCL, and b in C++.
    return re.sub(r"\((gpu_\w+)\)\(", r"\1(", code)


def metal_as_cpp(code: str, info: Any) -> str:
    """One kernel in Metal's language for a host compiler, with its entry point.

    Numbers come in a structure behind the buffers, eight bytes each, where a function of C++ takes
    them as arguments.
    """
    code = code.replace("#include <metal_stdlib>", "").replace("using namespace metal;", "")
    code = code.replace("union __TVMArgUnion", f"union {info.name}_union")
    found = _METAL_KERNEL.search(code)
    assert found and found[1] == info.name
    parameters = [" ".join(part.split()) for part in found[2].split(",")]
    plain, given = [], []
    for place, parameter in enumerate(parameters):
        text, _, attribute = parameter.partition("[[")
        declared = _SPACES.sub("", text.strip())
        plain.append(declared)
        if "buffer(" in attribute:
            assert int(re.sub(r"\D", "", attribute)) == place < 31, "Metal has 31 buffers"
        if "*" in declared:
            given.append(declared)
        elif "buffer(" in attribute:
            given.append("numbers")
        else:
            index = "threadIdx" if "thread_position_in_threadgroup" in attribute else "blockIdx"
            given.append(f"{index}.x" if declared.startswith("uint ") else index)
    pointers = [text for text in given if "*" in text]
    values = [text.split("*")[-1].strip() if "*" in text else text for text in given]
    types = [str(dtype) for dtype in info.arg_types if str(dtype) != "handle"]
    ints = [f"{_C_TYPES[dtype]} number{i}" for i, dtype in enumerate(types)]
    body = code[: found.start()] + f"static void {info.name}_body({', '.join(plain)}) {{"
    body += code[found.end() :]
    lines = [f'extern "C" void {info.name}({", ".join([*pointers, *ints])}) {{']
    if types:
        lines.append(f"  {info.name}_args_t numbers;")
        for i in range(len(types)):
            at = f"reinterpret_cast<char*>(&numbers) + {8 * i}"
            lines.append(f"  memcpy({at}, &number{i}, sizeof number{i});")
    lines.append(f"  {info.name}_body({', '.join(values)});\n}}")
    return "\n".join([_common(body), _common("\n".join(lines)), _entry(info.name, info)])


_C_TYPES = {"int32": "int", "uint32": "unsigned", "float32": "float", "bool": "bool"}


def _entry(name: str, info: Any) -> str:
    """What TVM's host code calls."""
    tags = ", ".join(f'"{tag}"' for tag in info.launch_param_tags)
    return (
        f'extern "C" int __tvm_ffi_{name}(void*, const TVMFFIAny* args, int32_t count, '
        f"TVMFFIAny*) {{ ++gpu_started; "
        f'return emu::entry("{name}", {name}, {{{tags}}}, args, count); }}'
    )
