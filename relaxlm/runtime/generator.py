"""From a prompt's token ids to replies: prefill in chunks, then one token per step and reply."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np

from relaxlm.errors import ContextOverflowError
from relaxlm.runtime.channels import ChannelFormat, ChannelText
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.generation import GenerationConfig, SamplingState
from relaxlm.runtime.sampling import Sampled, all_sampled, sample
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.step_logits import StepLogits
from relaxlm.runtime.stop import StopStrings
from relaxlm.runtime.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]


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
        finish_reason: "stop" for an end token or a stop string, "length" for a limit, "cancelled"
            if the caller had enough.
        channels: reads the text of a model whose replies have channels, in front of `stops`.
    """

    state: SamplingState
    decoder: StreamDecoder
    stops: StopStrings
    end_tokens: frozenset[int]
    max_tokens: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Sampled] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    channels: ChannelText | None = None

    def push(self, sampled: Sampled) -> str:
        """Add a token; returns the text that has become final with it."""
        self.tokens.append(sampled.token)
        if self.state.config.logprobs:
            self.logprobs.append(sampled)
        if sampled.token in self.end_tokens:
            return self._end(self.decoder.finish(), "stop")
        text = self._pass_on(self.decoder.push([sampled.token]))
        if self.finish_reason is None and len(self.tokens) >= self.max_tokens:
            text += self._end("", "length")
        return text

    def cancel(self) -> str:
        """End the reply here; returns the text that was held back."""
        return self._end("", "cancelled")

    def _pass_on(self, text: str) -> str:
        return self._up_to_stop(text if self.channels is None else self.channels.push(text))

    def _up_to_stop(self, text: str) -> str:
        text, stopped = self.stops.push(text)
        self.text += text
        if stopped:
            self.finish_reason = "stop"
        return text

    def _end(self, rest: str, reason: FinishReason) -> str:
        """End with the last text. A character whose bytes a limit has cut apart is left out."""
        text = self._pass_on(rest)
        if self.channels is not None:
            text += self._up_to_stop(self.channels.finish())
        if self.finish_reason is None:
            held = self.stops.flush()
            self.text += held
            self.finish_reason = reason
            text += held
        return text


class Generator:
    """Generates from prompts whose beginning may already be cached."""

    def __init__(
        self,
        executor: Executor,
        sequences: PagedSequences,
        tokenizer: Tokenizer,
        channels: ChannelFormat | None = None,
    ) -> None:
        self.executor, self.sequences, self.tokenizer = executor, sequences, tokenizer
        self.channels = channels

    def prefill(
        self,
        seq: int,
        ids: Sequence[int],
        cancelled: Callable[[], bool] = lambda: False,
        keep: int = 0,
    ) -> StepLogits | None:
        """Append tokens, at least one, to a sequence in chunks.

        Args:
            cancelled: asked before each chunk.
            keep: so many of the tokens, less than all, end a state to go back to, if there is one.

        Returns:
            The last token's logits, [1, vocab]; None if cancelled before.

        Raises:
            ContextOverflowError: no room for them; what was there before is kept.
        """
        assert len(ids), "nothing to prefill"
        chunk = self.executor.limits.prefill_chunk_size
        before = self.sequences.length(seq)
        try:
            for start, end in _pieces(len(ids), chunk, keep):
                if cancelled():
                    return None
                piece = np.asarray(ids[start:end], np.int32)
                last = np.array([len(piece) - 1], np.int32)
                logits = self.step([(seq, len(piece))], piece, last)
                if end == keep:
                    self.sequences.keep_state(seq)
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
        continuing: bool = False,
        keep: int = 0,
        on_text: Callable[[Reply, str], None] = lambda reply, text: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> tuple[list[Reply], Timings]:
        """Continue a sequence with what `prompt` has beyond it, then with `config.n` replies.

        Args:
            seq: holds the first tokens of `prompt` (any number short of all).
            end_tokens, stop_strings: end a reply unless `config.ignore_eos`; the config's own
                always do.
            room: the most tokens each reply may have.
            continuing: the replies go on with the prompt's own text, and may begin with a space.
            keep: how many of the prompt's tokens, less than all, later prompts are likely to share:
                recurrent layers keep their state after them.
            on_text: called after every token with the text that became final, possibly "".
            cancelled: asked before every step; if so, the replies end as they are.

        Returns:
            The replies in order and the timings. Afterwards `seq` holds the prompt and, for the
            first reply, all of its tokens but the last; less if cancelled before the first token.

        Raises:
            RequestError: a token id outside the vocabulary.
        """
        replies = [
            self._reply(config, prompt, choice, end_tokens, stop_strings, room, continuing)
            for choice in range(config.n)
        ]
        held = self.sequences.length(seq)
        timings = Timings(len(prompt), held)
        start = time.perf_counter()
        keep = max(keep - held, 0) if self.sequences.states is not None else 0
        logits = self.prefill(seq, prompt[held:], cancelled, keep)
        timings.prefill_seconds = time.perf_counter() - start
        if logits is None:
            for reply in replies:
                reply.cancel()
            return replies, timings

        start = time.perf_counter()
        forks: list[int] = []
        try:
            for _ in replies[1:]:
                forks.append(self.sequences.fork(seq))
            running = list(zip([seq, *forks], replies, strict=True))
            picked = [0] * len(replies)  # they all begin with the prompt's row
            while True:
                states = [reply.state for _, reply in running]
                seen = logits.seen_by(picked, states)
                chosen = all_sampled(sample(seen.logits, states, seen.peaks, seen.blocks))
                timings.decode_tokens += len(running)
                for (_, reply), sampled in zip(running, chosen, strict=True):
                    on_text(reply, reply.push(sampled))
                running = [(seq, reply) for seq, reply in running if reply.finish_reason is None]
                if not running:
                    break
                if cancelled():
                    for _, reply in running:
                        on_text(reply, reply.cancel())
                    break
                logits = self.step(
                    [(seq, 1) for seq, _ in running],
                    np.array([reply.tokens[-1] for _, reply in running], np.int32),
                    np.arange(len(running), dtype=np.int32),
                )
                picked = list(range(len(running)))
        finally:
            for fork in forks:
                self.sequences.free(fork)
        timings.decode_seconds = time.perf_counter() - start
        return replies, timings

    def step(self, steps: list[tuple[int, int]], ids: np.ndarray, rows: np.ndarray) -> StepLogits:
        """Append tokens to sequences and run them through the model.

        Args:
            steps: sequence and number of new tokens, for each sequence.
            ids: [n] int32, the new tokens of all sequences.
            rows: [m] int32, places in `ids` whose logits are wanted.

        Returns:
            The logits [m, vocab], good until the next step.
        """
        tables = self.sequences.batch(steps)
        self.executor.copy_pages(*self.sequences.take_copies())
        return self.executor.compute(tables, ids, rows)

    def _reply(
        self,
        config: GenerationConfig,
        prompt: Sequence[int],
        choice: int,
        end_tokens: frozenset[int],
        stop_strings: Sequence[str],
        room: int,
        continuing: bool,
    ) -> Reply:
        if config.ignore_eos:
            end_tokens, stop_strings = frozenset(), ()
        shown = frozenset() if self.channels is None else self.channels.shown
        return Reply(
            SamplingState(config, prompt, self.active_vocab, choice),
            self.tokenizer.stream(continuing=continuing, shown=shown),
            StopStrings((*stop_strings, *config.stop)),
            end_tokens | frozenset(config.stop_token_ids),
            min(config.max_tokens or room, room),
            channels=None if self.channels is None else self.channels.new(prompt),
        )

    @property
    def active_vocab(self) -> int:
        """Ids from here on are padding of the weight matrix and never chosen."""
        return min(self.executor.vocab_size, self.tokenizer.vocab_size)


def _pieces(tokens: int, chunk: int, cut: int) -> list[tuple[int, int]]:
    """Where steps of up to `chunk` tokens begin and end, one of them ending at `cut`."""
    ends = [*range(0, cut, chunk), *range(cut, tokens, chunk), tokens]
    return list(pairwise(ends))
