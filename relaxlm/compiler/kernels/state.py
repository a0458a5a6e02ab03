"""What the kernels of recurrent operators on every target agree on (`models/state.py`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.builder import length, tensor
from relaxlm.errors import UnsupportedError

# Features of a key, of which a GPU's threads have a part of the state in registers.
MAX_GPU_KEY_DIM = 256


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

    def check_for_gpu(self) -> None:
        """
        Raises:
            UnsupportedError: keys are too wide for kernels of GPUs.
        """
        if self.key_dim > MAX_GPU_KEY_DIM:
            raise UnsupportedError(
                f"a recurrent state of {self.key_dim} features per key is not supported on GPUs: "
                f"their kernels go up to {MAX_GPU_KEY_DIM}"
            )


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


class Slots(Protocol):
    """Which rows of a step are whose, and where what a sequence keeps lies.

    A sequence without rows in the step keeps what it has. Numbers of sequences have the dtype
    `index`.
    """

    @property
    def state(self) -> tirx.Buffer: ...

    @property
    def index(self) -> str: ...

    @property
    def batch(self) -> Expr: ...

    def start(self, sequence: Expr) -> Expr:
        """The first row of a sequence."""
        ...

    def rows(self, sequence: Expr) -> Expr:
        """How many rows a sequence has."""
        ...

    def is_new(self, sequence: Expr) -> Expr:
        """Whether a sequence, which has rows, starts from zeros."""
        ...

    def source(self, sequence: Expr) -> Expr: ...

    def target(self, sequence: Expr) -> Expr: ...


# Declares them as parameters of a kernel: (number of all rows, shape and dtype of a slot).
Declare = Callable[[Expr, tuple[int, ...], str], Slots]


@dataclass(frozen=True)
class StateSlots:
    """Which rows are whose, and where what a sequence keeps lies: parameters of a kernel.

    The tables are those that the runtime makes.
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
    def index(self) -> str:
        return "int64"

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


@dataclass(frozen=True)
class Tokens:
    """What the tokens of a step bring, and what they get: parameters of a kernel."""

    shape: ScanShape
    q: tirx.Buffer
    k: tirx.Buffer
    v: tirx.Buffer
    decay: tirx.Buffer
    removal: list[tirx.Buffer]
    strength: tirx.Buffer | None
    bonus: tirx.Buffer | None
    slots: Slots
    out: tirx.Buffer

    @staticmethod
    def declare(shape: ScanShape, slots: Declare = StateSlots.declare) -> "Tokens":
        """Declare the parameters, in order."""
        n, heads, key_dim, value_dim = length("n"), shape.heads, shape.key_dim, shape.value_dim
        per_key = (n, heads, key_dim)
        return Tokens(
            shape,
            tensor("q", (n, shape.groups, key_dim), shape.dtype),
            tensor("k", (n, shape.groups, key_dim), shape.dtype),
            tensor("v", (n, heads, value_dim), shape.dtype),
            tensor("decay", per_key if shape.decay_per_key else (n, heads), "float32"),
            [tensor(name, per_key, "float32") for name in ("a", "b") if shape.removal],
            tensor("strength", (n, heads), "float32") if shape.strength else None,
            tensor("bonus", (heads, key_dim), "float32") if shape.bonus else None,
            slots(n, (heads, key_dim, value_dim), "float32"),
            tensor("out", (n, heads, value_dim), shape.dtype),
        )

    def query(self, row: Expr, head: Expr, i: Expr) -> Expr:
        return T.cast(self.q[row, head // self.shape.share, i], "float32")

    def key(self, row: Expr, head: Expr, i: Expr) -> Expr:
        return T.cast(self.k[row, head // self.shape.share, i], "float32")

    def kept(self, row: Expr, head: Expr, i: Expr) -> Expr:
        return self.decay[row, head, i] if self.shape.decay_per_key else self.decay[row, head]


def find_sequence(slots: Slots, row: Expr, between: tirx.Buffer) -> None:
    """Emit a search: between[0] becomes the sequence that a row belongs to."""
    T.buffer_store(between, tirx.const(0, between.dtype), [0])
    T.buffer_store(between, T.cast(slots.batch, between.dtype), [1])
    with T.While(between[1] - between[0] > 1):
        middle = (between[0] + between[1]) // 2
        with T.If(slots.start(middle) <= row):
            with T.Then():
                T.buffer_store(between, middle, [0])
            with T.Else():
                T.buffer_store(between, middle, [1])
