"""Runs in another machine's Python: steps of a library on a folder's weights, without a compiler.

python runtime_step.py LIBRARY FOLDER OUT.npz: one prompt in two chunks, then a token. Of a library
with several versions, the environment says which.
"""

import sys
from pathlib import Path

import numpy as np

from relaxlm.runtime.executor import Executor
from relaxlm.runtime.library import Library
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.params import WeightFolder
from relaxlm.runtime.sequence_table import PagedSequences

IDS = np.arange(3, 3 + 41, dtype=np.int32) * 7 % 299
CHUNKS = (24, 16, 1)


def logits(library: Path, folder: Path) -> np.ndarray:
    """The logits behind each chunk, [3, vocab] float32."""
    executor = Executor(Library.load(library), WeightFolder(folder), pages=8)
    sequences = PagedSequences(PagePool(8), 16)
    seq, rows, done = sequences.add(), [], 0
    for count in CHUNKS:
        tables = sequences.batch([(seq, count)])
        last = np.array([count - 1], np.int32)
        step = executor.compute(tables, IDS[done : done + count], last)
        rows.append(step.all().copy())
        peaks = step.peaks()
        assert peaks is not None and peaks.max() == rows[-1].max()
        done += count
    return np.concatenate(rows)


if __name__ == "__main__":
    version = Library.load(sys.argv[1]).metadata.target.arch[0]
    np.savez(sys.argv[3], logits=logits(Path(sys.argv[1]), Path(sys.argv[2])), version=version)
    compilers = [name for name in sys.modules if name.startswith(("tvm.", "relaxlm.compiler"))]
    assert not compilers, compilers
