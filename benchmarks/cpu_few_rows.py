"""Time the CPU kernels for few rows of x: `python benchmarks/cpu_few_rows.py [--model qwen]`.

Per shape of a model's matrices and number of rows of x, for rounded activations and for exact ones
(`--kernels`): microseconds, GB/s of stored weights, how that compares with a loop that only reads
the same bytes with the same threads, and GOPS (two per weight and row of x). Weights are random
and lie in memory: copies of 400 MB in all are used in turn. With `--hot` there is one copy, which
then lies in the cache if it fits. All are timed in turns and the median counts.
"""

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels import cpu_few_rows
from relaxlm.compiler.kernels.builder import emit, length, scratch, tensor
from relaxlm.compiler.kernels.cpu_gemv import AHEAD, fetch
from relaxlm.compiler.kernels.cpu_matmul import matmul_kernel
from relaxlm.compiler.kernels.isa import Isa, dot_products
from relaxlm.compiler.kernels.packed import pack_kernel, row_words
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import vector_unit
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.schemes import get_scheme

# (outputs, inputs): qkv, output, gate and up, down, head.
SHAPES = {
    "qwen": [(1152, 896), (896, 896), (9728, 896), (896, 4864), (151936, 896)],
    "llama": [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048)],
}
RESIDENT = 400e6
# Vectors of 64 bytes that a task of the read loop takes, and how many sums it keeps.
TASK, CHAINS = 64, 4


def read_kernel(vectors: int) -> tirx.PrimFunc:
    """(words [vectors * 16], out): read every byte once, and add."""
    tasks = vectors // TASK

    def body() -> None:
        words = tensor("words", (vectors * 16,), "uint32")
        out = tensor("out", (tasks * 16,), "uint32")
        with T.parallel(tasks) as task:
            sums = [scratch(16, "uint32") for _ in range(CHAINS)]
            for total in sums:
                T.buffer_store(total, T.broadcast(T.uint32(0), 16), [T.ramp(0, 1, 16)])
            with T.serial(TASK // CHAINS) as i:
                for chain, total in enumerate(sums):
                    at = (task * TASK + i * CHAINS + chain) * 16
                    fetch(T.address_of(words[at + AHEAD // 4]))
                    added = total.vload([0], "uint32x16") + words.vload([at], "uint32x16")
                    T.buffer_store(total, added, [T.ramp(0, 1, 16)])
            first, *rest = (total.vload([0], "uint32x16") for total in sums)
            T.buffer_store(out, sum(rest, start=first), [T.ramp(task * 16, 1, 16)])

    return emit(body)


def rounded_kernel(matrix: StoredMatrix, isa: Isa) -> tirx.PrimFunc:
    """(packed, weight, scale, out)"""

    def body() -> None:
        m = length("m")
        packed = tensor("packed", (m, row_words(matrix.k)), "int32")
        weight = tensor("weight", matrix.word_shape, matrix.word_dtype)
        scale = tensor("scale", matrix.scale_shape, matrix.dtype)
        out = tensor("out", (m, matrix.n), "float32")
        cpu_few_rows.emit_matmul(matrix, isa, m, packed, weight, scale, out)

    return emit(body, cpu_few_rows.imports(matrix, isa))


def random_matrix(matrix: StoredMatrix) -> np.ndarray:
    """A matrix's words and, behind them, its scales: uint32, all scales about 1."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, matrix.n * matrix.words, np.uint32)
    if matrix.quant is None:
        return np.ones(words.size * matrix.word_bytes // 4, np.float32).view(np.uint32)
    scales = np.full(matrix.n * matrix.groups, {2: 0x3C00, 4: 0x3F800000}[scale_bytes(matrix)])
    scales = scales.astype(f"u{scale_bytes(matrix)}")
    padded = np.zeros(-(-scales.nbytes // 64) * 64, np.uint8)
    padded[: scales.nbytes] = scales.view(np.uint8)
    return np.concatenate([words, padded.view(np.uint32)])


def scale_bytes(matrix: StoredMatrix) -> int:
    return 4 if matrix.dtype == "float32" else 2


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy whose address is a multiple of 4096, as in a mapped file."""
    room = np.empty(array.nbytes + 4096, np.uint8)
    start = -room.ctypes.data % 4096
    copy = room[start : start + array.nbytes].view(array.dtype)
    copy[...] = array
    return copy


def arguments(matrix: StoredMatrix, array: np.ndarray) -> list[tvm.runtime.Tensor]:
    """Views of what `random_matrix` made, as kernels take them."""
    whole = tvm.runtime.from_dlpack(array)
    count = matrix.n * matrix.words * matrix.word_bytes // 4
    parts = [whole._create_view(matrix.word_shape, matrix.word_dtype)]
    if matrix.quant is not None:
        behind = tvm.runtime.from_dlpack(array[count:])
        parts.append(behind._create_view(matrix.scale_shape, matrix.dtype))
    return parts


def medians(runs: dict[str, Callable[[int], None]], copies: int, seconds: float) -> dict:
    """Seconds of one call each, by name; a run takes the number of the copy to use."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(0)
    calls = max(copies, 20)  # so that a turn is long enough for the clock
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["read"]) < 3:
        for name, run in runs.items():
            start = time.perf_counter()
            for call in range(calls):
                run(call % copies)
            times[name].append((time.perf_counter() - start) / calls)
    return {name: float(np.median(values)) for name, values in times.items()}


def measure(n: int, k: int, options: argparse.Namespace) -> None:
    target = resolve_device("cpu").tvm_target()
    isa, scheme = dot_products(target), get_scheme(options.scheme)
    quant = scheme.linear
    matrix = StoredMatrix(n, k, quant, quant.dtype if quant else scheme.dtype)
    kernels = {}
    if "exact" in options.kernels:
        unit = vector_unit(target)
        kernels["exact"] = matmul_kernel((n, k), quant, matrix.dtype, "float32", unit)
    if "rounded" in options.kernels and isa and cpu_few_rows.supports(matrix, isa):
        kernels |= {"rounded": rounded_kernel(matrix, isa), "pack": pack_kernel(k, isa)}
    start, library = time.perf_counter(), {}
    for name, kernel in kernels.items():
        module = tvm.IRModule({name: kernel.with_attr("global_symbol", name)})
        library[name] = tvm.compile(module, target=target)[name]
    compiled = time.perf_counter() - start

    array = random_matrix(matrix)
    vectors = array.nbytes // 64 // TASK * TASK
    read = read_kernel(vectors).with_attr("global_symbol", "read")
    read_all = tvm.compile(tvm.IRModule({"read": read}), target=target)["read"]
    copies = 1 if options.hot else max(2, round(RESIDENT / array.nbytes) + 1)
    arrays = [aligned(array) for _ in range(copies)]
    stored = [arguments(matrix, copy) for copy in arrays]
    flat = [tvm.runtime.from_dlpack(copy[: vectors * 16]) for copy in arrays]
    sink = tvm.runtime.tensor(np.zeros(vectors // TASK * 16, np.uint32))

    runs: dict[str, Callable[[int], None]] = {"read": lambda copy: read_all(flat[copy], sink)}
    for name in ("exact", "rounded"):
        if name not in library:
            continue
        for m in options.rows:
            x = tvm.runtime.tensor(np.random.default_rng(m).standard_normal((m, k), np.float32))
            if name == "rounded":
                packed = tvm.runtime.tensor(np.zeros((m, row_words(k)), np.int32))
                library["pack"](x, packed)
                x = packed
            out = tvm.runtime.tensor(np.zeros((m, n), np.float32))
            kernel = library[name]
            runs[f"{name} {m}"] = lambda copy, kernel=kernel, x=x, out=out: kernel(
                x, *stored[copy], out
            )
    found = medians(runs, copies, options.seconds)
    speed = vectors * 64 / found.pop("read")
    print(
        f"\n{options.scheme} [{n}, {k}], {array.nbytes / 1e6:.1f} MB, read at {speed / 1e9:.1f} "
        f"GB/s; kernels compiled in {compiled:.1f} s"
    )
    for name, seconds in found.items():
        m = int(name.split()[1])
        rate = array.nbytes / seconds
        print(
            f"  {name:10s} {seconds * 1e6:9.1f} us {rate / 1e9:6.1f} GB/s {rate / speed:5.0%} of "
            f"read {2 * m * n * k / seconds / 1e9:6.0f} GOPS",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--scheme", default="q4f16_1")
    parser.add_argument("--kernels", nargs="+", choices=["rounded", "exact"], default=["rounded"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--hot", action="store_true", help="weights in the cache")
    parser.add_argument("--seconds", type=float, default=2, help="per shape")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(options.threads)  # read at the first parallel kernel
    for model, shapes in SHAPES.items():
        if options.model in (model, "both"):
            for n, k in shapes:
                measure(n, k, options)


if __name__ == "__main__":
    main()
