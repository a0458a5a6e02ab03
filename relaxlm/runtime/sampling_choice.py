"""Steps 3 to 7 of sampling for one row: fast, and yet the token that float64 arithmetic gives.

Two things take time in a vocabulary of 150 000, and both are avoided where that cannot matter:

- Sorting. The maxima of a few thousand columns of the row give a bound that at least k logits
  reach; the k largest ones are among the few that reach it.
- Float64. Sums of weights are first taken in float32. Their error has a bound, `ROUGH`; if the
  answer (where the nucleus ends, which token the random number hits) is not the same everywhere
  within it, the sums are taken again in float64.

The bound. Let x = (logit - largest) / temperature <= 0 and w = exp(x). In float32 the difference,
the inverse temperature and the product are each rounded (together 3 * 2**-24 of |x|), and exp is
right to 4 units in the last place (4 * 2**-23 of w; NumPy states 2.52 for its own code). So the sum
S of all w is off by at most 1.8e-7 * sum(w * |x|) + 4.8e-7 * S. With p = w / S, sum(p * |x|) =
entropy(p) - log(S) <= log(vocab), which is below 14 up to a million tokens: together 3.0e-6 * S.
Adding up 8 * 16 numbers one by one and these sums in pairs, as NumPy does, is off by 34 * 2**-24 at
most: 2.1e-6. Weights below float32's range count as 0: 2**-126 each.
"""

import math
import threading
from bisect import bisect_left, bisect_right
from itertools import accumulate

import numpy as np

from relaxlm.runtime.generation import GenerationConfig
from relaxlm.runtime.peaks import ids_from, largest_ids
from relaxlm.runtime.peaks import largest as largest_by_peaks

# Relative error of sums of float32 weights.
ROUGH = 6e-6
# Shorter rows are computed in float64 at once.
_SHORT = 4096
# Float32 holds these temperatures and their inverses, and up to so many times the temperature it
# tells logits apart whose weights are of one magnitude.
_HOTTEST = 1e30
_LARGEST = 1e7
# The part of all weights beyond which float64 comes first; and the sample that tells.
_UNCLEAR = 0.4
_EVERY = 64
_LARGEST_FLOAT32 = np.finfo(np.float32).max
# Rows of the table whose columns' maxima bound the largest logits.
_COLUMN = 64
# Up to so many of the largest logits are handled as Python's numbers.
_LISTED = 128
# So many logits are sorted; more than that go into so many bins first.
_SORTED = 4096
_BINS = 4096
# Sums of so many weights are kept.
_BLOCK = 256

# Temporaries of a vocabulary's size are kept from call to call: the kernel's page faults for fresh
# memory take longer than the arithmetic on it.
_memory = threading.local()


def buffer(name: str, size: int, dtype: type = np.float64) -> np.ndarray:
    """[size] of this thread's own memory, with whatever was last written there."""
    kept = getattr(_memory, name, None)
    if kept is None or len(kept) < size:
        kept = np.empty(size, dtype)
        setattr(_memory, name, kept)
    return kept[:size]


class Logits:
    """One row after bias and penalties, for which only few logits differ from float32's.

    Args:
        rounded: [vocab] float32, the largest finite or +inf (a rounded one).
        ids, values: [k] int64 and [k] float64: where `rounded` is not exact, and what is. An id
            that is there twice has the same value twice.
        peaks: [blocks] float32 of `rounded` (`peaks.py`), where they are known.
    """

    def __init__(
        self,
        rounded: np.ndarray,
        ids: np.ndarray | None = None,
        values: np.ndarray | None = None,
        peaks: np.ndarray | None = None,
    ) -> None:
        self.rounded, self.peaks, self._ids, self._values = rounded, peaks, ids, values

    def __len__(self) -> int:
        return len(self.rounded)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """[len(ids)] exact: float64, or float32 where that is exact."""
        if self._ids is None:
            return self.rounded[ids]
        table = buffer("exact", len(self))  # only what is read is written
        table[ids] = self.rounded[ids]
        table[self._ids] = self._values
        return table[ids]

    def largest(self) -> int:
        """The lowest id of the largest logit."""
        if self._ids is None and self.peaks is not None:
            return largest_by_peaks(self.rounded, self.peaks)
        best = int(self.rounded.argmax())
        if self._ids is None:
            return best
        # Rounding keeps the order, but not what ties.
        ids = np.flatnonzero(self.rounded == self.rounded[best])
        return int(ids[self.of(ids).argmax()])

    def weights(self, temperature: float, exact: bool) -> tuple[np.ndarray, float, float]:
        """Probabilities times a constant, good until the next call.

        Returns:
            weights: [vocab] float64 if `exact` or if float32 will not do, else float32.
            reference: the logit whose weight is 1, close to the largest.
            error: the relative error of the weights' sums; 0 for float64.
        """
        if not exact:
            reference = float((self.rounded if self.peaks is None else self.peaks).max())
            if self._is_peaked(reference, temperature):
                return self._rough_weights(reference, temperature), reference, ROUGH
        values = buffer("weights", len(self))
        values[:] = self.rounded
        if self._ids is not None:
            values[self._ids] = self._values
        reference = float(values.max())
        return weigh(values, reference, temperature, out=values), reference, 0.0

    def _is_peaked(self, reference: float, temperature: float) -> bool:
        """Whether float32 will do, and is likely to be enough."""
        if len(self) <= _SHORT or not is_float32_enough(reference, temperature):
            return False
        # Tokens that weigh less than the error cannot be told apart. How much is theirs?
        part = weigh(self.rounded[::_EVERY], reference, temperature)
        total = 1 + _EVERY * float(part.sum())
        unclear = _EVERY * float(np.minimum(part, 2 * ROUGH * total).sum())
        return unclear < _UNCLEAR * total

    def _rough_weights(self, reference: float, temperature: float) -> np.ndarray:
        weights = buffer("rough", len(self), np.float32)
        np.subtract(self.rounded, np.float32(reference), out=weights)
        if temperature != 1:
            weights *= np.float32(1 / temperature)
        np.exp(weights, out=weights)
        if self._ids is not None:
            assert self._values is not None
            weights[self._ids] = weigh(self._values, reference, temperature)
        return weights


def is_float32_enough(reference: float, temperature: float) -> bool:
    """Whether `ROUGH` bounds the error of float32 weights relative to a logit."""
    if not 1 / _HOTTEST < temperature < _HOTTEST:
        return False
    return abs(reference) <= _LARGEST * temperature


def weigh(
    values: np.ndarray, reference: float, temperature: float, out: np.ndarray | None = None
) -> np.ndarray:
    """exp((values - reference) / temperature), float64."""
    weights = np.subtract(values, reference, out=out, dtype=np.float64)
    if 1 / _HOTTEST < temperature < _HOTTEST:
        if temperature != 1:
            weights *= 1 / temperature  # three times as fast as dividing
    else:
        weights /= temperature
    return np.exp(weights, out=weights)


def choose(logits: Logits, config: GenerationConfig, uniform: float) -> int:
    """Steps 3 to 7; the temperature is above 0. Overflow and underflow are right here."""
    values: np.ndarray | None = None
    if 0 < config.top_k < len(logits):
        if config.top_k <= _LISTED:
            candidates = _candidates(logits, config.top_k)
            if len(candidates) <= 2 * _LISTED:
                return _choose_from_few(candidates, logits.of(candidates), config, uniform)
        ids, values = most_probable(logits, config.top_k)
    if config.top_p < 1:
        if values is None:
            ids, values = _nucleus(logits, config.top_p, config.temperature)
        else:
            kept = _nucleus_of_few(values, config.top_p, config.temperature)
            ids, values = ids[kept], values[kept]
    if values is None and config.min_p > 0:
        ids, values = _near_the_largest(logits, config.min_p, config.temperature)
    if values is None:
        return _draw_from_all(logits, config.temperature, uniform)
    return draw_weighted(ids, values, config, uniform)


def draw_weighted(
    ids: np.ndarray, values: np.ndarray, config: GenerationConfig, uniform: float
) -> int:
    """Steps 6 and 7 for the logits that are left, whose ids ascend."""
    weights = weigh(values, values.max(), config.temperature)
    if config.min_p > 0:
        kept = np.flatnonzero(weights >= config.min_p)  # the largest weight is 1
        ids, weights = ids[kept], weights[kept]
    return int(ids[_draw(weights, uniform)])


def _choose_from_few(
    ids: np.ndarray, values: np.ndarray, config: GenerationConfig, uniform: float
) -> int:
    """Steps 3 to 7 for the logits of a few ids, ascending, the `top_k` largest among them.

    In plain Python: after a step of the model, NumPy's code for a dozen operations is not in the
    processor's caches, and fetching it takes longer than this.
    """
    names, numbers = ids.tolist(), values.tolist()
    order = sorted(range(len(names)), key=numbers.__getitem__, reverse=True)[: config.top_k]
    largest, temperature = numbers[order[0]], config.temperature
    weights = [math.exp((numbers[place] - largest) / temperature) for place in order]
    count = len(order)
    if config.top_p < 1:
        sums = list(accumulate(weights))
        count = min(bisect_left(sums, config.top_p * sums[-1]) + 1, count)
    if config.min_p > 0:
        count = min(count, sum(weight >= config.min_p for weight in weights))
    kept = sorted(zip(order[:count], weights, strict=False))
    sums = list(accumulate(weight for _, weight in kept))
    place = bisect_right(sums, uniform * sums[-1])
    if place == len(sums):  # the product was rounded up
        place = bisect_left(sums, sums[-1])
    return names[kept[place][0]]


def most_probable(logits: Logits, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids, ascending, and logits of the `count` largest; of equal ones the lower ids.

    Fewer if fewer are above -inf.
    """
    ids = _candidates(logits, count)
    values = logits.of(ids)
    if len(ids) > count:
        place = len(ids) - count
        kept = _down_to(values, np.partition(values, place)[place], count)
        ids, values = ids[kept], values[kept]
    return ids, values


def _candidates(logits: Logits, count: int) -> np.ndarray:
    """Ids, ascending, of logits above -inf; the `count` largest are among them."""
    rounded = logits.rounded
    if logits.peaks is not None:
        found = largest_ids(rounded, logits.peaks, count)
        if found is not None:
            return found
    columns = len(rounded) // _COLUMN
    if count <= columns:  # each column has a logit that reaches its maximum
        table = rounded[: columns * _COLUMN].reshape(_COLUMN, columns)
        maxima, place = table.max(0), columns - count
    else:
        maxima, place = rounded, max(0, len(rounded) - count)
    bound = np.partition(maxima, place)[place]
    return np.flatnonzero(rounded >= bound if bound > -np.inf else rounded > bound)


def _down_to(values: np.ndarray, last: np.floating, count: int) -> np.ndarray:
    """Places of the `count` largest values, ascending, given the smallest of them."""
    chosen = values > last
    ties = np.flatnonzero(values == last)
    chosen[ties[: count - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)


def _nucleus_of_few(values: np.ndarray, top_p: float, temperature: float) -> np.ndarray:
    """Places, ascending, of the fewest largest values whose weights reach `top_p` of the sum."""
    ordered = np.sort(values)[::-1]
    sums = np.cumsum(weigh(ordered, float(ordered[0]), temperature))
    place = min(int(np.searchsorted(sums, top_p * sums[-1])), len(sums) - 1)
    return _down_to(values, ordered[place], place + 1)


def _nucleus(logits: Logits, top_p: float, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Ids, ascending, and logits of the fewest largest whose weights reach `top_p` of the sum.

    Only the logits around the last of them are sorted. And sorting values is many times faster
    than sorting ids by value; it is enough, for it gives the smallest logit that stays.
    """
    for exact in (False, True):
        weights, reference, error = logits.weights(temperature, exact)
        total = float(weights.sum())
        target = top_p * total
        # All tokens below this weight together have less than half of what may be left out.
        lightest = 0.5 * (1 - top_p) * total / len(weights)
        heavy = weights >= lightest
        above, before = None, 0.0
        if np.count_nonzero(heavy) > _SORTED:
            bins = _bins(logits.rounded, temperature * -math.log(lightest))
            ends = np.cumsum(np.bincount(bins, weights))
            last_bin = min(int(np.searchsorted(ends, target)), len(ends) - 1)
            heavy = bins == last_bin
            if last_bin:
                above, before = bins < last_bin, float(ends[last_bin - 1])
        ids = np.flatnonzero(heavy)
        values = logits.of(ids)
        ordered = np.sort(values)[::-1]
        sums = np.cumsum(weigh(ordered, reference, temperature))
        sums += before
        slack = 2 * error * total  # the errors of `before` and of `target`
        first, place = np.searchsorted(sums, [target - slack, target + slack])
        if error == 0 or (
            first == place < len(sums) and (above is None or before < target - slack)
        ):
            break
    place = min(int(place), len(sums) - 1)  # a rounding error may lead past the end
    kept = kept_of_nucleus(values, ordered, place)
    if above is None:
        return ids[kept], values[kept]
    above[ids[kept]] = True
    ids = np.flatnonzero(above)
    return ids, logits.of(ids)


def kept_of_nucleus(values: np.ndarray, ordered: np.ndarray, place: int) -> np.ndarray:
    """Places, ascending, of the values down to `ordered[place]`, which are sorted in descending
    order; of equal ones the first."""
    return _down_to(values, ordered[place], place + 1)


def _bins(rounded: np.ndarray, distance: float) -> np.ndarray:
    """For each logit a number, 0 for the largest and more for smaller ones, `_BINS` beyond
    `distance` from the largest. Of two logits the larger one never has the larger number.
    """
    scale = min(max(_BINS / distance, 1 / _HOTTEST), _HOTTEST)
    places = buffer("bins", len(rounded), np.float32)
    np.subtract(min(rounded.max(), _LARGEST_FLOAT32), rounded, out=places)
    places *= np.float32(scale)
    return np.clip(places, 0, _BINS, out=places).astype(np.intp)


def _near_the_largest(
    logits: Logits, min_p: float, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Ids, ascending, and logits of all tokens of at least `min_p` times the largest weight.

    And perhaps of some that rounding errors let pass.
    """
    largest = float(logits.of(np.array([logits.largest()]))[0])
    bound = bound_near(largest, min_p, temperature)
    if logits.peaks is not None:
        ids = ids_from(logits.rounded, logits.peaks, bound)
    else:
        ids = np.flatnonzero(logits.rounded >= bound)
    return ids, logits.of(ids)


def bound_near(largest: float, min_p: float, temperature: float) -> np.float32:
    """What tokens of at least `min_p` times the largest weight reach, rounding errors included."""
    distance = temperature * (-math.log(min_p) + 1e-15)  # exp of less is 1
    return np.float32(largest - distance - 1e-6 * (abs(largest) + distance))


def _draw(weights: np.ndarray, uniform: float) -> int:
    """The first place with which the weights sum to more than that part of their sum."""
    sums = np.cumsum(weights)
    place = int(np.searchsorted(sums, uniform * sums[-1], side="right"))
    if place == len(sums):  # the product was rounded up
        place = int(np.searchsorted(sums, sums[-1], side="left"))
    return place


def _draw_from_all(logits: Logits, temperature: float, uniform: float) -> int:
    """The same for all tokens, with sums of blocks first: one of them is looked into."""
    for exact in (False, True):
        weights, _, error = logits.weights(temperature, exact)
        blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK))
        ends = np.cumsum(blocks, dtype=np.float64)
        total = float(ends[-1])
        target = min(uniform * total, math.nextafter(total, 0))
        block = int(np.searchsorted(ends, target, side="right"))
        before = float(ends[block - 1]) if block else 0.0
        first = block * _BLOCK
        sums = np.cumsum(weights[first : first + _BLOCK], dtype=np.float64)
        sums += before
        place = int(np.searchsorted(sums, target, side="right"))
        if error == 0:
            break
        lower = float(sums[place - 1]) if place else before
        if place < len(sums) and lower + error * total < target < sums[place] - error * total:
            break
    if place == len(sums):  # the block's sum was rounded up
        place = int(np.searchsorted(sums, sums[-1], side="left"))
    return first + place
