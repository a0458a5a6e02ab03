"""Time the CPU matmul kernels: `python benchmarks/cpu_matmul.py [--model qwen] [--seconds 2]`.

Per shape and number of rows of x, for exact kernels and for int8 activations: GB/s of stored
weights, as a share of a loop that only reads the same bytes, and GFLOPS, as a share of a loop of
nothing but multiply-adds (int8: of four times that, which AVX-512 VNNI does). All are timed in
turns, and the median counts (of the peak, the best), since a busy machine slows all of them.
Weights lie in memory, not in the cache: several copies are used in turn. With `--threads 1`, time
is that of the CPU, which other programs on a busy machine disturb less.
"""

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
import tvm
from tvm import tirx
from tvm.script import tirx as T

from relaxlm.compiler.kernels.cpu_int8 import int8_matmul_kernel, quantize_kernel, supports
from relaxlm.compiler.kernels.cpu_matmul import matmul_kernel
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import multiply_add, prefetch, splat, vector_unit
from relaxlm.compiler.options import ACT_QUANT_FEATURES
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.cpu import missing_features

# (outputs, inputs): qkv, output, gate and up, down, head.
SHAPES = {
    "qwen": [(1152, 896), (896, 896), (9728, 896), (896, 4864), (151936, 896)],
    "llama": [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)],
}
ROWS = (1, 4, 8, 16, 512)
# More than a last-level cache share; a head alone is larger.
RESIDENT = 200e6
BLOCK = 256  # vectors of 64 bytes that a task of the read loop takes
CHAINS = 12
PASSES = 300_000


def read_kernel(vectors: int) -> tirx.PrimFunc:
    """(words [vectors * 16], out): read every byte once, and add."""
    tasks = vectors // BLOCK

    @T.prim_func(s_tir=True, check_well_formed=False)
    def read(words: T.Buffer((vectors * 16,), "uint32"), out: T.Buffer((tasks * 16,), "uint32")):
        T.func_attr({"tirx.noalias": True})
        for task in T.parallel(tasks):
            total = T.decl_buffer((16,), "uint32", scope="global")
            total[T.ramp(0, 1, 16)] = T.broadcast(T.uint32(0), 16)
            for i in T.serial(BLOCK):
                prefetch(T.address_of(words[(task * BLOCK + i) * 16 + 1024]))
                total[T.ramp(0, 1, 16)] = (
                    total[T.ramp(0, 1, 16)] + words[T.ramp((task * BLOCK + i) * 16, 1, 16)]
                )
            out[T.ramp(task * 16, 1, 16)] = total[T.ramp(0, 1, 16)]

    return read.with_attr("global_symbol", "read")


def peak_kernel(threads: int, lanes: int) -> tirx.PrimFunc:
    """(out): independent chains of multiply-adds in registers."""

    @T.prim_func(s_tir=True, check_well_formed=False)
    def peak(out: T.Buffer((threads * lanes,), "float32")):
        T.func_attr({"tirx.noalias": True})
        for task in T.parallel(threads):
            sums = T.decl_buffer((CHAINS * lanes,), "float32", scope="global")
            for i in T.unroll(CHAINS):
                sums[T.ramp(i * lanes, 1, lanes)] = splat(1.0, lanes)
            for _ in T.serial(PASSES):
                for i in T.unroll(CHAINS):
                    sums[T.ramp(i * lanes, 1, lanes)] = multiply_add(
                        sums[T.ramp(i * lanes, 1, lanes)],
                        out[T.ramp(0, 1, lanes)],
                        sums[T.ramp(i * lanes, 1, lanes)],
                    )
            for i in T.unroll(CHAINS):
                out[T.ramp(task * lanes, 1, lanes)] = (
                    out[T.ramp(task * lanes, 1, lanes)] + sums[T.ramp(i * lanes, 1, lanes)]
                )

    return peak.with_attr("global_symbol", "peak")


def aligned(array: np.ndarray) -> tvm.runtime.Tensor:
    """A copy whose address is a multiple of 4096, as in a mapped file."""
    room = np.empty(array.nbytes + 4096, np.uint8)
    start = -room.ctypes.data % 4096
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return tvm.runtime.from_dlpack(copy)


def medians(runs: dict[str, Callable[[int], None]], copies: int, seconds: float) -> dict:
    """Seconds of one call each, by name; a run takes the number of the copy to use."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(0)
    single = os.environ["TVM_NUM_THREADS"] == "1"
    clock = time.process_time if single else time.perf_counter
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(runs))]) < 3:
        for name, run in runs.items():
            start = clock()
            for copy in range(copies):
                run(copy)
            times[name].append((clock() - start) / copies)
    return {
        name: float(np.min(values) if name == "peak" else np.median(values))
        for name, values in times.items()
    }


def measure(n: int, k: int, scheme: str, seconds: float) -> None:
    target = resolve_device("cpu").tvm_target()
    unit, threads = vector_unit(target), int(os.environ["TVM_NUM_THREADS"])
    quant = get_scheme(scheme).linear
    dtype = quant.dtype if quant else get_scheme(scheme).dtype
    matrix = StoredMatrix(n, k, quant, dtype)
    int8 = supports(matrix) and not missing_features(ACT_QUANT_FEATURES)
    kernels = {"exact": matmul_kernel((n, k), quant, dtype, "float32", unit)}
    if int8:
        kernels |= {
            "int8": int8_matmul_kernel(matrix, "float32"),
            "quantize": quantize_kernel(k),
        }
    vectors = n * matrix.words * matrix.word_bytes // 64 // BLOCK * BLOCK
    functions = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    functions |= {"read": read_kernel(vectors), "peak": peak_kernel(threads, unit.lanes)}
    library = tvm.compile(tvm.IRModule(functions), target=target)

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((n, k), np.float32)
    arrays = list(quant.quantize(weight).values()) if quant else [weight.astype(dtype)]
    size = sum(array.nbytes for array in arrays)
    copies = max(1, round(RESIDENT / size))
    stored = [[aligned(array) for array in arrays] for _ in range(copies)]
    flat = [
        parts[0]._create_view((n * matrix.words * matrix.word_bytes // 4,), "uint32")
        for parts in stored
    ]
    flat = [words._create_view((vectors * 16,), "uint32") for words in flat]
    sink = tvm.runtime.tensor(np.zeros(vectors // BLOCK * 16, np.uint32))
    peak_out = tvm.runtime.tensor(np.zeros(threads * unit.lanes, np.float32))

    print(f"\n{scheme} [{n}, {k}], {size / 1e6:.1f} MB")
    for m in ROWS:
        if m > 16 and n > 100_000:
            continue  # a head sees the last token of each sequence
        x = tvm.runtime.tensor(rng.standard_normal((m, k), np.float32))
        out = tvm.runtime.tensor(np.zeros((m, n), np.float32))
        groups = -(-k // 32)
        parts = [
            tvm.runtime.tensor(np.zeros((m, groups * words), type_))
            for words, type_ in ((8, "int32"), (1, "float32"), (1, "int32"))
        ]

        def exact(copy: int, x=x, out=out) -> None:
            library["exact"](x, *stored[copy], out)

        def rounded(copy: int, x=x, out=out, parts=parts) -> None:
            library["quantize"](x, *parts)
            library["int8"](*parts, *stored[copy], out)

        runs = {"read": lambda copy: library["read"](flat[copy], sink), "exact": exact}
        if int8:
            runs["int8"] = rounded
        runs["peak"] = lambda copy: library["peak"](peak_out) if copy == 0 else None
        found = medians(runs, min(copies, 4) if m > 16 else copies, seconds)
        used = min(copies, 4) if m > 16 else copies
        peak = PASSES * CHAINS * unit.lanes * 2 * threads / (found["peak"] * used)
        read = vectors * 64 / found["read"]
        line = f"  m {m:4d}"
        for name in ("exact", "int8") if int8 else ("exact",):
            speed, rate = size / found[name], 2 * m * n * k / found[name]
            top = peak * (4 if name == "int8" else 1)
            line += f"   {name} {found[name] * 1e6:8.0f} us {speed / 1e9:5.1f} GB/s"
            line += f" ({speed / read:4.0%} of read) {rate / 1e9:6.0f} GOPS ({rate / top:4.0%})"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--scheme", default="q4f16_1")
    parser.add_argument("--seconds", type=float, default=2, help="per shape and number of rows")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(options.threads)  # read at the first parallel kernel
    for model, shapes in SHAPES.items():
        if options.model in (model, "both"):
            for n, k in shapes:
                measure(n, k, options.scheme, options.seconds)


if __name__ == "__main__":
    main()
