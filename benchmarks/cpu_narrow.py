"""Matmuls with int8 activations on CPUs without AVX-512: how close to memory's and the ALUs' speed.

    python benchmarks/cpu_narrow.py --isa avx2 --seconds 1

Runs on any x86 with the instructions. Every figure stands beside a loop measured in the same
rounds: for few rows one that only reads the stored weights, for many rows one that only does the
instructions of the inner loop, in registers. "hot" is one copy of the weights, which a last-level
cache may hold; else there are as many copies as fill 200 MB.
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count()))

import numpy as np
import tvm
from tvm import tirx

from relaxlm.compiler.kernels import cpu_narrow
from relaxlm.compiler.kernels.builder import T, emit, length, scratch, tensor
from relaxlm.compiler.kernels.cpu_narrow_dots import dots
from relaxlm.compiler.kernels.packed import pack_kernel, row_words
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import prefetch
from relaxlm.quantization.schemes import get_scheme

TARGETS = {
    "avx2": {"kind": "llvm", "mcpu": "x86-64-v3"},
    "avxvnni": {"kind": "llvm", "mcpu": "x86-64-v3", "mattr": ["+avxvnni"]},
}
SHAPES = [(9728, 896), (896, 4864), (4864, 896), (8192, 2048), (2048, 8192)]
RESIDENT = 200e6
BLOCK = 256  # vectors of 64 bytes that a task of the read loop takes
CHAINS = 10
PERIOD = 8
PASSES = 400_000


def multiply_kernel(matrix: StoredMatrix, isa: str) -> tirx.PrimFunc:
    def body() -> None:
        m = length("m")
        x = tensor("x", (m, row_words(matrix.k)), "int32")
        weight = tensor("weight", matrix.word_shape, matrix.word_dtype)
        scale = tensor("scale", matrix.scale_shape, matrix.dtype)
        out = tensor("out", (m, matrix.n), "float32")
        cpu_narrow.emit_matmul(matrix, isa, m, x, weight, scale, out)

    return emit(body, cpu_narrow.imports(matrix, isa))


def peak_kernel(isa: str, bits: int, threads: int) -> tirx.PrimFunc:
    """(x [PERIOD * CHAINS * 8] int32, out): dot products with operands from the first cache."""
    unit = dots(isa, 8, bits)
    kind, width = unit.partial.split("x")
    width = int(width)

    def body() -> None:
        x, out = (
            tensor("x", (PERIOD * CHAINS * 8,), "int32"),
            tensor("out", (threads * width,), kind),
        )
        with T.parallel(threads) as task:
            sums = scratch(CHAINS * width, kind)
            for i in range(CHAINS):
                T.buffer_store(sums, unit.nothing(), [T.ramp(i * width, 1, width)])
            with T.serial(PASSES) as number:
                for i in range(CHAINS):
                    before = sums.vload([i * width], unit.partial)
                    other = x.vload([(number % PERIOD * CHAINS + i) * 8], "int32x8")
                    after = unit.add(before, x.vload([0], "int32x8"), other)
                    T.buffer_store(sums, after, [T.ramp(i * width, 1, width)])
            for i in range(CHAINS):
                place = [T.ramp(task * width, 1, width)]
                total = out.vload([task * width], unit.partial)
                T.buffer_store(out, total + sums.vload([i * width], unit.partial), place)

    return emit(body)


def read_kernel(vectors: int) -> tirx.PrimFunc:
    """(words [vectors * 16], out): read every byte once, and add; memory is fetched ahead."""
    tasks = vectors // BLOCK

    def body() -> None:
        words = tensor("words", (vectors * 16,), "uint32")
        out = tensor("out", (tasks * 8,), "uint32")
        with T.parallel(tasks) as task:
            total = scratch(8, "uint32")
            T.buffer_store(total, T.broadcast(T.uint32(0), 8), [T.ramp(0, 1, 8)])
            with T.serial(BLOCK) as i:
                at = (task * BLOCK + i) * 16
                prefetch(T.address_of(words[at + 1024]))
                both = words.vload([at], "uint32x8") + words.vload([at + 8], "uint32x8")
                T.buffer_store(total, total.vload([0], "uint32x8") + both, [T.ramp(0, 1, 8)])
            T.buffer_store(out, total.vload([0], "uint32x8"), [T.ramp(task * 8, 1, 8)])

    return emit(body)


def aligned(array: np.ndarray) -> tvm.runtime.Tensor:
    """A copy whose address is a multiple of 4096, as in a mapped file."""
    room = np.empty(array.nbytes + 4096, np.uint8)
    start = -room.ctypes.data % 4096
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return tvm.runtime.from_dlpack(copy)


def medians(
    runs: dict[str, Callable[[int], None]], copies: int, seconds: float
) -> dict[str, float]:
    """Seconds of one call each, in turn, by name; a run takes the number of the copy to use."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(runs))]) < 3:
        for name, run in runs.items():
            start = time.perf_counter()
            for copy in range(copies):
                run(copy)
            times[name].append((time.perf_counter() - start) / copies)
    return {name: float(np.median(values)) for name, values in times.items()}


def measure(n: int, k: int, scheme: str, isa: str, rows: list[int], seconds: float) -> None:
    quant, threads = get_scheme(scheme).linear, int(os.environ["TVM_NUM_THREADS"])
    assert quant is not None
    matrix = StoredMatrix(n, k, quant, quant.dtype)
    vectors = n * matrix.words // 16 // BLOCK * BLOCK
    kernels = {
        "multiply": multiply_kernel(matrix, isa),
        "pack": pack_kernel(k, isa),
        "read": read_kernel(vectors),
        "peak": peak_kernel(isa, quant.bits, threads),
    }
    named = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    library = tvm.compile(tvm.IRModule(named), target=tvm.target.Target(TARGETS[isa]))

    rng = np.random.default_rng(0)
    arrays = list(quant.quantize(rng.standard_normal((n, k), np.float32)).values())
    size = sum(array.nbytes for array in arrays)
    copies = max(1, round(RESIDENT / size))
    stored = [[aligned(array) for array in arrays] for _ in range(copies)]
    flat = [parts[0]._create_view((vectors * 16,), "uint32") for parts in stored]
    sink = tvm.runtime.tensor(np.zeros(vectors // BLOCK * 8, np.uint32))
    peak_x = tvm.runtime.tensor(np.full(PERIOD * CHAINS * 8, 0x01010101, np.int32))
    dtype = "int16" if (isa, quant.bits) == ("avx2", 4) else "int32"
    peak_out = tvm.runtime.tensor(np.zeros(threads * (16 if dtype == "int16" else 8), dtype))

    print(f"\n{isa} {scheme} [{n}, {k}], {size / 1e6:.1f} MB")
    for m in rows:
        x = tvm.runtime.tensor(rng.standard_normal((m, k), np.float32))
        packed = tvm.runtime.tensor(np.zeros((m, row_words(k)), np.int32))
        out = tvm.runtime.tensor(np.zeros((m, n), np.float32))
        library["pack"](x, packed)
        many = m > 16
        used = 1 if many else copies

        def multiply(copy: int, packed=packed, out=out) -> None:
            library["multiply"](packed, *stored[copy], out)

        runs: dict[str, Callable[[int], None]] = {"multiply": multiply}
        if many:
            runs["peak"] = lambda copy: library["peak"](peak_x, peak_out)
            runs["pack"] = lambda copy, x=x, packed=packed: library["pack"](x, packed)
        else:
            runs["read"] = lambda copy: library["read"](flat[copy], sink)
        found = medians(runs, used, seconds)
        speed, rate = size / found["multiply"], 2 * m * n * k / found["multiply"]
        line = f"  m {m:4d} {found['multiply'] * 1e6:9.1f} us"
        if many:
            top = PASSES * CHAINS * 32 * 2 * threads / found["peak"]
            line += f" {rate / 1e9:6.0f} GOPS ({rate / top:4.0%} of {top / 1e9:.0f})"
            line += f"   pack {found['pack'] * 1e6:.1f} us"
        else:
            read = vectors * 64 / found["read"]
            line += f" {speed / 1e9:6.1f} GB/s ({speed / read:4.0%} of {read / 1e9:.1f} read)"
            hot = medians({"multiply": multiply}, 1, seconds / 4)["multiply"]
            line += f"   hot {hot * 1e6:9.1f} us {size / hot / 1e9:6.1f} GB/s"
            line += f" {2e-9 * m * n * k / hot:6.0f} GOPS"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--isa", choices=[*TARGETS, "both"], default="both")
    parser.add_argument("--scheme", default="q4f16_1")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 512])
    parser.add_argument("--shape", type=int, nargs=2, action="append", help="N K; repeatable")
    parser.add_argument("--seconds", type=float, default=1, help="per shape and number of rows")
    options = parser.parse_args()
    for isa in TARGETS if options.isa == "both" else [options.isa]:
        for n, k in options.shape or SHAPES:
            measure(n, k, options.scheme, isa, options.rows, options.seconds)


if __name__ == "__main__":
    main()
