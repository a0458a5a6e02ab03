"""ChatModule: one conversation with one model.

    chat = ChatModule("dist/qwen-q4f16_1")
    print(chat.generate("What is the meaning of life?"))

The KV cache of earlier turns is reused: of a new prompt only what differs from the cached tokens
is computed. Recurrent layers can go back to few states: that of now, and those behind the user's
messages of the last two prompts, before the replies; a prompt that differs earlier is computed from
its start.

A reply of gpt-oss, which comes in messages on channels, and of models with special tokens around
their reasoning reads as that of other thinking models: the reasoning between <think> and </think>,
then the answer.

When a conversation outgrows the context window, its oldest turns are forgotten until the new prompt
and a quarter of the window for the reply fit (`ChatConfig.context_overflow` = "drop_oldest_turns",
the default), or an error is raised ("error"). System messages and the last message are never
forgotten. With a sliding-window library nothing has to be forgotten.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relaxlm.errors import ContextOverflowError, RequestError, TemplateError
from relaxlm.files import format_bytes
from relaxlm.runtime.cache_size import CacheSize, pages_for
from relaxlm.runtime.channels import channel_format, parted
from relaxlm.runtime.chat_settings import ChatConfig
from relaxlm.runtime.embedding import (
    Embedder,
    TextReader,
    check_dimensions,
    check_texts,
    finish,
)
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.generation import GenerationConfig
from relaxlm.runtime.generator import Generator, Reply, Timings
from relaxlm.runtime.model import ServedModel, either_name
from relaxlm.runtime.prompt import Message
from relaxlm.runtime.state_slots import MOST_KEPT
from relaxlm.runtime.streaming import StreamCallback
from relaxlm.runtime.threads import set_threads

__all__ = ["ChatConfig", "ChatModule"]

# The most replies to one prompt: each takes two more pages of the KV cache.
MAX_REPLIES = 16
# Bytes that the recurrent states of further replies may take.
_REPLY_STATES = 2**30

# Tokens; more than any conversation with a sliding window will have.
_ENDLESS = 2**31 - 1


@dataclass
class _Cached:
    """The sequence in the KV cache and the tokens it holds."""

    seq: int
    tokens: list[int]


class ChatModule:
    """A model, ready to chat.

    Attributes:
        messages: the conversation so far, as dictionaries with "role" and "content".
        forgotten_messages: how many of them the last prompt left out, the context being full.
        replies: the replies of the last generation, with tokens and log probabilities.
        timings: of the last generation.
    """

    def __init__(
        self,
        model: str | Path,
        device: str = "auto",
        chat_config: ChatConfig | Mapping[str, Any] | None = None,
        model_lib: str | Path | None = None,
        model_lib_path: str | Path | None = None,
        progress: Callable[[str, float], None] = lambda stage, share: None,
        threads: int | None = None,
        opt: str | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: a folder made by `convert_weight` and `gen_config` (or published in this form).
            device: "auto", "cpu", "cuda" or "metal".
            chat_config: replaces settings of the folder.
            model_lib: the compiled library; compiled now and cached if None. `model_lib_path` is
                another name for it.
            progress: called with a stage's name and the share of the work done before it, if the
                library is compiled now.
            opt: as `relaxlm compile --opt` takes it; only without `model_lib`.
            threads: that kernels run on; one per usable core if None (`runtime/threads.py`).

        Raises:
            RelaxLMError: a folder, library or setting that is wrong; says what to do.
        """
        started = time.perf_counter()
        self.model = ServedModel.load(
            model, device, chat_config, either_name(model_lib, model_lib_path), progress, opt
        )
        self.folder, self.chat_config = self.model.folder, self.model.chat_config
        self.tokenizer, self.prompts = self.model.tokenizer, self.model.prompts
        self.library = self.model.library
        info = self.library.metadata
        limits = info.limits
        self._window = limits.sliding_window_size
        self.context_window_size = limits.context_window_size
        if wanted := self.chat_config.context_window_size:
            self.context_window_size = wanted
        pages = pages_for(info, _ENDLESS if self._window else self.context_window_size)
        # Each of several replies ends in a page of its own, and copies the prompt's last page.
        self.max_replies = 1 if self._window else min(limits.max_batch_size, MAX_REPLIES)
        if state := info.state.bytes_per_sequence:
            self.max_replies = min(self.max_replies, 1 + _REPLY_STATES // state)
        pages += 2 * (self.max_replies - 1)
        # A text may be embedded beside the conversation.
        size = CacheSize.of(info, pages, self.max_replies + 1, kept=MOST_KEPT)
        set_threads(threads)
        self.executor = Executor(self.library, self.model.weights, size.pages, size.state_slots)
        self.sequences = size.sequences(info)
        channels = channel_format(self.prompts.sources, self.tokenizer)
        self.generator = Generator(self.executor, self.sequences, self.tokenizer, channels)
        self.embedder = Embedder(self.executor, self.sequences, self.model.embedding)
        self.messages: list[Message] = []
        self.replies: list[Reply] = []
        self.timings = Timings()
        self.forgotten_messages = 0
        self._cached: _Cached | None = None
        self.load_seconds = time.perf_counter() - started

    def generate(
        self,
        prompt: str | Sequence[Message],
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        progress_callback: StreamCallback | None = None,
        stateless: bool = False,
    ) -> str | list[str]:
        """Answer a prompt.

        Args:
            prompt: the next user message of the conversation; or a list of messages, which takes
                the place of the conversation so far.
            generation_config: how to sample; unset fields come from the model's configuration.
            progress_callback: gets the text while it is generated.
            stateless: answer without the conversation so far, and leave it as it is.

        Returns:
            The reply, or the list of replies if `generation_config.n` > 1. The conversation goes
            on with the first one.

        Raises:
            ContextOverflowError: the prompt does not fit into the context window.
            RequestError, TemplateError: a malformed request, or a conversation that the model's
                template refuses. The conversation is as it was before.
        """
        try:
            self.model.refuse_embedding_model()
            settings = self.settings(generation_config)
            if progress_callback is not None and settings.n > 1:
                raise RequestError(
                    f"n = {settings.n} replies cannot be streamed to one progress_callback: ask "
                    "for n = 1, or leave the callback out"
                )
            result = self._generate(prompt, settings, progress_callback, stateless)
        except BaseException as error:
            if progress_callback is not None:
                # It may be the callback that failed, and may fail again: `error` says more.
                with suppress(Exception):
                    progress_callback.on_end(error)
            raise
        if progress_callback is not None:
            progress_callback.on_end()
        return result

    def reset_chat(self) -> None:
        """Forget the conversation."""
        self.messages = []
        self.forgotten_messages = 0
        self._drop_cache()

    def stats(self, verbose: bool = False) -> str:
        """Speeds of the last generation; with `verbose`, counts, memory and load time, too."""
        t = self.timings
        new = t.prompt_tokens - t.reused_tokens
        # The first token of a reply comes out of the prefill.
        steps = max(t.decode_tokens - len(self.replies), 0)
        text = (
            f"prefill: {_speed(new, t.prefill_seconds)}, decode: {_speed(steps, t.decode_seconds)}"
        )
        if not verbose:
            return text
        memory, info = self.executor.memory(), self.library.metadata
        parts = [f"{format_bytes(memory.params)} parameters"]
        if info.kv_cache.tensors:
            parts += [f"up to {format_bytes(memory.kv_cache)} KV cache ({info.kv_cache.dtype})"]
        if info.state.tensors:
            parts += [f"up to {format_bytes(memory.states)} recurrent states"]
        parts += [f"up to {format_bytes(memory.temporary)} temporary"]
        return "\n".join(
            [
                text,
                f"prompt: {t.prompt_tokens} tokens, {t.reused_tokens} of them from the cache; "
                f"reply: {t.decode_tokens} tokens",
                f"memory: {', '.join(parts)}",
                f"loaded in {self.load_seconds:.1f} s",
            ]
        )

    def benchmark_generate(self, prompt: str, generate_length: int) -> str:
        """Generate exactly `generate_length` tokens, end or not, apart from the conversation.

        Nothing is reused from the KV cache: the whole prompt is computed.

        Returns:
            The text; `stats` has the speeds.

        Raises:
            ContextOverflowError: prompt and reply do not fit into the context window.
        """
        self.model.refuse_embedding_model()
        settings = GenerationConfig(max_tokens=generate_length, ignore_eos=True, temperature=0.0)
        ids = self.prompts.encode_text(prompt)
        self._check_fits(len(ids))
        room = self._room(len(ids), 1)
        if generate_length > room:
            raise ContextOverflowError(
                f"a prompt of {len(ids)} tokens and {generate_length} more do not fit into the "
                f"context window of {self.context_window_size}: ask for at most {room}"
            )
        self._drop_cache()
        return self._run(ids, settings, None, continuing=True).text

    def embed_text(
        self,
        text: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        truncate: bool = False,
    ) -> np.ndarray:
        """A vector for each text, as the folder's `embedding_metadata` says it is made.

        Args:
            text: one text or several, none of them empty.
            prompt_name: of the model's prompts ("query", "document"), which one to put in front of
                every text; the model's own choice if None. `prompt` gives its words instead.
            dimensions: how many numbers of each vector to keep, for models trained for it.
            truncate: cut off the end of a text that is longer than the context window.

        Returns:
            [texts, hidden] float32, or [texts, dimensions].

        Raises:
            RequestError: no text, an empty one, no such prompt, or too many dimensions.
            ContextOverflowError: a text that is too long.
        """
        if not isinstance(text, str | Sequence):
            raise RequestError(
                f"embed_text: a {type(text).__name__}, expected a text or a list of texts"
            )
        reader = TextReader(
            self.tokenizer, self.model.config.relaxlm.embedding, self.context_window_size
        )
        if prompt is None:
            prompt = reader.prompt(prompt_name)
        elif prompt_name is not None:
            raise RequestError("prompt and prompt_name are both given: give one of them")
        texts = [
            reader.ids(one, prompt, truncate) for one in ([text] if isinstance(text, str) else text)
        ]
        check_texts(texts, self.context_window_size, self.model.vocab_size)
        check_dimensions(dimensions, self.library.metadata.hidden_size)
        vectors: list[np.ndarray] = []
        while len(vectors) < len(texts):
            rest = texts[len(vectors) :]
            if self.embedder.pages_of(rest[0]) > self.sequences.pool.free:
                self._drop_cache()  # the conversation's, which is computed again when it goes on
            states = self.embedder.run(rest[: self.embedder.together(rest)])
            vectors += [finish(x, self.model.embedding.normalize, dimensions) for x in states]
        return np.stack(vectors)

    def _generate(
        self,
        prompt: str | Sequence[Message],
        settings: GenerationConfig,
        callback: StreamCallback | None,
        stateless: bool,
    ) -> str | list[str]:
        if not isinstance(prompt, Sequence):
            raise RequestError(
                f"the prompt is a {type(prompt).__name__}, expected a text or a list of messages"
            )
        if isinstance(prompt, str):
            history = [] if stateless else self.messages
            messages: list[Message] = [*history, {"role": "user", "content": prompt}]
        else:
            messages = list(prompt)
        kept, ids = self._fit(messages, settings)
        keep = self._shared_later(kept, ids) if self.sequences.states is not None else 0
        first = self._run(ids, settings, callback, self.model.continues_text, keep)
        self.forgotten_messages = len(messages) - len(kept)
        answered = first.text or first.finish_reason != "cancelled"
        if answered and not stateless and self.prompts.source != "none":
            channels = self.generator.channels is not None
            said = parted(first.text) if channels else {"content": first.text}
            self.messages = [*kept, {"role": "assistant", **said}]
        texts = [reply.text for reply in self.replies]
        return texts if settings.n > 1 else texts[0]

    def _run(
        self,
        ids: list[int],
        settings: GenerationConfig,
        callback: StreamCallback | None,
        continuing: bool,
        keep: int = 0,
    ) -> Reply:
        """Generate from token ids, reusing what the cache holds of them; `keep` as `Generator`."""
        if not ids:
            raise RequestError("the prompt has no tokens, expected at least one")
        self._check_fits(len(ids))
        cached = self._reusable(ids)
        try:
            self.replies, self.timings = self.generator.generate(
                cached.seq,
                ids,
                settings,
                self.prompts.stop_token_ids,
                self.prompts.stop_strings,
                self._room(len(ids), settings.n),
                continuing,
                keep,
                *_reporting(callback),
            )
        except BaseException:
            self._drop_cache()  # it holds an unknown part of the prompt and the reply
            raise
        first = self.replies[0]
        held = self.sequences.length(cached.seq)
        self._cached = _Cached(cached.seq, [*ids, *first.tokens][:held])
        return first

    def _reusable(self, ids: list[int]) -> _Cached:
        """The cached sequence, cut back to what it has in common with a prompt."""
        if self._cached is not None:
            held = self._cached.tokens
            # The last token has to run: its logits choose the first token of the reply.
            common = min(_common(held, ids), len(ids) - 1)
            common = self.sequences.longest_prefix(self._cached.seq, common)
            if common:
                self.sequences.truncate(self._cached.seq, common)
                return self._cached
        self._drop_cache()
        self._cached = _Cached(self.sequences.add(), [])
        return self._cached

    def _drop_cache(self) -> None:
        if self._cached is not None:
            self.sequences.free(self._cached.seq)
            self._cached = None

    def _fit(
        self, messages: list[Message], settings: GenerationConfig
    ) -> tuple[list[Message], list[int]]:
        """Forget the oldest turns until prompt and reply fit; see the module's docstring."""
        ids = self._encode(messages)
        window = self.context_window_size
        reserve = min(settings.max_tokens or window // 4, window // 4)
        drops = not self._window and self.chat_config.context_overflow == "drop_oldest_turns"
        while drops and len(ids) + reserve > window:
            shorter = _without_oldest_turn(messages)
            if shorter is None:
                break
            messages, ids = shorter, self._encode(shorter)
        return messages, ids

    def _encode(self, messages: list[Message]) -> list[int]:
        if self.prompts.source != "none":
            return self.prompts.encode(messages)
        if len(messages) == 1 and isinstance(messages[0], Mapping):
            if isinstance(content := messages[0].get("content"), str):
                return self.prompts.encode_text(content)
        raise RequestError(
            f"{self.folder} has no chat template, so it takes one text at a time and no "
            "conversation; `relaxlm gen_config --conv-template NAME` sets a template"
        )

    def _shared_later(self, messages: list[Message], ids: list[int]) -> int:
        """How many of a prompt's tokens the next one begins with, at least if it goes on with the
        conversation or asks for another reply: those before the reply's own beginning.
        """
        if self.prompts.source == "none":
            return len(ids) - 1
        try:
            shared = self.prompts.encode(messages, add_generation_prompt=False)
        except TemplateError:
            return 0
        return min(_common(shared, ids), len(ids) - 1)

    def _check_fits(self, tokens: int) -> None:
        if not self._window and tokens >= self.context_window_size:
            raise ContextOverflowError(
                f"the prompt has {tokens} tokens, the context window {self.context_window_size}: "
                "shorten the prompt, or compile with a larger "
                '--overrides "context_window_size=..." if the model allows it'
            )

    def _room(self, prompt: int, n: int) -> int:
        """The most tokens that each of n replies may have."""
        if self._window:
            return _ENDLESS
        return max(1, (self.context_window_size - prompt) // n)

    def settings(
        self, given: GenerationConfig | Mapping[str, Any] | None = None
    ) -> GenerationConfig:
        """A generation's settings: those given, then those of `chat_config` and of the folder.

        Raises:
            RequestError: an unknown option, a value that is not possible, or too many replies.
        """
        settings = self.model.settings(given)
        if settings.n > self.max_replies:
            why = "with a sliding window" if self._window else "with this library"
            raise RequestError(
                f"n = {settings.n}: at most {self.max_replies} at a time {why}; ask several times"
            )
        return settings


def _common(one: list[int], other: list[int]) -> int:
    """How many of the first tokens are the same."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


def _reporting(
    callback: StreamCallback | None,
) -> tuple[Callable[[Reply, str], None], Callable[[], bool]]:
    """What tells a callback of text, and what asks it whether it has had enough."""
    if callback is None:
        return lambda reply, text: None, lambda: False
    return lambda reply, text: callback.on_token(text), lambda: callback.cancelled


def _without_oldest_turn(messages: list[Message]) -> list[Message] | None:
    """The messages without the first one that is not a system message, and its answers.

    None if only system messages and the last message are left.
    """
    start = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), 0)
    end = next(
        (i for i in range(start + 1, len(messages)) if messages[i]["role"] == "user"),
        len(messages),
    )
    return None if end >= len(messages) else [*messages[:start], *messages[end:]]


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tok/s" if tokens and seconds else "-"
