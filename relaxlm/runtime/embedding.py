"""Texts to vectors with one library: which texts share a step, and which states make a vector.

An encoder reads whole texts, as many as fit into a step. A decoder appends texts to its cache,
where a long one goes through several steps; what it held there is free again afterwards.
"""

from collections.abc import Sequence

import numpy as np

from relaxlm.errors import ContextOverflowError, RequestError
from relaxlm.runtime.chat_config import EmbeddingMetadata, EmbeddingSection, Pooling
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.step_tables import BatchTables, TextTables, text_tables
from relaxlm.runtime.tokenizer import Tokenizer


class Embedder:
    """Runs texts through a model, and pools their states.

    Args:
        sequences: over the executor's pages; an encoder uses none.
        metadata: how states become vectors.
    """

    def __init__(
        self, executor: Executor, sequences: PagedSequences, metadata: EmbeddingMetadata
    ) -> None:
        self.executor, self.metadata = executor, metadata
        self.sequences = None if executor.metadata.is_encoder else sequences

    def together(self, texts: Sequence[Sequence[int]]) -> int:
        """How many of the first texts go through the model together, at least one.

        Those that fit into one step and into the free pages; or one that does not. With recurrent
        layers it is always one, for their states have slots for no more beside the replies'.
        """
        limits, tokens, pages, count = self.executor.limits, 0, 0, 0
        if self.executor.metadata.state.tensors:
            return 1
        for ids in texts[: limits.max_batch_size]:
            tokens += len(ids)
            pages += self.pages_of(ids)
            if tokens > limits.prefill_chunk_size:
                break
            if self.sequences is not None and pages > self.sequences.pool.free:
                break
            count += 1
        return max(count, 1)

    def pages_of(self, ids: Sequence[int]) -> int:
        """Pages of the cache that a text takes while it is computed."""
        return 0 if self.sequences is None else -(-len(ids) // self.sequences.page_size)

    def run(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The pooled states of texts that go together.

        Returns:
            [hidden] float32 each, of any length.

        Raises:
            ContextOverflowError: there are not enough free pages.
        """
        pools = [_Pool(self.metadata.pooling_strategy, len(ids)) for ids in texts]
        if self.sequences is None:
            self._step(text_tables([len(ids) for ids in texts]), texts, pools)
            return [pool.vector() for pool in pools]
        seqs = [self.sequences.add() for _ in texts]
        chunk = self.executor.limits.prefill_chunk_size
        try:
            # One round, unless there is one text and it is longer than a step.
            for start in range(0, max(map(len, texts)), chunk):
                parts = [ids[start : start + chunk] for ids in texts]
                counts = [len(part) for part in parts]
                tables = self.sequences.batch(list(zip(seqs, counts, strict=True)))
                self.executor.copy_pages(*self.sequences.take_copies())
                self._step(tables, parts, pools)
        finally:
            for seq in seqs:
                self.sequences.free(seq)
        return [pool.vector() for pool in pools]

    def _step(
        self,
        tables: BatchTables | TextTables,
        parts: Sequence[Sequence[int]],
        pools: Sequence["_Pool"],
    ) -> None:
        ids = np.concatenate([np.asarray(part, np.int32) for part in parts])
        wanted = [pool.rows(len(part)) for pool, part in zip(pools, parts, strict=True)]
        rows = np.concatenate(
            [at + first for at, first in zip(wanted, tables.row_offsets, strict=False)]
        )
        # The model always computes one row.
        one = np.zeros(1, np.int32)
        states = self.executor.embeddings(tables, ids, rows if len(rows) else one)
        done = 0
        for pool, part, at in zip(pools, parts, wanted, strict=True):
            pool.add(states[done : done + len(at)], len(part))
            done += len(at)


class TextReader:
    """Texts to the token ids that an embedding model expects.

    Args:
        longest: tokens that a text may have.
    """

    def __init__(self, tokenizer: Tokenizer, settings: EmbeddingSection, longest: int) -> None:
        self.tokenizer, self.settings, self.longest = tokenizer, settings, longest

    def prompt(self, name: str | None = None) -> str:
        """What is put in front of texts.

        Args:
            name: one of the model's prompts; its own choice if None.

        Raises:
            RequestError: the model has no such prompt.
        """
        name, prompts = name or self.settings.default_prompt_name, self.settings.prompts
        if name is None:
            return ""
        if name not in prompts:
            known = ", ".join(map(repr, prompts)) or "none"
            raise RequestError(f"prompt_name = {name!r}: this model's prompts are {known}")
        return prompts[name]

    def ids(self, text: str, prompt: str = "", truncate: bool = False) -> list[int]:
        """
        Args:
            prompt: is put in front of the text.
            truncate: cut off the end of a text that is too long.

        Returns:
            With the tokens that the model expects around a text; none for an empty text.

        Raises:
            RequestError: not a text, or no valid Unicode.
        """
        if not isinstance(text, str):
            raise RequestError(f"a text to embed is a {type(text).__name__}, expected a string")
        if not text:
            return []
        text = prompt + text
        if self.settings.strip:
            text = text.strip()
        if self.settings.lowercase:
            text = text.lower()
        return self.tokenizer.encode(text, longest=self.longest if truncate else None)


def check_texts(texts: Sequence[Sequence[int]], longest: int, vocab_size: int) -> None:
    """Refuse token ids that cannot be embedded.

    Raises:
        RequestError: no text, an empty one, or a token outside the vocabulary.
        ContextOverflowError: a text of more than `longest` tokens.
    """
    if not texts:
        raise RequestError("no text to embed: expected at least one")
    for i, ids in enumerate(texts):
        if not len(ids):
            raise RequestError(f"text {i} has no tokens, expected at least one")
        if len(ids) > longest:
            raise ContextOverflowError(
                f"text {i} has {len(ids)} tokens, the context window {longest}: shorten it, or let "
                "its end be cut off with truncate"
            )
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise RequestError(f"text {i} has a token id outside the vocabulary of {vocab_size}")


def check_dimensions(dimensions: int | None, size: int) -> None:
    """
    Args:
        size: of the model's vectors.

    Raises:
        RequestError: a vector has fewer numbers than are asked for.
    """
    if dimensions is not None and not 1 <= dimensions <= size:
        raise RequestError(
            f"dimensions = {dimensions}: this model's vectors have {size} numbers, expected 1 to "
            f"{size}"
        )


def finish(vector: np.ndarray, normalize: bool, dimensions: int | None = None) -> np.ndarray:
    """A vector out of pooled states [hidden], brought to length 1 if it is to be normalized.

    Args:
        dimensions: how many of its first numbers are the vector; all if None. Models that are
            trained for it put most into the first ones (Kusupati et al. 2022, arXiv:2205.13147).
    """
    vector = vector[:dimensions]
    length = float(np.linalg.norm(vector.astype(np.float64))) if normalize else 1.0
    return (vector / length if length else vector).astype(np.float32)


def pooled(states: np.ndarray, pooling: Pooling) -> np.ndarray:
    """The vector of a text whose states are all there.

    Args:
        states: [n, hidden].

    Returns:
        [hidden] float32, of any length.
    """
    pool = _Pool(pooling, len(states))
    pool.add(states[pool.rows(len(states))], len(states))
    return pool.vector()


class _Pool:
    """What is kept of a text's states while it is computed."""

    def __init__(self, pooling: Pooling, total: int) -> None:
        self.pooling, self.total, self.done = pooling, total, 0
        self.kept: np.ndarray | None = None

    def rows(self, count: int) -> np.ndarray:
        """Which of the next `count` tokens' states are wanted, int32."""
        if self.pooling == "cls":
            wanted = [0] if self.done == 0 else []
        elif self.pooling == "last":
            wanted = [count - 1] if self.done + count == self.total else []
        else:
            return np.arange(count, dtype=np.int32)
        return np.array(wanted, np.int32)

    def add(self, states: np.ndarray, count: int) -> None:
        """Take the states that were wanted of `count` tokens."""
        self.done += count
        if not len(states):
            return
        if self.pooling == "mean":
            found = states.sum(axis=0, dtype=np.float64)
            self.kept = found if self.kept is None else self.kept + found
        elif self.pooling == "max":
            found = states.max(axis=0)
            self.kept = found if self.kept is None else np.maximum(self.kept, found)
        else:
            self.kept = states[0].copy()

    def vector(self) -> np.ndarray:
        assert self.kept is not None and self.done == self.total
        mean = self.kept / self.total if self.pooling == "mean" else self.kept
        return mean.astype(np.float32)
