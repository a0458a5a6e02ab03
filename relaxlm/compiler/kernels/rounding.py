"""In which form the activations of a matmul are rounded: what producer and matmul agree on.

    rows of x   amx                          other instruction sets
    1 - FEW     int8 by groups (packed)      int8 by groups (packed)
    more        bfloat16 (cpu_amx)           int8 by groups (packed)

If the kernels are to be invariant, all rows are int8 by groups.

The number of rows is known when kernels run, so both forms have code in every kernel that writes
or reads rounded activations, and rows are as long as the longer form needs.
"""

from dataclasses import dataclass
from typing import cast

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels import cpu_amx, packed
from relaxlm.compiler.kernels.isa import Isa
from relaxlm.compiler.kernels.packed import FEW, Value


@dataclass(frozen=True)
class Rounding:
    """The forms of the rows of x [m, k] for a CPU with the instructions `isa`.

    `invariant`: whether what becomes of a row may not depend on how many there are.
    """

    k: int
    isa: Isa
    invariant: bool = False

    def __str__(self) -> str:
        return f"{self.isa}:{self.k}:{int(self.invariant)}"

    @staticmethod
    def parse(text: str) -> "Rounding":
        """The inverse of `str`, for attributes of functions."""
        isa, k, invariant = text.split(":")
        return Rounding(int(k), cast(Isa, isa), invariant == "1")

    @property
    def _tiles(self) -> bool:
        """Whether many rows are bfloat16."""
        return self.isa == "amx" and not self.invariant

    @property
    def row_words(self) -> int:
        """The int32 words of a row of `packed [m, row_words]`."""
        words = packed.row_words(self.k)
        return max(words, cpu_amx.row_words(self.k)) if self._tiles else words

    def emit_pack(self, value: Value, rows: tirx.Buffer, row: Expr | int, m: Expr) -> None:
        """Emit the statements that write one of m rows.

        Args:
            value: (i, lanes) -> float32 elements i .. i + lanes of the row.
            rows: [m, row_words] int32.
        """
        if not self._tiles:
            packed.emit_pack(self.k, value, rows, row, m, self.isa, single=not self.invariant)
            return
        with T.If(m <= FEW):
            with T.Then():
                packed.emit_pack(self.k, value, rows, row, m, self.isa)
            with T.Else():
                cpu_amx.emit_pack(self.k, value, rows, row, m)
