"""What the times of many requests amount to."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from relaxlm.profiling.columns import aligned
from relaxlm.profiling.serving_client import Exchange


@dataclass(frozen=True)
class Spread:
    """A distribution, in the unit of its values. Percentiles are interpolated linearly."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None if there are no values."""
        if not len(values):
            return None
        p50, p90, p99 = (float(v) for v in np.percentile(values, (50, 90, 99)))
        return cls(float(np.mean(values)), p50, p90, p99, max(values))


@dataclass(frozen=True)
class Measured:
    """One load. Times are in seconds; all but `errors` is of requests that succeeded.

    Attributes:
        requests: that were sent.
        errors: what went wrong, and how often.
        seconds: from the first request until the last was answered.
        prompt_tokens, output_tokens: of all requests.
        cached_tokens: of the prompts, found in the server's prefix cache; None if it does not say.
        queued: in the server, before it began with a request; None if it does not say.
        first: from a request until the first piece of its reply.
        gaps: between one piece of text and the next.
        per_token: from the first piece to the reply's end, per token after the first.
        whole: from a request to its reply's end.
        fairness: Jain's index of the replies' tokens per second: 1 if all are equally fast, 1/n if
            one of n gets everything.
    """

    name: str
    requests: int
    errors: dict[str, int]
    seconds: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None
    queued: Spread | None
    first: Spread | None
    gaps: Spread | None
    per_token: Spread | None
    whole: Spread | None
    fairness: float | None

    @property
    def succeeded(self) -> int:
        return self.requests - sum(self.errors.values())

    @property
    def cached_share(self) -> float | None:
        """Of all prompts' tokens."""
        if self.cached_tokens is None or not self.prompt_tokens:
            return None
        return self.cached_tokens / self.prompt_tokens


def measure(name: str, made: Sequence[Exchange]) -> Measured:
    """Sum up the requests of one load, of which there is one at least."""
    good = [one for one in made if not one.error]
    cached = [one.cached_tokens for one in good if one.cached_tokens is not None]
    per_token = [time for one in good if (time := seconds_per_token(one)) is not None]
    return Measured(
        name,
        len(made),
        dict(Counter(one.error for one in made if one.error).most_common()),
        max(one.end for one in made) - min(one.start for one in made),
        sum(one.prompt_tokens for one in good),
        sum(one.output_tokens for one in good),
        sum(cached) if cached else None,
        Spread.of([one.queued for one in good if one.queued is not None]),
        Spread.of([one.pieces[0] - one.start for one in good if one.pieces]),
        Spread.of([gap for one in good for gap in gaps(one)]),
        Spread.of(per_token),
        Spread.of([one.end - one.start for one in good]),
        jain([1 / time for time in per_token if time > 0]),
    )


def gaps(one: Exchange) -> list[float]:
    return [after - before for before, after in zip(one.pieces, one.pieces[1:], strict=False)]


def seconds_per_token(one: Exchange) -> float | None:
    """Of decoding: after the first piece; None for replies of one.

    The last token often gives no piece, for it ends the reply.
    """
    if len(one.pieces) < 2 or one.output_tokens < 2:
        return None
    return (one.end - one.pieces[0]) / (one.output_tokens - 1)


def jain(values: Sequence[float]) -> float | None:
    """Jain's fairness index (Jain, Chiu, Hawe, 1984): (sum x)² / (n · sum x²)."""
    if not values:
        return None
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def tables(found: Sequence[Measured]) -> list[str]:
    """Two tables as text: what the server did in all, and what its clients saw."""
    rows = [["", "requests/s", "tok/s in", "tok/s out", "from cache", "fairness", "errors"]]
    for one in found:
        speeds = (one.succeeded, one.prompt_tokens, one.output_tokens)
        rows.append(
            [
                one.name,
                f"{speeds[0] / one.seconds:.2f}",
                *(f"{count / one.seconds:.1f}" for count in speeds[1:]),
                "" if one.cached_share is None else f"{one.cached_share:.0%}",
                "" if one.fairness is None else f"{one.fairness:.3f}",
                str(sum(one.errors.values())),
            ]
        )
    lines = [*aligned(rows), ""]
    rows = [["ms", "", "mean", "p50", "p90", "p99", "max"]]
    for one in found:
        for title, spread in _spreads(one):
            if spread is not None:
                values = (spread.mean, spread.p50, spread.p90, spread.p99, spread.max)
                rows.append([one.name, title, *(f"{value * 1e3:.1f}" for value in values)])
    lines += aligned(rows, left=2)
    for one in found:
        lines += [f"{one.name}: {count} x {error}" for error, count in one.errors.items()]
    return lines


def _spreads(one: Measured) -> list[tuple[str, Spread | None]]:
    return [
        ("in queue", one.queued),
        ("first token", one.first),
        ("between tokens", one.gaps),
        ("per token", one.per_token),
        ("whole reply", one.whole),
    ]
