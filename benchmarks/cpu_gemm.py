"""Time products of many rows on this CPU: `python benchmarks/cpu_gemm.py [--shapes 896x4864]`.

Per shape (outputs x inputs of 4-bit weights) and number of rows of x: TFLOPS, the median of runs
in turns, and the share of a peak measured in the same process: for AMX, of a loop of four tiles
fetched from the first-level cache and four products of them; for int8 and for float32, of a loop of
nothing but such instructions. Kernels that this CPU lacks instructions for are left out.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import tvm
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels import cpu_amx, cpu_int8_gemm, packed
from relaxlm.compiler.kernels.builder import emit, length, scratch, tensor
from relaxlm.compiler.kernels.cpu_matmul import matmul_kernel
from relaxlm.compiler.kernels.isa import NEEDS, Isa
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import multiply_add, vector_unit
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.cpu import missing_features
from relaxlm.runtime.threads import set_threads, usable_cores

SHAPES = "9728x896,896x4864,16384x2048,2048x8192"
ROWS = "32,128,512,2048"
QUANT = get_scheme("q4f16_1").linear
CHAINS = 12
PASSES = 500_000
PEAK_RUNS = 5

Run = Callable[[], object]


def gemm_kernel(matrix: StoredMatrix, isa: Isa) -> tvm.tirx.PrimFunc:
    """(packed, *stored weight, out)."""
    module = cpu_amx if isa == "amx" else cpu_int8_gemm
    words = (cpu_amx if isa == "amx" else packed).row_words(matrix.k)

    def body() -> None:
        m = length("m")
        x = tensor("packed", (m, words), "int32")
        weight = tensor("weight", matrix.word_shape, matrix.word_dtype)
        scale = tensor("scale", matrix.scale_shape, matrix.dtype)
        out = tensor("out", (m, matrix.n), "float32")
        module.emit_matmul(matrix, isa, m, x, weight, scale, out)

    return emit(body, module.imports(matrix, isa))


def tile_peak(threads: int) -> tvm.tirx.PrimFunc:
    """(tiles [4 * 256] int32, out [256] float32): PASSES times four products of four tiles."""

    def tile(name: str, *operands: Expr) -> None:
        intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}")
        T.evaluate(T.call_llvm_intrin("void", intrinsic, *operands))

    def number(i: int) -> Expr:
        return tvm.tirx.const(i, "int8")

    def body() -> None:
        tiles, out = tensor("tiles", (1024,), "int32"), tensor("out", (threads * 256,), "float32")
        with T.parallel(threads) as task:
            config = scratch(64, "uint8")
            for i in range(64):
                value = 1 if i == 0 else 64 if 16 <= i < 32 and i % 2 == 0 else 0
                T.buffer_store(config, T.uint8(16 if 48 <= i < 56 else value), [i])
            tile("ldtilecfg", T.address_of(config[0]))
            for i in range(4):
                tile("tilezero", number(i))
            with T.serial(PASSES):
                for i in range(4):
                    tile("tileloadd64", number(4 + i), T.address_of(tiles[i * 256]), T.int64(64))
                for i in range(4):
                    tile("tdpbf16ps", number(i), number(4 + i // 2), number(6 + i % 2))
            tile("tilestored64", number(0), T.address_of(out[task * 256]), T.int64(64))
            tile("tilerelease")

    return emit(body)


def vector_peak(threads: int, dtype: str, lanes: int, step: Callable) -> tvm.tirx.PrimFunc:
    """(x [lanes], out [threads * lanes]): PASSES times CHAINS independent instructions."""
    kind = f"{dtype}x{lanes}"

    def body() -> None:
        x = tensor("x", (lanes,), dtype)
        out = tensor("out", (threads * lanes,), dtype)
        with T.parallel(threads) as task:
            sums = [scratch(lanes, dtype) for _ in range(CHAINS)]
            for total in sums:
                T.buffer_store(total, x.vload([0], kind), [T.ramp(0, 1, lanes)])
            with T.serial(PASSES):
                for total in sums:
                    new = step(total.vload([0], kind), x.vload([0], kind))
                    T.buffer_store(total, new, [T.ramp(0, 1, lanes)])
            added = sums[0].vload([0], kind)
            for total in sums[1:]:
                added = added + total.vload([0], kind)
            T.buffer_store(out, added, [T.ramp(task * lanes, 1, lanes)])

    return emit(body)


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=SHAPES, help="outputs x inputs, with commas between")
    parser.add_argument("--rows", default=ROWS, help="rows of x, with commas between")
    parser.add_argument("--seconds", type=float, default=1.0, help="per shape and number of rows")
    arguments = parser.parse_args()
    set_threads(usable_cores())
    threads = usable_cores()
    shapes = [tuple(int(size) for size in text.split("x")) for text in arguments.shapes.split(",")]
    target = resolve_device("cpu").tvm_target()
    unit = vector_unit(target)
    both: tuple[Isa, ...] = ("amx", "avx512")
    isas = [isa for isa in both if not missing_features(NEEDS[isa])]

    kernels: dict[str, tvm.tirx.PrimFunc] = {}
    for n, k in shapes:
        matrix = StoredMatrix(n, k, QUANT, "float16")
        kernels |= {f"{isa}_{n}_{k}": gemm_kernel(matrix, isa) for isa in isas}
        kernels[f"float_{n}_{k}"] = matmul_kernel((n, k), QUANT, "float16", "float32", unit)
    lanes = unit.lanes
    kernels["peak_float"] = vector_peak(
        threads, "float32", lanes, lambda total, x: multiply_add(total, x, x)
    )
    work = {"float": threads * PASSES * CHAINS * 2 * lanes}
    if "amx" in isas:
        kernels["peak_amx"] = tile_peak(threads)
        work["amx"] = threads * PASSES * 4 * 2 * 16 * 16 * 32
    if "avx512" in isas:
        kernels["peak_avx512"] = vector_peak(threads, "int32", 16, dot)
        work["avx512"] = threads * PASSES * CHAINS * 2 * 64
    library = tvm.compile(
        tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in kernels.items()}),
        target=target,
    )

    rng = np.random.default_rng(0)
    kinds = [*isas, "float"]
    # Numbers like real ones: products of zeros take less power, and run at a higher clock.
    halves = rng.standard_normal(2048).astype(np.float32).view(np.uint32) >> 16
    operands = {
        "amx": (halves.astype(np.uint16).view(np.int32), np.zeros(threads * 256, np.float32)),
        "avx512": (rng.integers(0, 2**31, 16, np.int32), np.zeros(threads * 16, np.int32)),
        "float": (np.full(lanes, 0.5, np.float32), np.zeros(threads * lanes, np.float32)),
    }
    peaks = {}
    for kind in kinds:
        tensors = [tvm.runtime.tensor(array) for array in operands[kind]]
        runs = [seconds(partial(library[f"peak_{kind}"], *tensors)) for _ in range(PEAK_RUNS)]
        peaks[kind] = work[kind] / min(runs)
        print(f"peak of {kind}: {peaks[kind] / 1e12:.2f} T/s on {threads} threads")

    print(f"{'shape':>12} {'rows':>5}" + "".join(f" {kind:>15}" for kind in kinds))
    for n, k in shapes:
        weight = (
            rng.integers(0, 2**32, (n, -(-k // 32) * 4), np.uint32),
            rng.random((n, -(-k // 32))).astype(np.float16),
        )
        stored = [tvm.runtime.tensor(array) for array in weight]
        for m in (int(text) for text in arguments.rows.split(",")):
            out = tvm.runtime.tensor(np.zeros((m, n), np.float32))
            x = tvm.runtime.tensor(rng.standard_normal((m, k)).astype(np.float32))
            # As bfloat16, as float32 and as bytes neither zero nor denormal.
            width = max(cpu_amx.row_words(k), packed.row_words(k))
            words = rng.integers(0, 2**31, (m, width), np.int32) & 0x3FFF3FFF | 0x3C003C00
            rows = {
                "amx": tvm.runtime.tensor(words[:, : cpu_amx.row_words(k)].copy()),
                "avx512": tvm.runtime.tensor(words[:, : packed.row_words(k)].copy()),
                "float": x,
            }
            times: dict[str, list[float]] = {kind: [] for kind in kinds}
            stop = time.perf_counter() + arguments.seconds
            while time.perf_counter() < stop or len(times["float"]) < 3:
                for kind in kinds:
                    kernel = library[f"{kind}_{n}_{k}"]
                    run = seconds(partial(kernel, rows[kind], *stored, out))
                    times[kind].append(run)
            cells = ""
            for kind in kinds:
                rate = 2 * m * n * k / float(np.median(times[kind]))
                cells += f" {rate / 1e12:6.2f} ({rate / peaks[kind]:4.0%}) "
            print(f"{n:>6}x{k:<5} {m:>5}{cells}", flush=True)


def dot(total: Expr, x: Expr) -> Expr:
    """total + the sums of four products of bytes of x; int32x16."""
    intrinsic = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.vpdpbusd.512")
    bytes_ = (T.reinterpret("uint8x64", x), T.reinterpret("int8x64", x))
    return T.call_llvm_pure_intrin("int32x16", intrinsic, total, *bytes_)


if __name__ == "__main__":
    main()
