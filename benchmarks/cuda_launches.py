"""What a CPU does for a step of replies on a GPU: launching kernels one by one, or as a CUDA graph.

    python benchmarks/cuda_launches.py --layers 24

TVM's CUDA runtime runs on the stand-in for NVIDIA's libraries of the tests, with kernels that do
nothing. So the times are those of relaxlm, TVM's virtual machine and TVM's CUDA runtime; a real
driver takes some microseconds more for each launch. Needs g++, and Linux.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
INSIDE = "RELAXLM_CUDA_LAUNCHES"  # the folder, in the process that measures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if INSIDE in os.environ:
        measure(Path(os.environ[INSIDE]), options)
        return
    from tests.compiler import fake_cuda

    with tempfile.TemporaryDirectory(prefix="cuda-launches-") as name:
        folder = fake_cuda.build(Path(name))
        environment = {**os.environ, INSIDE: name, "LD_LIBRARY_PATH": str(folder)}
        subprocess.run([sys.executable, *sys.argv], env=environment, check=True)


def measure(folder: Path, options: argparse.Namespace) -> None:
    from relaxlm import models
    from relaxlm.compiler.build import compile_model
    from relaxlm.compiler.options import CompileOptions
    from relaxlm.compiler.target import resolve_device
    from relaxlm.quantization.schemes import get_scheme
    from relaxlm.runtime.cache_size import CacheSize, pages_for
    from relaxlm.runtime.executor import Executor
    from relaxlm.runtime.library import Library
    from tests.compiler import fake_cuda
    from tests.tiny_model import CONFIG

    raw = {**CONFIG, "num_hidden_layers": options.layers}
    config, scheme = models.load_config(raw), get_scheme("q4f16_1")
    limits = CompileOptions.resolve(config, scheme, opt="cuda_graph=1")
    with fake_cuda.kernels_on_the_cpu(folder):
        built = compile_model(config, raw, scheme, resolve_device("cuda", "sm_80"), limits)
        built.save(folder / "model.so")
    library = Library.load(folder / "model.so")
    info = library.metadata
    params = {tensor.name: np.zeros(tensor.shape, tensor.dtype) for tensor in info.params}
    size = CacheSize.of(info, options.batch * pages_for(info, 250), options.batch)
    executor = Executor.from_arrays(library, params, size.pages, size.state_slots)
    sequences = size.sequences(info)
    held = [sequences.add() for _ in range(options.batch)]
    ids = rows = np.arange(options.batch, dtype=np.int32)
    fake_cuda.without_kernels(True)

    def seconds() -> float:
        tables = sequences.batch([(seq, 1) for seq in held])
        start = time.perf_counter()
        executor.compute(tables, ids, rows)
        return time.perf_counter() - start

    def median() -> float:
        return statistics.median(seconds() for _ in range(5))

    launches = fake_cuda.counted("launches")
    seconds()
    launches = fake_cuda.counted("launches") - launches
    for _ in range(12):  # recorded, and into the pages after the first
        seconds()
    single, graph = [], []
    for _ in range(options.rounds):
        with executor.without_graphs():
            single.append(median())
        graph.append(median())
    print(f"{options.layers} layers, {options.batch} sequences: {launches} launches")
    print(f"one by one   {1e6 * statistics.median(single):8.0f} us")
    print(f"as a graph   {1e6 * statistics.median(graph):8.0f} us")
    ratios = [a / b for a, b in zip(single, graph, strict=True)]
    print(
        f"ratio        {statistics.median(ratios):8.1f}   ({min(ratios):.1f} to {max(ratios):.1f})"
    )


if __name__ == "__main__":
    main()
