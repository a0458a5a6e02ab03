"""The largest logits of a row, found without looking at all of them.

To look at 150 000 logits on one core, after a step has streamed the weights through its caches,
takes longer than all else that choosing a token takes. So the library looks, on all cores, while
the logits are in the caches: its function `peaks` returns the largest of every `BLOCK` neighbours,
NaN where one of them is NaN. A row's largest logit is then in the block with the largest peak, and
its k largest are in blocks whose peaks reach the k-th largest peak.
"""

import numpy as np

BLOCK = 256


def of_row(peaks: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Those of a row's first logits, if the rest is padding.

    Args:
        peaks: [blocks] float32, of the whole row.
        row: [vocab] float32, without padding.
    """
    whole, rest = divmod(len(row), BLOCK)
    if not rest:
        return peaks[:whole]
    found = peaks[: whole + 1].copy()
    found[whole] = row[whole * BLOCK :].max()  # NaN if there is one
    return found


def largest(row: np.ndarray, peaks: np.ndarray) -> int:
    """The lowest id of the largest logit, or the first NaN, as `row.argmax()`."""
    first = int(peaks.argmax()) * BLOCK
    return first + int(row[first : first + BLOCK].argmax())


def largest_ids(row: np.ndarray, peaks: np.ndarray, count: int) -> np.ndarray | None:
    """Ids, ascending, of logits above -inf; the `count` largest are among them.

    None where so many blocks would have to be looked into that all may be.
    """
    bound = _bound_of_largest(peaks, count)
    return None if bound is None else ids_from(row, peaks, bound)


def blocks_of_largest(peaks: np.ndarray, count: int) -> np.ndarray | None:
    """The blocks that `largest_ids` looks into; None: perhaps all."""
    bound = _bound_of_largest(peaks, count)
    return None if bound is None else np.flatnonzero(peaks >= bound)


def _bound_of_largest(peaks: np.ndarray, count: int) -> np.float32 | None:
    """What at least `count` logits of a row reach; None where that does not help."""
    if 8 * count > len(peaks):
        return None
    place = len(peaks) - count
    bound = np.partition(peaks, place)[place]
    return None if bound == -np.inf else bound


def ids_from(row: np.ndarray, peaks: np.ndarray, bound: np.floating) -> np.ndarray:
    """Ids, ascending, of the logits that reach a bound; only their blocks are looked into."""
    whole = len(row) // BLOCK
    blocks = np.flatnonzero(peaks[:whole] >= bound)
    # Places within the chosen blocks, then in the row.
    places = np.flatnonzero(row[: whole * BLOCK].reshape(whole, BLOCK)[blocks] >= bound)
    ids = blocks[places // BLOCK] * BLOCK + places % BLOCK
    if len(peaks) > whole and peaks[whole] >= bound:
        last = np.flatnonzero(row[whole * BLOCK :] >= bound) + whole * BLOCK
        ids = np.concatenate([ids, last])
    return ids
