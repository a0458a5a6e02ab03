"""A model without tokenizer or conversation: made-up tokens in, seconds out."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from relaxlm.errors import ConfigError, ContextOverflowError
from relaxlm.runtime.cache_size import CacheSize, pages_for
from relaxlm.runtime.chat_config import ChatConfigFile
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.generation import GenerationConfig, SamplingState
from relaxlm.runtime.library import (
    Library,
    check_device,
    check_fits_model,
    refuse_compile_options,
)
from relaxlm.runtime.params import WeightFolder
from relaxlm.runtime.sampling import all_sampled, sample
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.step_logits import StepLogits

Progress = Callable[[str, float], None]


class Session:
    """Runs prompts and decoding steps, and tells how long they took.

    Attributes:
        executor, sequences: of the model, for whoever needs more.
        weights: where they come from; None if they are in no folder.
    """

    def __init__(
        self,
        executor: Executor,
        sequences: PagedSequences,
        weights: WeightFolder | None = None,
    ) -> None:
        self.executor, self.sequences, self.weights = executor, sequences, weights
        self._random = np.random.default_rng(0)
        self._greedy = SamplingState(GenerationConfig(temperature=0), (), executor.vocab_size)
        self._held: list[int] = []
        self._prepared: tuple[int, int] | None = None  # batch, context

    @staticmethod
    def load(
        folder: Path,
        model_lib: Path | None = None,
        device: str = "auto",
        overrides: str | None = None,
        room: Sequence[tuple[int, int]] = ((1, 4096),),
        progress: Progress = lambda stage, share: None,
        opt: str | None = None,
    ) -> "Session":
        """Load a converted folder.

        Args:
            model_lib: its library; compiled now, or found in the cache, if None.
            device: as for `relaxlm chat`.
            overrides, opt: as for `relaxlm compile`; only without `model_lib`.
            room: (sequences, tokens of each) that the KV cache must take, for the largest of them.

        Raises:
            RelaxLMError: as `ChatModule` raises.
        """
        config, weights = ChatConfigFile.load(folder), WeightFolder(folder)
        if model_lib is None:
            from relaxlm.runtime.jit import library_for

            library = library_for(folder, device, overrides, progress, opt)
        else:
            refuse_compile_options(model_lib, overrides=overrides, opt=opt)
            library = Library.load(model_lib)
            check_device(library, device)
            check_fits_model(library, folder, config)
        info = library.metadata
        if info.model_task == "embedding":
            raise ConfigError(
                f"{library.path} is a library for embeddings: bench and profile measure prompts "
                "and replies, of which it computes no logits"
            )
        longest, most = max(tokens for _, tokens in room), info.limits.context_window_size
        if longest > most and not info.limits.sliding_window_size:
            raise ContextOverflowError(
                f"{longest} tokens of one sequence: {library.path} was compiled for a context of "
                f'{most}; compile with --overrides "context_window_size={longest}"'
            )
        pages = max(batch * pages_for(info, tokens) for batch, tokens in room)
        # Each may go back to the state after its prompt.
        most = max(batch for batch, _ in room)
        size = CacheSize.of(info, pages, most, kept=most)
        executor = Executor(library, weights, size.pages, size.state_slots)
        return Session(executor, size.sequences(info), weights)

    def prefill(self, tokens: int) -> float:
        """Seconds of a new prompt, until the logits of its last token are there."""
        self._free()
        ids = self._made_up((1, tokens))
        start = time.perf_counter()
        self._append_prompts(ids)
        return time.perf_counter() - start

    def decode(self, context: int, batch: int, steps: int) -> float:
        """Seconds per step of one token for each of `batch` sequences with `context` tokens."""
        self.prepare(context, batch)
        self.step()  # not counted: threads and code may be asleep
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        return (time.perf_counter() - start) / steps

    def prepare(self, context: int, batch: int) -> None:
        """Have `batch` sequences of `context` tokens in the cache."""
        if self._prepared == (batch, context) and all(
            self.sequences.can_truncate(seq, context) for seq in self._held
        ):
            for seq in self._held:
                self.sequences.truncate(seq, context)
        else:
            self._free()
            self._append_prompts(self._made_up((batch, context)))
            for seq in self._held:
                self.sequences.keep_state(seq)
            self._prepared = batch, context
        self._next = self._made_up((batch, 1))[:, 0]

    def step(self) -> None:
        """The most probable next token of every sequence."""
        tables = self.sequences.batch([(seq, 1) for seq in self._held])
        rows = np.arange(len(self._held), dtype=np.int32)
        self._next = self._choose(self.executor.compute(tables, self._next, rows), len(rows))

    def _append_prompts(self, ids: np.ndarray) -> None:
        """Start sequences with the prompts [batch, n]."""
        chunk = self.executor.limits.prefill_chunk_size
        self._held = [self.sequences.add() for _ in ids]
        for seq, prompt in zip(self._held, ids, strict=True):
            for start in range(0, len(prompt), chunk):
                part = prompt[start : start + chunk]
                tables = self.sequences.batch([(seq, len(part))])
                last = np.array([len(part) - 1], np.int32)
                logits = self.executor.compute(tables, part, last)
            self._choose(logits, 1)

    def _choose(self, logits: StepLogits, rows: int) -> np.ndarray:
        """Tokens [rows] int32 as a greedy reply gets them: most logits of a GPU stay there."""
        # Without penalties, nobody asks for what a reply has had so far.
        states = [self._greedy] * rows
        seen = logits.seen_by(range(rows), states)
        chosen = all_sampled(sample(seen.logits, states, seen.peaks, seen.blocks))
        return np.array([sampled.token for sampled in chosen], np.int32)

    def _made_up(self, shape: tuple[int, int]) -> np.ndarray:
        return self._random.integers(0, self.executor.vocab_size, shape).astype(np.int32)

    def _free(self) -> None:
        for seq in self._held:
            self.sequences.free(seq)
        self._held, self._prepared = [], None
