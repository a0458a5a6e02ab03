"""Steps of several sequences in a driver, and what the same steps give on this machine's CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relaxlm.runtime.executor import Executor
from relaxlm.runtime.library import Library
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.params import WeightFolder
from relaxlm.runtime.sequence_table import PagedSequences

PAGES = 16
# In Node.js; `input` has folder and library.
LOAD = """
import { ChatModule, DiskFiles } from "./index.js";
const open = (more) => ChatModule.load({
  model: new DiskFiles(input.folder),
  library: new Uint8Array(readFileSync(input.library)),
  ...more,
});
"""
# A function of a ChatModule and of steps as `on_cpu` gives them: the logits of each step.
RUN_STEPS = """
async ({ executor, sequences }, steps) => {
  sequences.add();
  sequences.add();
  const found = [];
  for (const { counts, ids } of steps) {
    const tables = sequences.batch(counts);
    const last = tables.rowOffsets.slice(1).map((end) => end - 1);
    found.push(Array.from(await executor.forward(tables, ids, last)));
  }
  return found;
}
"""


def on_cpu(
    folder: Path, library: Path, counts: Sequence[Sequence[Sequence[int]]]
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Steps of random tokens, and the logits of each sequence's last one.

    Args:
        counts: per step (sequence 0 or 1, new tokens) of each that takes part.
    """
    rng = np.random.default_rng(0)
    loaded = Library.load(library)
    sequences = PagedSequences(PagePool(PAGES), loaded.metadata.kv_cache.page_size)
    executor = Executor(loaded, WeightFolder(folder), PAGES)
    assert [sequences.add(), sequences.add()] == [0, 1]
    steps, expected = [], []
    for step in counts:
        tables = sequences.batch([(seq, count) for seq, count in step])
        ids = rng.integers(0, loaded.metadata.vocab_size, int(tables.row_offsets[-1]), np.int32)
        expected.append(executor.forward(tables, ids, tables.row_offsets[1:] - 1).ravel())
        steps.append({"counts": step, "ids": ids.tolist()})
    return steps, expected
