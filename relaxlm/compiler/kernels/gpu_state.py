"""The operators of recurrent layers (`models/state.py`) for GPUs of any kind.

Two things are different from CUDA (`cuda_state.py`):

- A kernel may read ten buffers at most in browsers, so `view_kernel` brings what the tables of a
  step say of its sequences into one, once per step.
- Lanes of a subgroup cannot be relied upon to exist: in `scan_kernel` a thread has a whole column
  of the state. What a token brings for the keys of a head lies in memory of the workgroup.

Plain kernels: a prompt's tokens are not brought together into products of matrices.
"""

import functools
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels import cuda_state
from relaxlm.compiler.kernels.builder import emit, length, tensor
from relaxlm.compiler.kernels.cuda_script import local
from relaxlm.compiler.kernels.cuda_state import PerKey, by_key, put, shared, when
from relaxlm.compiler.kernels.state import ConvShape, ScanShape, Tokens

# The view's columns: a sequence's first row, how many it has, the slots that are read (-1: none,
# since it begins) and written.
START, ROWS, SOURCE, TARGET = range(4)
# Threads of a workgroup, each with a column of the state.
COLUMNS = 64
THREADS = 256
# float32 that a thread keeps.


@dataclass(frozen=True)
class SlotsView:
    """`kernels.state.Slots` by a view of the step."""

    view: tirx.Buffer
    state: tirx.Buffer

    @staticmethod
    def declare(n: Expr, shape: tuple[int, ...], dtype: str) -> "SlotsView":
        """Declare the parameters, in order; `shape`: of a slot."""
        batch, slots = length("batch"), length("slots")
        return SlotsView(
            tensor("view", (batch, 4), "int32"), tensor("state", (slots, *shape), dtype)
        )

    @property
    def index(self) -> str:
        return "int32"  # WGSL has no other

    @property
    def batch(self) -> Expr:
        return self.view.shape[0]

    def start(self, sequence: Expr) -> Expr:
        return T.cast(self.view[sequence, START], "int64")

    def rows(self, sequence: Expr) -> Expr:
        return T.cast(self.view[sequence, ROWS], "int64")

    def is_new(self, sequence: Expr) -> Expr:
        return self.view[sequence, SOURCE] < 0

    def source(self, sequence: Expr) -> Expr:
        return T.cast(T.max(self.view[sequence, SOURCE], 0), "int64")

    def target(self, sequence: Expr) -> Expr:
        return T.cast(self.view[sequence, TARGET], "int64")


@functools.cache
def view_kernel() -> tirx.PrimFunc:
    """(row_offsets [b + 1], positions [n], sources, targets [b]) -> [b, 4] int32, the columns."""

    def body() -> None:
        n, batch = length("n"), length("b")
        row_offsets = tensor("row_offsets", (batch + 1,), "int32")
        positions = tensor("positions", (n,), "int32")
        sources = tensor("sources", (batch,), "int32")
        targets = tensor("targets", (batch,), "int32")
        view = tensor("view", (batch, 4), "int32")
        with (
            T.thread_binding((batch + THREADS - 1) // THREADS, "blockIdx.x") as block,
            T.thread_binding(THREADS, "threadIdx.x") as thread,
            T.sblock("view"),
        ):
            sequence = block * THREADS + thread
            with when(sequence < batch):
                start = row_offsets[sequence]
                rows = row_offsets[sequence + 1] - start
                # A sequence without rows reads nothing; its first row may lie behind the last.
                first = positions[T.min(T.cast(start, "int64"), n - 1)]
                source = T.if_then_else(first == 0, T.int32(-1), sources[sequence])
                for column, value in enumerate((start, rows, source, targets[sequence])):
                    T.buffer_store(view, value, [sequence, column])

    return emit(body)


@functools.cache  # every layer asks
def scan_kernel(shape: ScanShape) -> tirx.PrimFunc:
    """(q, k, v, decay, (a, b)?, strength?, bonus?, view, state slots, out [n, heads, V]).

    Tensors are those of the operator; a slot of the state is [heads, K, V], written in place.

    Raises:
        UnsupportedError: K is above 256.
    """
    key_dim, value_dim, dtype = shape.key_dim, shape.value_dim, shape.dtype
    shape.check_for_gpu()
    blocks = -(-value_dim // COLUMNS)

    def body() -> None:
        tokens = Tokens.declare(shape, SlotsView.declare)
        with (
            T.thread_binding(tokens.slots.batch, "blockIdx.x") as sequence,
            T.thread_binding(shape.heads * blocks, "blockIdx.y") as place,
            T.thread_binding(COLUMNS, "threadIdx.x") as thread,
            T.sblock("scan"),
        ):
            one_block(tokens, sequence, place // blocks, place % blocks * COLUMNS + thread, thread)

    def one_block(tokens: Tokens, sequence: Expr, head: Expr, column: Expr, thread: Expr) -> None:
        slots = tokens.slots
        state, sums, value = local(key_dim), local(2), local(1)
        found, total = 0, 1
        # Where there is no such column, another is computed, and written by nobody.
        at = T.min(column, value_dim - 1)
        present = [column < value_dim] if value_dim % COLUMNS else []
        staged: dict[str, tuple[tirx.Buffer, PerKey]] = {
            "q": (shared(key_dim), tokens.query),
            "k": (shared(key_dim), tokens.key),
        }
        if shape.removal:
            for name, buffer in zip("ab", tokens.removal, strict=True):
                staged[name] = (shared(key_dim), by_key(buffer))
        if shape.decay_per_key:
            staged["decay"] = (shared(key_dim), tokens.kept)

        def add(place: int, term: Expr) -> None:
            put(sums, sums[place] + term, place)

        with T.serial(key_dim) as i:
            old = slots.state[slots.source(sequence), head, i, at]
            T.buffer_store(state, T.if_then_else(slots.is_new(sequence), T.float32(0), old), [i])
        with T.serial(slots.rows(sequence)) as t:
            row = slots.start(sequence) + t
            # Other threads may still read what the last token brought.
            T.evaluate(T.tvm_storage_sync("shared"))
            for step in range(-(-key_dim // COLUMNS)):
                i = step * COLUMNS + thread
                with when(*([i < key_dim] if (step + 1) * COLUMNS > key_dim else [])):
                    for buffer, of in staged.values():
                        T.buffer_store(buffer, of(row, head, i), [i])
            T.evaluate(T.tvm_storage_sync("shared"))
            brought = {name: buffer for name, (buffer, _) in staged.items()}
            put(value, T.cast(tokens.v[row, head, at], "float32"), 0)
            put(sums, T.float32(0), found)
            put(sums, T.float32(0), total)
            if shape.removal or tokens.bonus is not None:
                with T.serial(key_dim) as i:
                    if shape.removal:
                        add(found, brought["a"][i] * state[i])
                    if tokens.bonus is not None:
                        own = tokens.bonus[head, i] * brought["k"][i] * value[0]
                        add(total, brought["q"][i] * (state[i] + own))
            with T.serial(key_dim) as i:
                kept = brought["decay"][i] if shape.decay_per_key else tokens.decay[row, head]
                T.buffer_store(state, state[i] * kept, [i])
                if tokens.strength is not None:
                    add(found, brought["k"][i] * state[i])
            if tokens.strength is not None:
                put(value, (value[0] - sums[found]) * tokens.strength[row, head], 0)
            with T.serial(key_dim) as i:
                new = state[i] + brought["k"][i] * value[0]
                if shape.removal:
                    new = new + brought["b"][i] * sums[found]
                T.buffer_store(state, new, [i])
                if tokens.bonus is None:
                    add(total, brought["q"][i] * state[i])
            with when(*present):
                T.buffer_store(tokens.out, T.cast(sums[total], dtype), [row, head, at])
        with when(slots.rows(sequence) > 0, *present), T.serial(key_dim) as i:
            T.buffer_store(slots.state, state[i], [slots.target(sequence), head, i, at])

    return emit(body)


def conv_kernel(shape: ConvShape) -> tirx.PrimFunc:
    """(x [n, channels], weight [channels, taps], bias?, view, state slots, out [n, channels])."""
    return cuda_state.conv_kernel(shape, SlotsView.declare)


def previous_row_kernel(size: int, dtype: str, state_dtype: str) -> tirx.PrimFunc:
    """(x [n, size], view, state slots, out [n, size]): each row is that before it."""
    return cuda_state.previous_row_kernel(size, dtype, state_dtype, SlotsView.declare)
