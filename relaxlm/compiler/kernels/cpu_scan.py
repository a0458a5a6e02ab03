"""Linear recurrences on CPUs: `linear_scan` of models/state.py.

Columns of a head's state [K, V] do not depend on each other. A task is a sequence, a head and a
block of columns, which fits into the first-level cache next to what tokens bring. Vectors lie along
V. The task goes over the block once per token: a row of it is loaded, gets the token's product, is
read for the token's output, and already fades and is read for what the next token needs of it.

Sums over K are made row by row in every pass, so that a token's result does not depend on how many
tokens a step has. Forms that take several tokens at once (Mamba-2's and the delta rule's, by
products of matrices) save at most a fifth of the arithmetic in float32: docs/performance.md.

Where every sequence has one token, memory decides: tasks are in the order of addresses then, and
while one writes, what the next one reads is fetched.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import emit, scratch
from relaxlm.compiler.kernels.cpu_elementwise import span, sum_of
from relaxlm.compiler.kernels.cpu_gemv import LINE, fetch
from relaxlm.compiler.kernels.state import ScanShape, Tokens
from relaxlm.compiler.kernels.vector import (
    VectorUnit,
    multiply_add,
    prefetch,
    reduce_sum_ir,
    splat,
    to_float32,
    vector,
)

# How many tokens ahead memory is fetched.
AHEAD = 2
# Bytes of a block, at most.
BLOCK_BYTES = 32 << 10


@dataclass(frozen=True)
class _Vectors:
    """float32 vectors, `count` of which are what a row of a block consists of."""

    lanes: int
    count: int

    @property
    def width(self) -> int:
        return self.lanes * self.count

    @property
    def columns(self) -> range:
        """Where the vectors of a row begin."""
        return range(0, self.width, self.lanes)

    def get(self, buffer: tirx.Buffer, *index: Expr | int) -> Expr:
        return buffer.vload([*index], vector("float32", self.lanes))

    def put(self, buffer: tirx.Buffer, value: Expr, *index: Expr | int) -> None:
        *outer, last = index
        T.buffer_store(buffer, value, [*outer, span(last, self.lanes)])

    def add(self, buffer: tirx.Buffer, factor: Expr, value: Expr, at: int) -> None:
        self.put(buffer, multiply_add(self.splat(factor), value, self.get(buffer, at)), at)

    def splat(self, value: Expr | float) -> Expr:
        return splat(value, self.lanes)

    def zero(self, *buffers: tirx.Buffer) -> None:
        for buffer in buffers:
            for at in self.columns:
                self.put(buffer, self.splat(0.0), at)


class _Task:
    """One head's columns first .. first + width of one sequence."""

    def __init__(
        self, tokens: Tokens, vectors: _Vectors, sequence: Expr, head: Expr, first: Expr
    ) -> None:
        self.tokens, self.shape, self.vectors = tokens, tokens.shape, vectors
        self.sequence, self.head, self.first = sequence, head, first
        width = vectors.width
        # The state, faded for the token that comes next, and a row of it.
        self.block = scratch(self.shape.key_dim * width, "float32")
        self.state = scratch(width, "float32")
        # What a token finds under its key, or under a; its output; what its key gets.
        self.found, self.total, self.added = (scratch(width, "float32") for _ in range(3))
        # Of the next token, what is read of the state before its turn.
        self.next_found, self.next_total = (scratch(width, "float32") for _ in range(2))

    def run(self, fetch_next: Callable[[Expr], None] | None = None) -> None:
        """Emit everything.

        Args:
            fetch_next: called for each row when the block is written; then there is one token.
        """
        slots, vectors, key_dim = self.tokens.slots, self.vectors, self.shape.key_dim
        start, end = slots.start(self.sequence), slots.start(self.sequence + 1)
        with T.If(slots.is_new(self.sequence)):
            with T.Then():
                self.begin(start, lambda i, at: vectors.splat(0.0))
            with T.Else():
                source = slots.source(self.sequence)
                self.begin(
                    start, lambda i, at: vectors.get(slots.state, source, *self.place(i, at))
                )
        if fetch_next is None:
            with T.serial(end - start - 1) as t:
                self.token(start + t)
        self.prepare(end - 1)
        with T.serial(key_dim) as i:
            if fetch_next is not None:
                fetch_next(i)
            self.update(end - 1, i)
            for at in vectors.columns:
                target = slots.target(self.sequence)
                vectors.put(slots.state, vectors.get(self.state, at), target, *self.place(i, at))
        self.write_output(end - 1)

    def token(self, row: Expr) -> None:
        """One that is not the last."""
        vectors = self.vectors
        fetch_token(self.tokens, row + AHEAD, self.head, self.first, vectors.width)
        self.prepare(row)
        vectors.zero(self.next_found, self.next_total)
        with T.serial(self.shape.key_dim) as i:
            self.update(row, i)
            self.fade(row + 1, i, self.next_found, self.next_total)
        self.write_output(row)
        for at in vectors.columns:
            vectors.put(self.found, vectors.get(self.next_found, at), at)
            vectors.put(self.total, vectors.get(self.next_total, at), at)

    def place(self, i: Expr, at: int) -> tuple[Expr, Expr, Expr]:
        """Of a vector of the block within a slot."""
        return self.head, i, self.first + at

    def begin(self, row: Expr, load: Callable[[Expr, int], Expr]) -> None:
        """Bring the state that `load` gives vectors of into the block, for the first token."""
        self.vectors.zero(self.found, self.total)
        with T.serial(self.shape.key_dim) as i:
            for at in self.vectors.columns:
                self.vectors.put(self.state, load(i, at), at)
            self.fade(row, i, self.found, self.total)

    def fade(self, row: Expr, i: Expr, found: tirx.Buffer, total: tirx.Buffer) -> None:
        """Read of row i, which is in `state`, what a token needs; then it fades into the block."""
        tokens, head, vectors = self.tokens, self.head, self.vectors
        for at in vectors.columns:
            if self.shape.removal:
                vectors.add(found, tokens.removal[0][row, head, i], self.row(at), at)
            if self.shape.bonus:
                vectors.add(total, tokens.query(row, head, i), self.row(at), at)
            faded = self.row(at) * vectors.splat(tokens.kept(row, head, i))
            vectors.put(self.state, faded, at)
            if self.shape.strength:
                vectors.add(found, tokens.key(row, head, i), self.row(at), at)
            vectors.put(self.block, self.row(at), i * vectors.width + at)

    def prepare(self, row: Expr) -> None:
        """What a token's key gets, and with a bonus its output."""
        tokens, head, vectors = self.tokens, self.head, self.vectors
        for at in vectors.columns:
            loaded = tokens.v.vload(
                [row, head, self.first + at], vector(self.shape.dtype, vectors.lanes)
            )
            value = to_float32(loaded, vectors.lanes)
            if tokens.strength is not None:
                strength = vectors.splat(tokens.strength[row, head])
                value = (value - vectors.get(self.found, at)) * strength
            vectors.put(self.added, value, at)
        if tokens.bonus is None:
            vectors.zero(self.total)
            return
        lanes = math.gcd(self.shape.key_dim, 16)
        products, group = scratch(lanes, "float32"), head // self.shape.share
        weight = scratch(1, "float32")
        T.buffer_store(products, splat(0.0, lanes), [span(0, lanes)])
        with T.serial(self.shape.key_dim // lanes) as i:
            dtype, at = vector(self.shape.dtype, lanes), i * lanes
            q, k = (
                to_float32(x.vload([row, group, at], dtype), lanes) for x in (tokens.q, tokens.k)
            )
            weighted = q * tokens.bonus.vload([head, at], vector("float32", lanes))
            before = products.vload([0], vector("float32", lanes))
            T.buffer_store(products, multiply_add(weighted, k, before), [span(0, lanes)])
        total = sum_of(products.vload([0], vector("float32", lanes)), lanes)
        T.buffer_store(weight, total, [0])
        for at in vectors.columns:
            vectors.add(self.total, weight[0], vectors.get(self.added, at), at)

    def update(self, row: Expr, i: Expr) -> None:
        """Row i of the block, with what a token adds to it, into `state`; read for its output."""
        tokens, head, vectors = self.tokens, self.head, self.vectors
        for at in vectors.columns:
            value = vectors.get(self.block, i * vectors.width + at)
            if self.shape.removal:
                factor = vectors.splat(tokens.removal[1][row, head, i])
                value = multiply_add(factor, vectors.get(self.found, at), value)
            factor = vectors.splat(tokens.key(row, head, i))
            vectors.put(self.state, multiply_add(factor, vectors.get(self.added, at), value), at)
            if not self.shape.bonus:
                vectors.add(self.total, tokens.query(row, head, i), self.row(at), at)

    def row(self, at: int) -> Expr:
        return self.vectors.get(self.state, at)

    def write_output(self, row: Expr) -> None:
        for at in self.vectors.columns:
            dtype = vector(self.shape.dtype, self.vectors.lanes)
            result = T.cast(self.vectors.get(self.total, at), dtype)
            place = [row, self.head, span(self.first + at, self.vectors.lanes)]
            T.buffer_store(self.tokens.out, result, place)


def fetch_token(tokens: Tokens, row: Expr, head: Expr, first: Expr, width: int) -> None:
    """Emit requests for what a token brings: its rows are far from those of the one before it."""
    shape = tokens.shape
    keys = [tokens.decay, *tokens.removal] if shape.decay_per_key else tokens.removal
    whole = [(tokens.q, head // shape.share), (tokens.k, head // shape.share)]
    spans = [(buffer, at, 0, shape.key_dim) for buffer, at in whole]
    spans += [(buffer, head, 0, shape.key_dim) for buffer in keys]
    spans += [(buffer, head, first, width) for buffer in (tokens.v, tokens.out)]
    for buffer, index, start, size in spans:
        for at in range(0, size, LINE * 8 // tvm.DataType(str(buffer.dtype)).bits):
            prefetch(T.address_of(buffer[row, index, start + at]))


def block_vectors(shape: ScanShape, unit: VectorUnit, most: int) -> _Vectors:
    """The widest rows of a block that fit, of at most so many vectors."""
    lanes = math.gcd(shape.value_dim, unit.lanes)
    most = min(most, BLOCK_BYTES // (4 * lanes * shape.key_dim))
    whole = shape.value_dim // lanes
    return _Vectors(lanes, max(c for c in (1, 2, 4) if c == 1 or (c <= most and whole % c == 0)))


@functools.cache  # every layer asks
def scan_kernel(shape: ScanShape, unit: VectorUnit) -> tirx.PrimFunc:
    """(q, k, v, decay, (a, b)?, strength?, bonus?, *state slots, out [n, heads, V]).

    Tensors are those of the operator; a slot of the state is [heads, K, V], written in place.
    """
    # More hide what an instruction takes; fewer need less of the first-level cache.
    many, few = (block_vectors(shape, unit, c) for c in (4 if unit.registers == 32 else 2, 2))

    def body() -> None:
        tokens = Tokens.declare(shape)
        slots = tokens.slots
        longest = scratch(1, "int64")
        T.buffer_store(longest, T.int64(0), [0])
        with T.serial(slots.batch) as sequence:
            T.buffer_store(longest, T.max(longest[0], slots.rows(sequence)), [0])
        with T.If(longest[0] > 1):
            with T.Then():
                prompts(tokens)
            with T.Else():
                single_tokens(tokens)

    def prompts(tokens: Tokens) -> None:
        slots, blocks = tokens.slots, shape.value_dim // many.width
        # Sequences are innermost: however different their lengths, threads get the same of each.
        with T.parallel(shape.heads * blocks * slots.batch) as task:
            sequence, part = task % slots.batch, task // slots.batch
            with T.If(slots.rows(sequence) > 0), T.Then():
                first = part % blocks * many.width
                _Task(tokens, many, sequence, part // blocks, first).run()

    def single_tokens(tokens: Tokens) -> None:
        slots, blocks = tokens.slots, shape.value_dim // few.width
        tasks = slots.batch * shape.heads * blocks

        def place(task: Expr) -> tuple[Expr, Expr, Expr]:
            part = task % (shape.heads * blocks)
            return task // (shape.heads * blocks), part // blocks, part % blocks * few.width

        def fetch_block(task: Expr, i: Expr) -> None:
            sequence, head, first = place(task)
            for at in range(0, few.width, LINE // 4):
                fetch(T.address_of(slots.state[slots.source(sequence), head, i, first + at]))

        with T.parallel(tasks) as task, T.If(slots.rows(place(task)[0]) > 0), T.Then():
            following = T.min(task + 1, tasks - 1)
            _Task(tokens, few, *place(task)).run(lambda i: fetch_block(following, i))

    lanes = math.gcd(shape.key_dim, 16)
    return emit(body, [reduce_sum_ir(lanes)] if shape.bonus and lanes > 1 else [])
