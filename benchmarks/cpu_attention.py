"""Time the CPU attention kernels: `python benchmarks/cpu_attention.py [--other FILE]`.

Decode is one new token at the end of a context; prefill is 512 new tokens after what is cached.
GB/s counts the keys and values that a step reads once per KV head; GFLOPS counts the products of
visible pairs only. `--other` is a Python file with another version of
`relaxlm/compiler/kernels/cpu_attention.py`, timed in turns with this one.
"""

import argparse
import functools
import importlib.util
import os
import time
from pathlib import Path

os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count()))

import numpy as np
import tvm

from relaxlm.compiler.kernels import cpu_attention
from relaxlm.compiler.kernels.attention import PAGE_SIZE, AttentionShape
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.kv_cache import KVFormat, get_kv_format

SHAPES = {"14q/2kv d64": (14, 2, 64), "32q/8kv d64": (32, 8, 64)}
# (new tokens, tokens cached before)
STEPS = [(1, 127), (1, 1023), (1, 4095), (1, 8191), (512, 0), (512, 4096)]


def build(kernels, shape: AttentionShape, format: KVFormat):
    with resolve_device("cpu").tvm_target() as target:
        function = kernels.attend_kernel(shape, format, "float32")
        module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
        return tvm.compile(module, target=target)["kernel"]


def arguments(shape: AttentionShape, format: KVFormat, new: int, cached: int) -> list:
    """One sequence on pages in random order; every byte of them random."""
    rng = np.random.default_rng(0)
    pages = -(-(new + cached) // PAGE_SIZE)
    tables = [
        np.arange(cached, cached + new),
        [0, new],
        [0, pages],
        rng.permutation(pages),
        [cached + new],
        [0],
    ]
    tensors = []
    for tensor in cpu_attention.page_tensors(shape, format):
        values = rng.standard_normal((pages, *tensor.page_shape), "float32")
        if tensor.dtype == "bfloat16":
            words = (values.view("uint32") >> 16).astype("uint16")
            tensors.append(tvm.runtime.tensor(words)._create_view(words.shape, tensor.dtype))
        else:
            tensors.append(tvm.runtime.tensor(values.astype(tensor.dtype)))
    q = rng.standard_normal((new, shape.q_heads, shape.head_dim), "float32")
    ints = [tvm.runtime.tensor(np.array(table, "int32")) for table in tables]
    return [tvm.runtime.tensor(q), *ints, *tensors, tvm.runtime.tensor(np.zeros_like(q))]


def best_times(calls: list, seconds: float) -> list[float]:
    """The shortest time of each call, in seconds; they take turns."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times)) < 3:
        for call, samples in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
    return [min(samples) for samples in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kv", default="f16", help="format of the cache")
    parser.add_argument("--other", type=Path, help="another cpu_attention.py to compare with")
    parser.add_argument("--seconds", type=float, default=1.0, help="per line")
    options = parser.parse_args()
    versions = [("", cpu_attention)]
    if options.other:
        spec = importlib.util.spec_from_file_location("other_attention", options.other)
        assert spec is not None and spec.loader is not None
        other = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(other)
        versions.insert(0, ("other", other))
    format = get_kv_format(options.kv)
    print(f"{os.environ['TVM_NUM_THREADS']} threads, cache {format.name}")
    for name, (q_heads, heads, dim) in SHAPES.items():
        shape = AttentionShape(q_heads, heads, dim, 0, 0, dim**-0.5)
        kernels = [build(kernels, shape, format) for _, kernels in versions]
        for new, cached in STEPS:
            inputs = arguments(shape, format, new, cached)
            outputs = []
            for kernel in kernels:
                kernel(*inputs)
                outputs.append(inputs[-1].numpy())
            for output in outputs:
                np.testing.assert_allclose(output, outputs[0], rtol=2e-3, atol=1e-4)
            calls = [functools.partial(kernel, *inputs) for kernel in kernels]
            size = (new + cached) * format.bytes_per_token(heads, dim)
            work = 4 * q_heads * dim * (new * cached + new * (new + 1) // 2)
            for (label, _), taken in zip(versions, best_times(calls, options.seconds), strict=True):
                print(
                    f"{name}  {new:4} new after {cached:5}  {label:6} {taken * 1e6:10.1f} us "
                    f"{size / taken / 1e9:6.1f} GB/s {work / taken / 1e9:7.1f} GFLOPS",
                    flush=True,
                )


if __name__ == "__main__":
    main()
