"""Texts to vectors with a decoder: its last layer's state at the last token."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from relaxlm.engine.core import EngineCore
from relaxlm.errors import LibraryError, RelaxLMError
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.sequence_table import PagedSequences

# States of all layers come back from the model, so steps are kept small.
_CHUNK = 256


def embed(executor: Executor, sequences: PagedSequences, ids: Sequence[int]) -> np.ndarray:
    """The final norm's output at the last token.

    Args:
        ids: [n] at least one; there are pages for them.

    Returns:
        [hidden] float32, not normalized to length 1.
    """
    seq = sequences.add()
    chunk = min(_CHUNK, executor.limits.prefill_chunk_size)
    try:
        for start in range(0, len(ids), chunk):
            piece = np.asarray(ids[start : start + chunk], np.int32)
            tables = sequences.batch([(seq, len(piece))])
            executor.copy_pages(*sequences.take_copies())
            states = executor.hidden_states(tables, piece)
        return states[-1][-1].copy()
    finally:
        sequences.free(seq)


Vectors = Callable[[list[np.ndarray] | RelaxLMError], None]


@dataclass(eq=False)
class EmbeddingJob:
    """Some texts, one after the other.

    Attributes:
        deliver: called once, with the vectors or with what went wrong.
    """

    prompts: Sequence[Sequence[int]]
    deliver: Vectors
    vectors: list[np.ndarray] = field(default_factory=list)
    submitted_at: float = field(default_factory=time.perf_counter)

    def go_on(self, core: EngineCore) -> list[np.ndarray] | RelaxLMError | None:
        """Compute the next text's vector, if there are pages for it now.

        Returns:
            What to deliver if the job has ended, else None.
        """
        ids = self.prompts[len(self.vectors)]
        if not core.scheduler.make_room(-(-len(ids) // core.sequences.page_size)):
            return None
        try:
            self.vectors.append(embed(core.executor, core.sequences, ids))
        except Exception as error:  # nobody's request may end the engine
            if isinstance(error, RelaxLMError):
                return error
            return LibraryError(f"embedding failed: {type(error).__name__}: {error}")
        return self.vectors if len(self.vectors) == len(self.prompts) else None
