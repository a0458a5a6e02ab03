"""Time latent attention on CPUs: `python benchmarks/cpu_latent_attention.py [--heads 16]`.

Decode is one new token at the end of each context. A token's latent is read once for all heads,
which multiply with it two times: with 16 heads (DeepSeek-V2-Lite) that is 31 operations per byte
of a float16 cache, with 128 (V3, Kimi K2 has 64) 248, so arithmetic is the limit and not memory.
So every line has TFLOPS of the visible pairs' products, also as a share of loops of nothing but
float32 multiply-adds; decoding has GB/s of the cache beside them, as a share of a loop that only
reads. All are timed in turns; the best counts.
"""

import argparse
import functools
import os

os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count()))

import numpy as np
import tvm
from cpu_attention import (
    CHAINS,
    LINES,
    PASSES,
    TASKS,
    best_times,
    compiled,
    multiply_add_kernel,
    read_kernel,
)

from relaxlm.compiler.kernels.attention import PAGE_SIZE
from relaxlm.compiler.kernels.cpu_latent_attention import LatentShape, attend_kernel, page_tensors
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.kv_cache import KVFormat, get_kv_format

LATENT, ROPE = 512, 64
# (sequences, new tokens, tokens cached before)
STEPS = ((1, 1, 1023), (1, 1, 8191), (8, 1, 1023), (1, 256, 0), (1, 256, 3840))


def arguments(shape: LatentShape, format: KVFormat, batch: int, new: int, cached: int) -> list:
    rng = np.random.default_rng(0)
    table = -(-(new + cached) // PAGE_SIZE)
    (spec,) = page_tensors(shape.latent, shape.rope, format)
    values = rng.standard_normal((batch * table, *spec.page_shape), "float32").astype(spec.dtype)
    q = [
        rng.standard_normal((batch * new, shape.heads, size), "float32") for size in (LATENT, ROPE)
    ]
    tables = (
        np.tile(np.arange(cached, cached + new), batch),
        np.arange(batch + 1) * new,
        np.arange(batch + 1) * table,
        rng.permutation(batch * table),
        np.full(batch, cached + new),
    )
    out = np.zeros((batch * new, shape.heads, LATENT), "float32")
    ints = [np.array(values, "int32") for values in tables]
    return [*map(tvm.runtime.tensor, (*q, *ints, values, out))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kv", default="f16", choices=("f16", "f32"), help="format of the cache")
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--seconds", type=float, default=1.0, help="per line")
    options = parser.parse_args()
    format = get_kv_format(options.kv)
    print(f"{os.environ['TVM_NUM_THREADS']} threads, cache {format.name}")
    factor = tvm.runtime.tensor(np.full(16, 0.5, "float32"))
    sums = tvm.runtime.tensor(np.zeros((TASKS, CHAINS, 16), "float32"))
    peak = functools.partial(compiled(multiply_add_kernel()), factor, sums)
    peak_work = 2 * 16 * CHAINS * PASSES * TASKS
    for heads in options.heads:
        shape = LatentShape(heads, LATENT, ROPE, (128 + ROPE) ** -0.5)
        with resolve_device("cpu").tvm_target():
            kernel = compiled(attend_kernel(shape, format, "float32"))
        for batch, new, cached in STEPS:
            call = functools.partial(kernel, *arguments(shape, format, batch, new, cached))
            pairs = batch * (new * cached + new * (new + 1) // 2)
            work = 2 * heads * (2 * LATENT + ROPE) * pairs
            size = batch * (new + cached) * (LATENT + ROPE) * np.dtype(format.dtype).itemsize
            lines = size // 64 // LINES * LINES
            words = tvm.runtime.tensor(np.ones((lines, 16), "uint32"))
            found = tvm.runtime.tensor(np.zeros((lines // LINES, 16), "uint32"))
            read = functools.partial(compiled(read_kernel(lines)), words, found)
            taken, top, reading = best_times([[call], [peak], [read]], options.seconds)
            rate, best = work / taken / 1e12, peak_work / top / 1e12
            text = f"{rate:6.3f} TFLOPS, {rate / best:4.0%} of {best:.2f}"
            if new == 1:
                text += f"; {size / taken / 1e9:5.1f} GB/s, {reading / taken:4.0%} of the read loop"
            what = f"{heads:3} heads, {batch} x {new:3} new after {cached:4}"
            print(f"{what} {taken * 1e3:9.2f} ms {text}", flush=True)


if __name__ == "__main__":
    main()
