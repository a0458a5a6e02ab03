"""Which dot products a CPU target has: what decides the kernels of rounded activations."""

from typing import Literal

import tvm

# What the kernels of each need, under LLVM's names; the first whose needs are met is taken.
#   amx      tiles of bfloat16 for many rows, AVX-512 VNNI for few
#   avx512   AVX-512 VNNI: 64 products of bytes an instruction
#   avxvnni  the same with 32
#   avx2     pairs of bytes multiplied and added to 16 bits, then pairs of those to 32
#   i8mm, dotprod   of ARM
Isa = Literal["amx", "avx512", "avxvnni", "avx2", "i8mm", "dotprod"]
NEEDS: dict[Isa, tuple[str, ...]] = {
    "amx": ("amx-tile", "amx-bf16", "avx512bf16", "avx512bw", "avx512f", "avx512vnni"),
    "avx512": ("avx512bw", "avx512f", "avx512vnni"),
    "avxvnni": ("avx2", "avxvnni", "f16c", "fma"),
    "avx2": ("avx2", "f16c", "fma"),
    "i8mm": ("dotprod", "i8mm", "neon"),
    "dotprod": ("dotprod", "neon"),
}


def dot_products(target: tvm.target.Target | None) -> Isa | None:
    """The instructions that kernels for a CPU target may use; None if there are none we know."""
    if target is None:
        return None
    has = tvm.target.codegen.target_has_features
    return next(
        (isa for isa, needs in NEEDS.items() if all(has(name, target) for name in needs)), None
    )
