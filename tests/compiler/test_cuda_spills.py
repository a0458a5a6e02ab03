"""Kernels of real models' shapes stay in registers: `grid(resident=...)` says what it is for."""

import tvm

from relaxlm.compiler.cuda import cuda_compilation
from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.cuda_attention import attend_kernel
from relaxlm.compiler.kernels.cuda_matmul import CudaFormat, gated_matmul_kernel
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.kv_cache import KV_FORMATS
from relaxlm.quantization.schemes import SCHEMES
from tests.compiler.test_cuda import needs_nvcc

# Heads, those of keys, head_dim; what the model computes in; the cache.
ATTENTION = {
    "llama_1b": (32, 8, 64, "float16", "float16"),
    "phi_2": (32, 32, 80, "float16", "float16"),
    "phi_3": (32, 32, 96, "float16", "float8_e4m3"),
    "qwen_7b": (28, 4, 128, "float32", "float32"),
}


@needs_nvcc
def test_nothing_goes_to_memory_and_back() -> None:
    target = resolve_device("cuda", "sm_80,sm_90")
    limit, functions = target.shared_memory, {}
    for name, (heads, kv_heads, dim, dtype, cache) in ATTENTION.items():
        shape = AttentionShape(heads, kv_heads, dim, window=0, sinks=0, scale=dim**-0.5)
        functions[name] = attend_kernel(shape, KV_FORMATS[cache], dtype, limit)
    format = CudaFormat.of((28672, 4096), SCHEMES["q4f16_1"].linear, "float16")
    functions["gated"] = gated_matmul_kernel(format, "silu", limit)
    named = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
    with cuda_compilation(target.arch) as build:
        tvm.compile(tvm.IRModule(named), target=target.tvm_target())
    # Attention for few and for many rows, each with what merges parts; five ways to multiply.
    assert len(build.reports) == 2 * (3 * 4 + 2 + 5)
    assert [str(report) for report in build.reports if report.spills or report.stack] == []
