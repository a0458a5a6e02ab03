"""An executor that is easy to predict: no model, and no TVM."""

import hashlib
from collections.abc import Sequence

import numpy as np

from relaxlm.runtime.metadata import Limits
from relaxlm.runtime.step_logits import StepLogits
from relaxlm.runtime.step_tables import BatchTables
from tests.tiny_model import TOKENS, VOCAB

PAGE, CHUNK, BATCH = 4, 8, 6


def logits_after(tokens: Sequence[int]) -> np.ndarray:
    """[vocab] float32, decided by all the tokens before; padding is most probable by far."""
    digest = hashlib.sha256(np.asarray(tokens, np.int64).tobytes()).digest()
    logits = np.random.default_rng(list(digest)).normal(0, 2, VOCAB).astype(np.float32)
    logits[TOKENS:] = 50
    return logits


class RememberingExecutor:
    """Keeps token ids in its pages, and answers by what the page tables show it."""

    window = sinks = 0
    vocab_size = VOCAB
    limits = Limits(
        context_window_size=1000,
        prefill_chunk_size=CHUNK,
        max_batch_size=BATCH,
        sliding_window_size=0,
        attention_sink_size=0,
    )

    def __init__(self, pages: int) -> None:
        self.pages = np.full((pages, PAGE), -1)
        self.steps: list[list[int]] = []  # tokens of each sequence

    def copy_pages(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self.pages[targets] = self.pages[sources]

    def forward(self, tables: BatchTables, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        self.steps.append(np.diff(tables.row_offsets).tolist())
        self.pages.reshape(-1)[tables.slots] = ids
        logits = []
        for row in rows:
            i = int(np.searchsorted(tables.row_offsets, row, side="right")) - 1
            logits.append(logits_after(self.remembered(tables, i, row)))
        return np.stack(logits)

    def remembered(self, tables: BatchTables, i: int, row: int) -> Sequence[int]:
        """The tokens that a row of sequence i sees: here, all of its pages, up to itself."""
        held = tables.page_ids[tables.page_offsets[i] : tables.page_offsets[i + 1]]
        seen = tables.positions[row] + 1 - tables.dropped[i]
        return self.pages[held].reshape(-1)[:seen].tolist()

    def compute(self, tables: BatchTables, ids: np.ndarray, rows: np.ndarray) -> StepLogits:
        return StepLogits(self.forward(tables, ids, rows))


class WindowedExecutor(RememberingExecutor):
    """Sees the first tokens and the last ones."""

    window, sinks = 6, 2

    def remembered(self, tables: BatchTables, i: int, row: int) -> Sequence[int]:
        tokens = super().remembered(tables, i, row)
        kept = -(-self.sinks // PAGE) * PAGE
        dropped = [-1] * tables.dropped[i]
        return visible([*tokens[:kept], *dropped, *tokens[kept:]], self.window, self.sinks)


def visible(tokens: Sequence[int], window: int, sinks: int) -> list[int]:
    """Those of the tokens that the last one sees."""
    last = len(tokens) - 1
    return [token for k, token in enumerate(tokens) if last - k < window or k < sinks]


class RecurrentExecutor(RememberingExecutor):
    """Remembers them in slots of a recurrent layer as well: a wrong slot is a wrong token."""

    def __init__(self, pages: int, slots: int) -> None:
        super().__init__(pages)
        self.slots: list[list[int]] = [[-1]] * slots

    def forward(self, tables: BatchTables, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        offsets, targets = tables.row_offsets.tolist(), tables.state_targets.tolist()
        self.offsets, self.states = offsets, []
        for i, source in enumerate(tables.state_sources.tolist()):
            # Sequences of a step run at the same time.
            assert source not in targets[:i] + targets[i + 1 :]
            before = self.slots[source] if tables.positions[offsets[i]] else []
            self.states.append([*before, *ids[offsets[i] : offsets[i + 1]].tolist()])
        for target, state in zip(targets, self.states, strict=True):
            self.slots[target] = state
        return super().forward(tables, ids, rows)

    def remembered(self, tables: BatchTables, i: int, row: int) -> Sequence[int]:
        state, seen = self.states[i], super().remembered(tables, i, row)
        tokens = state[: len(state) - (self.offsets[i + 1] - 1 - row)]
        return tokens if tokens == seen else [*tokens, *seen]
