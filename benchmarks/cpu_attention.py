"""Time the CPU attention kernels: `python benchmarks/cpu_attention.py [--part decode] [--kv f16]`.

Decode is one new token at the end of each context; its keys and values lie in memory, not in the
cache: several contexts are used in turn. Its GB/s counts each key and value once per KV head, also
as a share of a loop that only reads as many bytes. Prefill is a chunk of new tokens after what is
cached; its TFLOPS counts the products of visible pairs only, also as a share of what loops of
nothing but products reach: float32 multiply-adds, and products of bfloat16 tiles where the CPU has
them (--rounded: kernels that round to bfloat16). All are timed in turns; the best counts.
`--other` is a file with another version of `relaxlm/compiler/kernels/cpu_attention.py`.
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
from tvm import tirx
from tvm.script import tirx as T

from relaxlm.compiler.kernels import cpu_attention
from relaxlm.compiler.kernels.attention import PAGE_SIZE, AttentionShape
from relaxlm.compiler.kernels.builder import emit, scratch, tensor
from relaxlm.compiler.kernels.isa import dot_products
from relaxlm.compiler.kernels.vector import multiply_add, prefetch, splat, vector_unit
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.kv_cache import KVFormat, get_kv_format

SHAPES = {
    "14q/2kv d64": (14, 2, 64),
    "32q/8kv d64": (32, 8, 64),
    "32q/8kv d128": (32, 8, 128),
}
CONTEXTS = (128, 1024, 4096, 16384)
BATCHES = (1, 8)
# (new tokens, tokens cached before)
PROMPTS = ((512, 0), (2048, 0), (512, 7680))
# More than the caches of two cores; and as many contexts as a deep model has layers.
RESIDENT, MOST_CONTEXTS = 128e6, 32
LINES = 64  # cache lines that a task of the read loop takes
# Sums of 16 lanes that are independent, as many as fit into the registers.
CHAINS = 12 if vector_unit(resolve_device("cpu").tvm_target()).registers >= 32 else 6
PASSES, TASKS = 50_000, 64


def compiled(function: tirx.PrimFunc):
    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    return tvm.compile(module, target=resolve_device("cpu").tvm_target())["kernel"]


def read_kernel(lines: int) -> tirx.PrimFunc:
    """(words [lines, 16], out [lines / LINES, 16]): read every byte once."""

    def body() -> None:
        words = tensor("words", (lines, 16), "uint32")
        out = tensor("out", (lines // LINES, 16), "uint32")
        with T.parallel(lines // LINES) as task:
            total = scratch(16, "uint32")
            T.buffer_store(total, T.broadcast(T.uint32(0), 16), [T.ramp(0, 1, 16)])
            with T.serial(LINES) as i:
                prefetch(T.address_of(words[task * LINES + i + 64, 0]))
                word = words.vload([task * LINES + i, 0], "uint32x16")
                T.buffer_store(total, total.vload([0], "uint32x16") + word, [T.ramp(0, 1, 16)])
            T.buffer_store(out, total.vload([0], "uint32x16"), [task, T.ramp(0, 1, 16)])

    return emit(body)


def multiply_add_kernel() -> tirx.PrimFunc:
    """(factor [16], out [TASKS, CHAINS, 16]): nothing but float32 multiply-adds."""

    def body() -> None:
        factor = tensor("factor", (16,), "float32")
        out = tensor("out", (TASKS, CHAINS, 16), "float32")
        with T.parallel(TASKS) as task:
            sums = [scratch(16, "float32") for _ in range(CHAINS)]
            for total in sums:
                T.buffer_store(total, splat(0.0, 16), [T.ramp(0, 1, 16)])
            with T.serial(PASSES):
                for total in sums:
                    value = total.vload([0], "float32x16")
                    value = multiply_add(value, factor.vload([0], "float32x16"), splat(1.0, 16))
                    T.buffer_store(total, value, [T.ramp(0, 1, 16)])
            for i, total in enumerate(sums):
                T.buffer_store(out, total.vload([0], "float32x16"), [task, i, T.ramp(0, 1, 16)])

    return emit(body)


def tile_kernel() -> tirx.PrimFunc:
    """(unused [16]): nothing but products of bfloat16 tiles."""
    from relaxlm.compiler.kernels.cpu_attention_tiles import configure, instruction, release

    def body() -> None:
        tensor("unused", (16,), "float32")
        with T.parallel(TASKS):
            configure()
            with T.serial(PASSES // 4):
                for i in range(4):
                    instruction("tdpbf16ps", i, 4 + i // 2, 6 + i % 2)
            release()

    return emit(body)


def arguments(
    shape: AttentionShape, format: KVFormat, new: int, cached: int, batch: int
) -> list[list]:
    """Arguments of several calls, each of `batch` sequences on pages of its own."""
    rng = np.random.default_rng(0)
    pages = -(-(new + cached) // PAGE_SIZE)
    size = batch * (new + cached) * format.bytes_per_token(shape.kv_heads, shape.head_dim)
    calls = min(MOST_CONTEXTS, max(1, round(RESIDENT / size)))
    total = calls * batch * pages
    tensors = []
    for spec in cpu_attention.page_tensors(shape, format):
        values = rng.standard_normal((1, *spec.page_shape), "float32")
        if spec.dtype == "bfloat16":
            words = np.repeat((values.view("uint32") >> 16).astype("uint16"), total, 0)
            tensors.append(tvm.runtime.tensor(words)._create_view(words.shape, spec.dtype))
        else:
            stored = np.abs(values * 64) if spec.dtype == "uint8" else values
            tensors.append(tvm.runtime.tensor(np.repeat(stored.astype(spec.dtype), total, 0)))
    q = rng.standard_normal((batch * new, shape.q_heads, shape.head_dim), "float32")
    out = tvm.runtime.tensor(np.zeros_like(q))
    q = tvm.runtime.tensor(q)
    numbers = rng.permutation(total)
    found = []
    for call in range(calls):
        tables = [
            np.tile(np.arange(cached, cached + new), batch),
            np.arange(batch + 1) * new,
            np.arange(batch + 1) * pages,
            numbers[call * batch * pages : (call + 1) * batch * pages],
            np.full(batch, cached + new),
            np.zeros(batch),
        ]
        ints = [tvm.runtime.tensor(np.array(table, "int32")) for table in tables]
        found.append([q, *ints, *tensors, out])
    return found


def best_times(calls: list[list], seconds: float) -> list[float]:
    """The shortest time of each list of calls, in seconds per call; the lists take turns."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times)) < 2:
        for group, samples in zip(calls, times, strict=True):
            start = time.perf_counter()
            for call in group:
                call()
            samples.append((time.perf_counter() - start) / len(group))
    return [min(samples) for samples in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kv", default="f16", help="format of the cache")
    parser.add_argument("--part", choices=("decode", "prefill"), help="one of the two")
    parser.add_argument("--shape", choices=SHAPES, help="one of them")
    parser.add_argument("--rounded", action="store_true", help="kernels that round to bfloat16")
    parser.add_argument("--other", type=Path, help="another cpu_attention.py to compare with")
    parser.add_argument("--seconds", type=float, default=0.3, help="per line")
    options = parser.parse_args()
    versions = {"": cpu_attention}
    if options.other:
        spec = importlib.util.spec_from_file_location("other_attention", options.other)
        assert spec is not None and spec.loader is not None
        versions["other"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(versions["other"])
    format = get_kv_format(options.kv)
    target = resolve_device("cpu").tvm_target()
    print(f"{os.environ['TVM_NUM_THREADS']} threads, cache {format.name}")
    for name in [options.shape] if options.shape else SHAPES:
        q_heads, heads, dim = SHAPES[name]
        shape = AttentionShape(q_heads, heads, dim, 0, 0, dim**-0.5)
        rounded = {"rounded": True} if options.rounded else {}
        kernels = {}
        for label, version in versions.items():
            with target:
                start = time.perf_counter()
                kernel = version.attend_kernel(shape, format, "float32", **rounded)
                middle = time.perf_counter()
                kernels[label] = compiled(kernel)
                end = time.perf_counter()
            print(f"{name} {label}: {middle - start:.2f} s to emit, {end - middle:.2f} to compile")
        if options.part != "prefill":
            for batch in BATCHES:
                for context in CONTEXTS:
                    if batch * context <= 65536:
                        decode(name, shape, format, kernels, context, batch, options.seconds)
        if options.part != "decode":
            prefill(name, shape, format, kernels, options.seconds)


def decode(name, shape, format, kernels, context, batch, seconds) -> None:
    inputs = arguments(shape, format, 1, context - 1, batch)
    size = batch * context * format.bytes_per_token(shape.kv_heads, shape.head_dim)
    groups = [[functools.partial(kernel, *call) for call in inputs] for kernel in kernels.values()]
    lines = size // 64 // LINES * LINES
    read = compiled(read_kernel(lines))
    out = tvm.runtime.tensor(np.zeros((lines // LINES, 16), "uint32"))
    words = [tvm.runtime.tensor(np.ones((lines, 16), "uint32")) for _ in inputs]
    groups.append([functools.partial(read, part, out) for part in words])
    *times, reading = best_times(groups, seconds)
    for label, taken in zip(kernels, times, strict=True):
        print(
            f"{name}  batch {batch} context {context:5}  {label:6} {taken * 1e6:9.1f} us "
            f"{size / taken / 1e9:6.1f} GB/s, {reading / taken:6.1%} of {size / reading / 1e9:.1f}",
            flush=True,
        )


def prefill(name, shape, format, kernels, seconds) -> None:
    factor = tvm.runtime.tensor(np.full(16, 0.5, "float32"))
    out = tvm.runtime.tensor(np.zeros((TASKS, CHAINS, 16), "float32"))
    peaks = [functools.partial(compiled(multiply_add_kernel()), factor, out)]
    peak_work = [2 * 16 * CHAINS * PASSES * TASKS]
    if dot_products(resolve_device("cpu").tvm_target()) == "amx":
        peaks.append(functools.partial(compiled(tile_kernel()), factor))
        peak_work.append(2 * 16 * 16 * 32 * (PASSES // 4) * 4 * TASKS)
    for new, cached in PROMPTS:
        inputs = arguments(shape, format, new, cached, 1)[:1]
        groups = [
            [functools.partial(kernel, *call) for call in inputs] for kernel in kernels.values()
        ]
        times = best_times([*groups, *([peak] for peak in peaks)], seconds)
        work = 4 * shape.q_heads * shape.head_dim * (new * cached + new * (new + 1) // 2)
        rates = [w / t / 1e12 for w, t in zip(peak_work, times[len(groups) :], strict=True)]
        for label, taken in zip(kernels, times, strict=False):
            shares = ", ".join(f"{work / taken / 1e12 / rate:.0%} of {rate:.2f}" for rate in rates)
            print(
                f"{name}  {new:4} new after {cached:4}  {label:6} {taken * 1e3:8.2f} ms "
                f"{work / taken / 1e12:6.3f} TFLOPS, {shares}",
                flush=True,
            )


if __name__ == "__main__":
    main()
