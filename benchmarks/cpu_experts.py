"""Experts on CPUs: how close to memory's speed for a few tokens, to dense matmuls' for a prompt.

    python benchmarks/cpu_experts.py --seconds 1

The default is a layer of Qwen3-30B-A3B in q4f16_1: 128 experts of [1536, 2048] and [2048, 768], of
which a token passes 8. For few tokens the figure beside is a loop that only reads what was chosen;
for many, a dense matmul of one expert's shape with as many rows as an expert has on average, and
one with all rows, both as they are without experts (`cpu_rounded`). "exact" is without rounding.
The router's choice of 8 experts out of 256 is timed, too. Everything is measured in turns.
"""

import argparse
import os

os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count()))

import numpy as np
import tvm
from cpu_narrow import BLOCK, aligned, medians, read_kernel
from tvm import relax
from tvm.relax.frontend import nn

from relaxlm.compiler.kernels import cpu_rounded
from relaxlm.compiler.kernels.cpu_elementwise import round_kernel
from relaxlm.compiler.kernels.cpu_experts import expert_kernel
from relaxlm.compiler.kernels.isa import dot_products
from relaxlm.compiler.kernels.rounding import Rounding
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import vector_unit
from relaxlm.compiler.passes.schedule_cpu import schedule_cpu
from relaxlm.compiler.target import resolve_device
from relaxlm.models.routing import choose
from relaxlm.quantization.schemes import get_scheme


def measure(
    experts: int, n: int, k: int, each: int, repeat: int, rows: list[int], seconds: float
) -> None:
    quant, target = get_scheme("q4f16_1").linear, resolve_device("cpu").tvm_target()
    assert quant is not None
    matrix, isa = StoredMatrix(n, k, quant, quant.dtype), dot_products(target)
    expert_bytes = n * (matrix.words * 4 + matrix.groups * 2)
    vectors = each * n * matrix.words // 16 // BLOCK * BLOCK
    unit = vector_unit(target)
    kernels = {
        "exact": expert_kernel((experts, n, k), quant, quant.dtype, each, repeat, unit),
        "experts": expert_kernel((experts, n, k), quant, quant.dtype, each, repeat, unit, isa),
        "read": read_kernel(vectors),
    }
    if isa is not None:
        kernels["dense"] = cpu_rounded.rounded_matmul_kernel(matrix, isa)
        kernels["round"] = round_kernel(Rounding(k, isa))
    named = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    library = tvm.compile(tvm.IRModule(named), target=target)

    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (experts, n, matrix.words), dtype=np.uint32) & 0x66666666
    scales = rng.uniform(0.01, 0.02, (experts, n, matrix.groups)).astype(np.float16)
    weight, scale = aligned(words), aligned(scales)
    flat = np.from_dlpack(weight).reshape(-1)
    sink = tvm.runtime.tensor(np.zeros(vectors // BLOCK * 8, np.uint32))
    print(f"\n{experts} x [{n}, {k}], {each} each, {expert_bytes / 1e6:.2f} MB an expert, {isa}")
    for tokens in rows:
        count = tokens * each
        x = tvm.runtime.tensor(rng.standard_normal((count // repeat, k), np.float32))
        out = tvm.runtime.tensor(np.zeros((count, n), np.float32))
        # Other experts every time, so that none is left in the cache.
        copies = max(1, min(8, experts // (each * tokens)))
        chosen = [
            tvm.runtime.tensor(
                np.stack([rng.permutation(experts)[:each] for _ in range(tokens)]).astype(np.int32)
            )
            for _ in range(copies)
        ]
        used = np.mean([len(np.unique(c.numpy())) for c in chosen])

        def run(name: str, x=x, out=out, chosen=chosen):
            return lambda copy: library[name](x, chosen[copy], weight, scale, out)

        runs = {"exact": run("exact"), "experts": run("experts")}
        dense: dict[str, int] = {}
        if tokens <= 16:
            parts = flat.size // (vectors * 16)
            views = [
                tvm.runtime.from_dlpack(flat[i * vectors * 16 : (i + 1) * vectors * 16])
                for i in range(parts)
            ]
            runs["read"] = lambda copy, views=views: library["read"](views[copy % len(views)], sink)
        elif isa is not None:
            dense = {"mean": max(1, round(count / used)), "all": count}
            for name, m in dense.items():
                given = tvm.runtime.tensor(rng.standard_normal((m, k), np.float32))
                packed = tvm.runtime.tensor(np.zeros((m, Rounding(k, isa).row_words), np.int32))
                wide = tvm.runtime.tensor(np.zeros((m, n), np.float32))
                library["round"](given, packed)
                one = [t._create_view(t.shape[1:], t.dtype) for t in (weight, scale)]
                runs[name] = lambda copy, p=packed, o=wide, one=one: library["dense"](p, *one, o)
        found = medians(runs, copies, seconds)
        line = f"  {tokens:4d} tokens, {used:5.1f} experts {found['experts'] * 1e6:9.1f} us"
        line += f" (exact {found['exact'] * 1e6:9.1f})"
        if "read" in runs:
            speed, read = used * expert_bytes / found["experts"], vectors * 64 / found["read"]
            line += f" {speed / 1e9:6.1f} GB/s ({speed / read:4.0%} of {read / 1e9:.1f} read)"
        else:
            rate = 2e-9 * count * n * k / found["experts"]
            line += f" {rate:6.0f} GOPS"
            for name, m in dense.items():
                other = 2e-9 * m * n * k / found[name]
                line += f" ({rate / other:4.0%} of dense with {m} rows, {other:.0f})"
        print(line, flush=True)


def measure_router(experts: int, each: int, seconds: float) -> None:
    class Router(nn.Module):
        def forward(self, p: nn.Tensor):
            return choose(p, each)

    spec = {"forward": {"p": nn.spec.Tensor(["n", experts], "float32")}}
    module, _ = Router().export_tvm(spec)
    target = resolve_device("cpu").tvm_target()
    with target:
        module = schedule_cpu()(relax.transform.LegalizeOps()(module))
    machine = relax.VirtualMachine(tvm.compile(module, target=target), tvm.cpu())
    for tokens in (1, 256):
        p = tvm.runtime.tensor(np.random.default_rng(0).random((tokens, experts), np.float32))
        found = medians({"choose": lambda copy, p=p: machine["forward"](p)}, 1, seconds / 4)
        print(f"  choosing {each} of {experts} for {tokens} tokens: {found['choose'] * 1e6:.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--each", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 256])
    parser.add_argument("--seconds", type=float, default=1, help="per matrix and number of tokens")
    options = parser.parse_args()
    experts, each, hidden, inner = options.experts, options.each, options.hidden, options.inner
    for n, k, repeat in ((2 * inner, hidden, each), (hidden, inner, 1)):
        measure(experts, n, k, each, repeat, options.rows, options.seconds)
    print()
    measure_router(256, 8, options.seconds)


if __name__ == "__main__":
    main()
