"""How far a library's results are from a reference: logits, and the residual stream by layer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from typing_extensions import Self

# Rows of logits are compared in blocks of about this many values: they are widened to float64.
_BLOCK_VALUES = 1 << 21


@dataclass(frozen=True)
class Distance:
    """Rows of numbers against a reference; distances of several prompts add up.

    `row_errors` has each row's largest |error|.
    """

    rows: int = 0
    values: int = 0
    max_error: float = 0.0
    error_sum: float = 0.0
    deviation_squares: float = 0.0
    row_errors: tuple[float, ...] = ()

    def __add__(self, other: Self) -> Self:
        return type(self)(
            **{
                field.name: _join(field.name, getattr(self, field.name), getattr(other, field.name))
                for field in fields(self)
            }
        )

    @property
    def mean_error(self) -> float:
        """Mean |error| of a number."""
        return self.error_sum / max(1, self.values)

    @property
    def spread(self) -> float:
        """Standard deviation of the reference's numbers within a row, the measure of errors."""
        return math.sqrt(self.deviation_squares / max(1, self.values))

    @property
    def relative_error(self) -> float:
        """The largest |error| as a share of `spread`."""
        return self._relative(self.max_error)

    def relative_error_but(self, share: float) -> float:
        """The same without that share of the rows, those with the largest errors."""
        ignored = int(share * len(self.row_errors))
        if not ignored:
            return self.relative_error
        return self._relative(sorted(self.row_errors)[-1 - ignored])

    def rows_beyond(self, relative_error: float) -> int:
        """How many rows have an error larger than that, as a share of `spread`."""
        return sum(not self._relative(error) <= relative_error for error in self.row_errors)

    def _relative(self, error: float) -> float:
        if error == 0:
            return 0.0
        return error / self.spread if self.spread else math.inf


def _join(name: str, ours: Any, theirs: Any) -> Any:
    if "max" in name:
        return max(ours, theirs)
    return min(ours, theirs) if "min" in name else ours + theirs


@dataclass(frozen=True)
class LogitDistance(Distance):
    """Of logits.

    `targets` counts the rows whose next token is known. KL is KL(reference || library) of the next
    token's distribution, NLL the negative log likelihood of the text; sums are in nats.
    """

    targets: int = 0
    kl_sum: float = 0.0
    kl_max: float = 0.0
    agreeing: int = 0
    nll_reference_sum: float = 0.0
    nll_library_sum: float = 0.0

    @property
    def kl_mean(self) -> float:
        """In nats per token."""
        return self.kl_sum / max(1, self.rows)

    @property
    def top1(self) -> float:
        """Share of the rows in which both prefer the same token."""
        return self.agreeing / max(1, self.rows)

    @property
    def nll_reference(self) -> float:
        """Nats per token of text; NaN if no prompt has two tokens."""
        return self.nll_reference_sum / self.targets if self.targets else math.nan

    @property
    def nll_library(self) -> float:
        """Nats per token of text; NaN if no prompt has two tokens."""
        return self.nll_library_sum / self.targets if self.targets else math.nan


@dataclass(frozen=True)
class VectorDistance(Distance):
    """Of the states of tokens, and the vectors that texts become of them.

    `vectors` counts those; 1 - cosine is between a text's vector and the reference's.
    """

    vectors: int = 0
    cosine_distance_max: float = 0.0
    cosine_distance_sum: float = 0.0

    @property
    def cosine(self) -> float:
        """The smallest of all texts."""
        return 1 - self.cosine_distance_max


def compare_vectors(
    reference: np.ndarray, library: np.ndarray, pool: Callable[[np.ndarray], np.ndarray]
) -> VectorDistance:
    """Compare the states of one text.

    Args:
        reference, library: [n, hidden] float32.
        pool: makes the text's vector [hidden] of them.

    Returns:
        Errors and 1 - cosine are infinite if states are not finite.
    """
    if not (np.isfinite(library).all() and np.isfinite(reference).all()):
        return VectorDistance(
            rows=len(reference),
            values=reference.size,
            max_error=math.inf,
            error_sum=math.inf,
            row_errors=(math.inf,) * len(reference),
            vectors=1,
            cosine_distance_max=math.inf,
            cosine_distance_sum=math.inf,
        )
    exact, ours = reference.astype(np.float64), library.astype(np.float64)
    a, b = (pool(states).astype(np.float64) for states in (exact, ours))
    # Half the squared distance of unit vectors: exact where the cosine rounds to 1.
    far = 0.5 * float(np.square(a / np.linalg.norm(a) - b / np.linalg.norm(b)).sum())
    error = np.abs(ours - exact)
    return VectorDistance(
        rows=len(exact),
        values=exact.size,
        max_error=float(error.max()),
        error_sum=float(error.sum()),
        deviation_squares=_deviation_squares(exact),
        row_errors=tuple(error.max(-1).tolist()),
        vectors=1,
        cosine_distance_max=far,
        cosine_distance_sum=far,
    )


def compare_logits(reference: np.ndarray, library: np.ndarray, ids: Sequence[int]) -> LogitDistance:
    """Compare the logits of one text.

    Args:
        reference, library: [n, vocab] float32.
        ids: [n] the tokens; row i predicts ids[i + 1].

    Returns:
        Errors and KL are infinite if logits are not finite.
    """
    n, vocab = reference.shape
    step = max(1, _BLOCK_VALUES // vocab)
    total = LogitDistance()
    for start in range(0, n, step):
        rows = slice(start, start + step)
        targets = np.asarray(ids[start + 1 : start + 1 + step], np.int64)
        total += _compare_rows(reference[rows], library[rows], targets)
    return total


def _compare_rows(reference: np.ndarray, library: np.ndarray, targets: np.ndarray) -> LogitDistance:
    if not (np.isfinite(library).all() and np.isfinite(reference).all()):
        return LogitDistance(
            rows=len(reference),
            values=reference.size,
            max_error=math.inf,
            error_sum=math.inf,
            row_errors=(math.inf,) * len(reference),
            kl_sum=math.inf,
            kl_max=math.inf,
        )
    exact = reference.astype(np.float64)
    ours = library.astype(np.float64)
    error = np.abs(ours - exact)
    log_p, log_q = _log_softmax(exact), _log_softmax(ours)
    # Rounding can make the sum slightly negative where both are the same.
    kl = np.maximum(0.0, (np.exp(log_p) * (log_p - log_q)).sum(-1))
    known = np.arange(len(targets))
    return LogitDistance(
        rows=len(exact),
        values=exact.size,
        targets=len(targets),
        max_error=float(error.max()),
        error_sum=float(error.sum()),
        deviation_squares=_deviation_squares(exact),
        row_errors=tuple(error.max(-1).tolist()),
        kl_sum=float(kl.sum()),
        kl_max=float(kl.max()),
        agreeing=int((exact.argmax(-1) == ours.argmax(-1)).sum()),
        nll_reference_sum=-float(log_p[known, targets].sum()),
        nll_library_sum=-float(log_q[known, targets].sum()),
    )


def _deviation_squares(logits: np.ndarray) -> float:
    return float(np.square(logits - logits.mean(-1, keepdims=True)).sum())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def layer_error(reference: np.ndarray, library: np.ndarray, ignored: float = 0.0) -> float:
    """The largest relative error of a token's vector: ||library - reference|| / ||reference||.

    The worst token counts, not the whole: a few tokens of real models have vectors hundreds of
    times as long as the others' and would hide what happens to those.

    Args:
        reference, library: [n, hidden] float32.
        ignored: a share of the tokens that does not count, of those with the largest errors.
    """
    if not (np.isfinite(library).all() and np.isfinite(reference).all()):
        return math.inf
    exact = reference.astype(np.float64)
    distance = np.linalg.norm(library - exact, axis=-1)
    length = np.linalg.norm(exact, axis=-1)
    errors = np.sort(distance / np.maximum(length, 1e-30))
    return float(errors[-1 - int(ignored * len(errors))])
