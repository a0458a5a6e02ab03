"""Is relaxlm right and fast on an NVIDIA GPU? One command there, prepared on a machine without one.

    python benchmarks/cuda_check.py prepare FOLDER --arch sm_90 --python 3.12     # anywhere
    tar -xf FOLDER.tar.xz                                                         # with the GPU
    PYTHONPATH=FOLDER/packages:. python benchmarks/cuda_check.py run FOLDER

`prepare` compiles kernels, tiny models of most families and models of real shapes for the GPU, and
computes on the CPU what the kernels (float64 NumPy) and the tiny models (relaxlm's CPU libraries,
which tests hold against transformers) have to come to. With `--python` it also puts the packages
that running takes into FOLDER/packages, without TVM's compiler: the GPU machine needs Python with
NumPy, and torch for the comparison. It goes on where it was interrupted, packs the folder, and
tells how large that is.

`run` checks correctness first, of the kernels and of a model for each kind of them, then speed:
decoding as a share of measured memory bandwidth, prompts as a share of the rate of torch's matrix
products, both next to transformers on the same card; and then the other families. It stops after
`--seconds`, writes OUTPUT/results.json after every item, and goes on with what is left when it is
started again. Weights of the real shapes are random and made there.

`prepare --device cpu` and `run` do the same with CPU libraries, where nothing may differ.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PARTS = ("machine", "kernel", "model", "gemm", "speed", "torch")
SHAPES = ("tiny", "1b", "8b")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="compile; needs no GPU")
    prepare.add_argument("folder", type=Path)
    prepare.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    prepare.add_argument("--arch", default="sm_90", help="of the GPU, or several: sm_80,sm_90")
    prepare.add_argument("--families", nargs="*", help="model types; default: all of FAMILIES")
    prepare.add_argument("--presets", nargs="+", default=["q0f32", "q4f16_1"])
    prepare.add_argument("--shapes", nargs="*", default=["1b", "8b"], choices=SHAPES)
    prepare.add_argument("--shape-presets", nargs="+", default=["q4f16_1", "q0f16"])
    prepare.add_argument("--python", help="version of the GPU machine's Python, such as 3.12")
    prepare.add_argument(
        "--megabytes", type=float, default=64, help="the packed folder's largest size"
    )
    run = commands.add_parser("run", help="check and measure; needs no compiler")
    run.add_argument("folder", type=Path)
    run.add_argument("--output", type=Path, help="default: FOLDER")
    run.add_argument("--parts", nargs="*", default=[], choices=PARTS, help="default: all, in order")
    run.add_argument("--seconds", type=float, default=540)
    run.add_argument("--item-seconds", type=float, default=150)
    worker = commands.add_parser("worker", help="what run starts")
    worker.add_argument("folder", type=Path)
    worker.add_argument("numbers", nargs="+", type=int)
    options = parser.parse_args()
    if options.command == "prepare":
        from cuda_check_prepare import Preparation

        return Preparation(options).run()
    import cuda_check_run

    if options.command == "worker":
        cuda_check_run.work(options.folder, options.numbers)
        return 0
    output = options.output or options.folder
    right = cuda_check_run.run(
        options.folder, output, options.parts, options.seconds, options.item_seconds
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
