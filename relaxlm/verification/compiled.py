"""The compiled side: a library with weights, run over texts as the runtime runs it."""

import numpy as np

from relaxlm.runtime.cache_size import CacheSize, pages_for
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.library import Library
from relaxlm.runtime.params import WeightFolder
from relaxlm.runtime.step_tables import text_tables

# The last tokens of a text go through one by one, as when text is generated.
DECODED = 8


class CompiledModel:
    """A library, ready to run texts of up to `max_tokens` tokens."""

    def __init__(self, library: Library, weights: WeightFolder, max_tokens: int) -> None:
        info = library.metadata
        self.limits, self._is_encoder = info.limits, info.is_encoder
        self._for_embeddings = info.model_task == "embedding"
        size = CacheSize.of(info, pages_for(info, max_tokens), sequences=1)
        self._executor = Executor(library, weights, size.pages, size.state_slots)
        self._sequences = size.sequences(info)

    def run(self, ids: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        """One text through the paged cache: its results once, its residual stream once.

        Logits come from steps with as many tokens as rows of logits are allowed, and at the end
        one token each. A library for embeddings has none, and gives the states of its last norm; an
        encoder reads a text in one step.

        Returns:
            results: [n, vocab] float32 logits, or [n, hidden] float32 states.
            states: [n, hidden] float32 before the first layer and after each.
        """
        n, tokens = len(ids), np.asarray(ids, np.int32)
        if self._is_encoder:
            tables, rows = text_tables([n]), np.arange(n, dtype=np.int32)
            *states, _ = self._executor.hidden_states(tables, tokens)
            return self._executor.embeddings(tables, tokens, rows), states
        chunk = self.limits.max_batch_size
        first = max(0, n - DECODED)
        steps = [min(chunk, first - start) for start in range(0, first, chunk)]
        steps += [1] * (n - first)
        results = [] if self._for_embeddings else self._in_steps(tokens, steps, self._logits)
        chunk = self.limits.prefill_chunk_size
        steps = [min(chunk, n - start) for start in range(0, n, chunk)]
        if self._for_embeddings:
            results = self._in_steps(tokens, steps, self._vectors)
        parts = self._in_steps(tokens, steps, self._executor.hidden_states)
        *states, _ = (np.concatenate(layer) for layer in zip(*parts, strict=True))
        return np.concatenate(results), states

    def _vectors(self, tables, ids: np.ndarray) -> np.ndarray:
        return self._executor.embeddings(tables, ids, np.arange(len(ids), dtype=np.int32))

    def _logits(self, tables, ids: np.ndarray) -> np.ndarray:
        return self._executor.forward(tables, ids, np.arange(len(ids), dtype=np.int32))

    def _in_steps(self, tokens: np.ndarray, steps: list[int], function) -> list:
        seq, done, results = self._sequences.add(), 0, []
        try:
            for count in steps:
                tables = self._sequences.batch([(seq, count)])
                self._executor.copy_pages(*self._sequences.take_copies())
                results.append(function(tables, tokens[done : done + count]))
                done += count
        finally:
            self._sequences.free(seq)
        return results
