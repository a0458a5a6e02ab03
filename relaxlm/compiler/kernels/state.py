"""What the kernels of recurrent operators on every target agree on (`models/state.py`)."""

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.builder import length, tensor


@dataclass(frozen=True)
class ScanShape:
    """Everything that is fixed when a `linear_scan` kernel is compiled.

    Attributes:
        decay_per_key: whether every key feature has its own decay.
        dtype: of q, k, v and of the result; the other tensors are float32.
    """

    heads: int
    groups: int
    key_dim: int
    value_dim: int
    decay_per_key: bool
    removal: bool
    strength: bool
    bonus: bool
    dtype: str

    @property
    def share(self) -> int:
        """Heads that read the same q and k."""
        return self.heads // self.groups


@dataclass(frozen=True)
class ConvShape:
    """Everything that is fixed when a `causal_conv` kernel is compiled.

    Attributes:
        bias: dtype of the bias; None for none.
        dtype: of x and of the result.
    """

    channels: int
    taps: int
    silu: bool
    weight: str
    bias: str | None
    dtype: str


@dataclass(frozen=True)
class StateSlots:
    """Which rows are whose, and where what a sequence keeps lies: parameters of a kernel.

    A sequence without rows in the step keeps what it has.
    """

    row_offsets: tirx.Buffer
    positions: tirx.Buffer
    sources: tirx.Buffer
    targets: tirx.Buffer
    state: tirx.Buffer

    @staticmethod
    def declare(n: Expr, shape: tuple[int, ...], dtype: str) -> "StateSlots":
        """Declare the parameters, in order; `n`: of all rows, `shape`: of a slot."""
        batch, slots = length("batch"), length("slots")
        return StateSlots(
            tensor("row_offsets", (batch + 1,), "int32"),
            tensor("positions", (n,), "int32"),
            tensor("sources", (batch,), "int32"),
            tensor("targets", (batch,), "int32"),
            tensor("state", (slots, *shape), dtype),
        )

    @property
    def batch(self) -> Expr:
        return self.sources.shape[0]

    def start(self, sequence: Expr) -> Expr:
        """The first row of a sequence, or of the one behind it."""
        return T.cast(self.row_offsets[sequence], "int64")

    def rows(self, sequence: Expr) -> Expr:
        """How many rows a sequence has."""
        return self.start(sequence + 1) - self.start(sequence)

    def is_new(self, sequence: Expr) -> Expr:
        """Whether a sequence, which has rows, starts from zeros."""
        return self.positions[self.start(sequence)] == 0

    def source(self, sequence: Expr) -> Expr:
        # 64 bits: the states of all slots may be more than 2**31 elements.
        return T.cast(self.sources[sequence], "int64")

    def target(self, sequence: Expr) -> Expr:
        return T.cast(self.targets[sequence], "int64")
