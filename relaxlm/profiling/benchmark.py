"""Speeds of a model on this machine: prompts, decoding, several sequences at once."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from relaxlm.profiling.roofline import ReadLoop
from relaxlm.profiling.session import Session
from relaxlm.profiling.work import Work

# Steps whose mean is one value of decoding.
STEPS = 16
_BIG = 1 << 20  # bytes: smaller arrays don't matter to the read loop


@dataclass(frozen=True)
class Row:
    """One measurement: the median of its rounds.

    Attributes:
        kind: "prefill" (a prompt of `tokens`) or "decode" (one token for each of `batch` sequences
            that have `tokens` cached).
        seconds: of the prompt, or of one step.
        spread: (largest - smallest) / median of the rounds.
        tokens_per_second: all sequences together.
        operations_per_second: multiplications and additions of matrices and attention.
        bytes_per_second: of weights and cache, each read once; decoding only.
        share_of_read: the same, of what a loop that only reads the weights reached meanwhile; on
            CPUs, decoding only.
    """

    kind: str
    tokens: int
    batch: int
    seconds: float
    spread: float
    tokens_per_second: float
    operations_per_second: float
    bytes_per_second: float | None
    share_of_read: float | None


@dataclass(frozen=True)
class Benchmark:
    """What `run` found.

    Attributes:
        read_bytes_per_second: of the read loop, the median of all rounds; None on GPUs.
    """

    rows: list[Row]
    read_bytes_per_second: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run(
    session: Session,
    prompts: Sequence[int],
    decodes: Sequence[tuple[int, int]],
    rounds: int,
    progress: Callable[[str], None] = lambda text: None,
) -> Benchmark:
    """Measure in interleaved rounds, after one that does not count.

    Args:
        prompts: tokens of each.
        decodes: (context, batch) of each.

    Raises:
        ContextOverflowError: the library, or the session's cache, is too small for them.
    """
    info = session.executor.metadata
    work = Work.of(info)
    loop = None if session.executor.on_gpu else ReadLoop(_weights(session))
    cases = [("prefill", n, 1) for n in prompts] + [("decode", c, b) for c, b in decodes]
    seconds: list[list[float]] = [[] for _ in cases]
    read: list[list[float]] = [[] for _ in cases]
    for i, (kind, tokens, batch) in enumerate(cases):
        # Rounds of one case follow each other: another one would overwrite its cache.
        for round in range(rounds + 1):
            progress(f"{kind} {tokens}" + (f" x {batch}" if batch > 1 else ""))
            before = loop.run() if loop else None
            if kind == "prefill":
                taken = session.prefill(tokens)
            else:
                taken = session.decode(tokens, batch, STEPS)
            if round:
                seconds[i].append(taken)
                if loop and before:
                    read[i].append((before + loop.run()) / 2)
    rows = [
        _row(work, kind, tokens, batch, seconds[i], read[i])
        for i, (kind, tokens, batch) in enumerate(cases)
    ]
    speeds = [speed for values in read for speed in values]
    return Benchmark(rows, statistics.median(speeds) if speeds else None)


def _row(
    work: Work, kind: str, tokens: int, batch: int, seconds: list[float], read: list[float]
) -> Row:
    middle = statistics.median(seconds)
    spread = (max(seconds) - min(seconds)) / middle
    if kind == "prefill":
        operations = work.operations(tokens, 0, 1)
        return Row(
            kind, tokens, 1, middle, spread, tokens / middle, operations / middle, None, None
        )
    # The steps of a round come after one another: their mean context is a little longer.
    context = tokens + 1 + STEPS // 2
    operations = batch * work.operations(1, context, 1)
    speed = work.decode_bytes(context, batch) / middle
    share = speed / statistics.median(read) if read else None
    return Row(
        kind, tokens, batch, middle, spread, batch / middle, operations / middle, speed, share
    )


def _weights(session: Session) -> list[np.ndarray] | None:
    """Those that are worth reading, in the memory that the kernels read; None if all are small, or
    in no folder."""
    weights = session.weights
    if weights is None:
        return None
    big = [name for name, record in weights.records.items() if record.nbytes >= _BIG]
    return [weights.load(name) for name in big] or None
