"""Which dot products a CPU target has: what decides the kernels of rounded activations."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import tvm

# What the kernels of each need, under LLVM's names; the first whose needs are met is taken.
#   amx      tiles of bfloat16 for many rows, AVX-512 VNNI or tiles of bytes for few
#   avx512   AVX-512 VNNI: 64 products of bytes an instruction
#   avxvnni  the same with 32
#   avx2     pairs of bytes multiplied and added to 16 bits, then pairs of those to 32
#   i8mm, dotprod   of ARM
Isa = Literal["amx", "avx512", "avxvnni", "avx2", "i8mm", "dotprod"]
NEEDS: dict[Isa, tuple[str, ...]] = {
    "amx": ("amx-tile", "amx-bf16", "amx-int8", "avx512bf16", "avx512bw", "avx512f", "avx512vnni"),
    "avx512": ("avx512bw", "avx512f", "avx512vnni"),
    "avxvnni": ("avx2", "avxvnni", "f16c", "fma"),
    "avx2": ("avx2", "f16c", "fma"),
    "i8mm": ("dotprod", "i8mm", "neon"),
    "dotprod": ("dotprod", "neon"),
}


def best_isa(has: Callable[[str], bool]) -> Isa | None:
    """The instructions that kernels may use on a CPU with some features; None for none we know."""
    return next((isa for isa, needs in NEEDS.items() if all(map(has, needs))), None)


def dot_products(target: "tvm.target.Target | None") -> Isa | None:
    """The same for a CPU target of TVM."""
    if target is None:
        return None
    from tvm.target import codegen

    return best_isa(lambda name: codegen.target_has_features(name, target))
