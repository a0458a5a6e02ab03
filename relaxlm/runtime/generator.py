"""From a prompt's token ids to replies: prefill in chunks, then one token per step and reply."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from relaxlm.errors import ContextOverflowError
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.generation import GenerationConfig, SamplingState
from relaxlm.runtime.sampling import Sampled, sample
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.stop import StopStrings
from relaxlm.runtime.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass
class Timings:
    """What one generation took; seconds of wall time and counts of tokens."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


@dataclass
class Reply:
    """One reply while it grows.

    Attributes:
        text: what has been passed on so far; never half a character, never part of a stop string.
        tokens: all tokens chosen, the one that ended the reply included.
        finish_reason: "stop" for an end token or a stop string, "length" for a limit.
    """

    state: SamplingState
    decoder: object
    stops: StopStrings
    end_tokens: frozenset[int]
    max_tokens: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Sampled] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def push(self, sampled: Sampled) -> str:
        """Add a token; returns the text that has become final with it."""
        self.tokens.append(sampled.token)
        if self.state.config.logprobs:
            self.logprobs.append(sampled)
        if sampled.token in self.end_tokens:
            return self._finish("stop")
        text, stopped = self.stops.push(self.decoder.push([sampled.token]))  # type: ignore[attr-defined]
        self.text += text
        if stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_tokens:
            return text + self._finish("length")
        return text

    def _finish(self, reason: FinishReason) -> str:
        text, stopped = self.stops.push(self.decoder.finish())  # type: ignore[attr-defined]
        text += "" if stopped else self.stops.flush()
        self.text += text
        self.finish_reason = "stop" if stopped else reason
        return text


class Generator:
    """Generates from prompts whose beginning may already be cached.

    Owns the executor's sequences; `pool` and tables are checked by the caller's tests.
    """

    def __init__(self, executor: Executor, sequences: PagedSequences, tokenizer: Tokenizer) -> None:
        self.executor, self.sequences, self.tokenizer = executor, sequences, tokenizer

    def prefill(self, seq: int, ids: Sequence[int]) -> np.ndarray:
        """Append tokens to a sequence in chunks; returns the last one's logits, [1, vocab].

        Raises:
            ContextOverflowError: no room for them; what was there before is kept.
        """
        chunk = self.executor.limits.prefill_chunk_size
        before = self.sequences.length(seq)
        logits = np.empty((0, 0), np.float32)
        try:
            for start in range(0, len(ids), chunk):
                piece = np.asarray(ids[start : start + chunk], np.int32)
                last = np.array([len(piece) - 1], np.int32)
                logits = self._step([(seq, len(piece))], piece, last)
        except ContextOverflowError:
            if self.sequences.can_truncate(seq, before):
                self.sequences.truncate(seq, before)
            raise
        return logits

    def generate(
        self,
        seq: int,
        prompt: Sequence[int],
        config: GenerationConfig,
        end_tokens: frozenset[int],
        stop_strings: Sequence[str],
        room: int,
        on_text: Callable[[Reply, str], None] = lambda reply, text: None,
    ) -> tuple[list[Reply], Timings]:
        """Continue a sequence with what `prompt` has beyond it, then with `config.n` replies.

        Args:
            seq: holds the first tokens of `prompt` (any number short of all).
            room: the most tokens each reply may have.
            on_text: called after every token with the text that became final, possibly "".

        Returns:
            The replies in order and the timings. Afterwards `seq` holds the prompt and, for the
            first reply, all of its tokens but the last.
        """
        held = self.sequences.length(seq)
        timings = Timings(len(prompt), held)
        start = time.perf_counter()
        logits = self.prefill(seq, prompt[held:])
        timings.prefill_seconds = time.perf_counter() - start

        start = time.perf_counter()
        replies = [
            self._reply(config, prompt, choice, end_tokens, stop_strings, room)
            for choice in range(config.n)
        ]
        forks: list[int] = []
        try:
            forks = [self.sequences.fork(seq) for _ in replies[1:]]
            running = list(zip([seq, *forks], replies, strict=True))
            logits = np.repeat(logits, len(replies), axis=0)
            while running:
                chosen = sample(logits, [reply.state for _, reply in running])
                for (_, reply), sampled in zip(running, chosen, strict=True):
                    on_text(reply, reply.push(sampled))
                timings.decode_tokens += len(running)
                running = [(seq, reply) for seq, reply in running if reply.finish_reason is None]
                if running:
                    logits = self._step(
                        [(seq, 1) for seq, _ in running],
                        np.array([reply.tokens[-1] for _, reply in running], np.int32),
                        np.arange(len(running), dtype=np.int32),
                    )
        finally:
            for fork in forks:
                self.sequences.free(fork)
        timings.decode_seconds = time.perf_counter() - start
        return replies, timings

    def _step(self, steps: list[tuple[int, int]], ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        tables = self.sequences.batch(steps)
        self.executor.copy_pages(*self.sequences.take_copies())
        return self.executor.forward(tables, ids, rows)

    def _reply(
        self,
        config: GenerationConfig,
        prompt: Sequence[int],
        choice: int,
        end_tokens: frozenset[int],
        stop_strings: Sequence[str],
        room: int,
    ) -> Reply:
        ends = frozenset() if config.ignore_eos else end_tokens
        return Reply(
            SamplingState(config, prompt, self.active_vocab, choice),
            self.tokenizer.stream(),
            StopStrings((*stop_strings, *config.stop)),
            ends | frozenset(config.stop_token_ids),
            min(config.max_tokens or room, room),
        )

    @property
    def active_vocab(self) -> int:
        """Ids from here on are padding of the weight matrix and never chosen."""
        return min(self.executor.vocab_size, self.tokenizer.vocab_size)
