"""ChatModule: one conversation with one model.

    chat = ChatModule("dist/qwen-q4f16_1")
    print(chat.generate("What is the meaning of life?"))

The KV cache of earlier turns is reused: of a new prompt only what differs from the cached tokens
is computed. When a conversation outgrows the context window, its oldest turns are forgotten until
the new prompt and a quarter of the window for the reply fit (`ChatConfig.context_overflow` =
"drop_oldest_turns", the default), or an error is raised ("error"). System messages and the last
message are never forgotten. With a sliding-window library nothing has to be forgotten.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relaxlm.errors import ConfigError, ContextOverflowError, RequestError
from relaxlm.files import format_bytes
from relaxlm.runtime.chat_config import ChatConfigFile, explained
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.generation import GenerationConfig
from relaxlm.runtime.generator import Generator, Reply, Timings
from relaxlm.runtime.library import Library
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.params import WeightFolder
from relaxlm.runtime.prompt import Message, PromptBuilder
from relaxlm.runtime.sequence_table import PagedSequences, pages_per_sequence
from relaxlm.runtime.streaming import StreamCallback
from relaxlm.runtime.tokenizer import Tokenizer

# The most replies to one prompt: each takes two more pages of the KV cache.
MAX_REPLIES = 16


class ChatConfig(BaseModel):
    """Settings that replace those of the model's mlc-chat-config.json. Sizes are in tokens.

    Compile-time settings (`prefill_chunk_size` and those after it) take effect when the library is
    compiled on first use; with a given library they must be what it was compiled for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_gen_len: int | None = None
    conv_template: str | None = None
    context_overflow: Literal["drop_oldest_turns", "error"] = "drop_oldest_turns"
    context_window_size: int | None = Field(default=None, gt=0)
    prefill_chunk_size: int | None = Field(default=None, gt=0)
    sliding_window_size: int | None = Field(default=None, gt=0)
    attention_sink_size: int | None = Field(default=None, ge=0)
    kv_cache_dtype: str | None = None

    def overrides(self) -> str:
        """The compile-time settings, spelled as for `relaxlm compile --overrides`."""
        names = (
            "context_window_size",
            "prefill_chunk_size",
            "sliding_window_size",
            "attention_sink_size",
            "kv_cache_dtype",
        )
        given = {name: getattr(self, name) for name in names}
        return ";".join(f"{name}={value}" for name, value in given.items() if value is not None)

    def sampling(self) -> dict[str, Any]:
        """The defaults of GenerationConfig that are set here."""
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "max_gen_len",
        )
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class _Cached:
    """The sequence in the KV cache and the tokens it holds."""

    seq: int
    tokens: list[int]


class ChatModule:
    """A model, ready to chat.

    Attributes:
        messages: the conversation so far, as dictionaries with "role" and "content".
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
    ) -> None:
        """Load a model.

        Args:
            model: a folder made by `convert_weight` and `gen_config` (or published in this form).
            device: "auto", "cpu" or "cuda".
            chat_config: replaces settings of the folder.
            model_lib: the compiled library; compiled now and cached if None. `model_lib_path` is
                another name for it.

        Raises:
            RelaxLMError: a folder, library or setting that is wrong; says what to do.
        """
        started = time.perf_counter()
        self.folder = Path(model)
        self.chat_config = _checked_config(chat_config)
        self.config = ChatConfigFile.load(self.folder)
        if self.chat_config.conv_template is not None:
            self.config = _with_template(self.config, self.chat_config.conv_template)
        self.tokenizer = Tokenizer.load(self.folder)
        self.prompts = PromptBuilder(self.config, self.tokenizer, str(self.folder))
        weights = WeightFolder(self.folder)
        self.library = self._library(model_lib or model_lib_path, device)
        limits = self.library.metadata.limits
        self._window = limits.sliding_window_size
        self.context_window_size = limits.context_window_size
        if wanted := self.chat_config.context_window_size:
            self.context_window_size = wanted
        page_size = self.library.metadata.kv_cache.page_size
        pages = pages_per_sequence(
            self.context_window_size,
            limits.prefill_chunk_size,
            page_size,
            self._window,
            limits.attention_sink_size,
        )
        # Each of several replies ends in a page of its own, and copies the prompt's last page.
        self.max_replies = 1 if self._window else min(limits.max_batch_size, MAX_REPLIES)
        pages += 2 * (self.max_replies - 1)
        self.executor = Executor(self.library, weights, pages)
        self.sequences = PagedSequences(
            PagePool(pages), page_size, self._window, limits.attention_sink_size
        )
        self.generator = Generator(self.executor, self.sequences, self.tokenizer)
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
        settings = self._settings(generation_config)
        if progress_callback is not None and settings.n > 1:
            raise RequestError(
                f"n = {settings.n} replies cannot be streamed to one progress_callback: ask for "
                "n = 1, or leave the callback out"
            )
        try:
            result = self._generate(prompt, settings, progress_callback, stateless)
        except BaseException as error:
            if progress_callback is not None:
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
        memory = self.executor.memory()
        return "\n".join(
            [
                text,
                f"prompt: {t.prompt_tokens} tokens, {t.reused_tokens} of them from the cache; "
                f"reply: {t.decode_tokens} tokens",
                f"memory: {format_bytes(memory.params)} parameters, up to "
                f"{format_bytes(memory.kv_cache)} KV cache "
                f"({self.library.metadata.kv_cache.dtype}), up to "
                f"{format_bytes(memory.temporary)} temporary",
                f"loaded in {self.load_seconds:.1f} s",
            ]
        )

    def benchmark_generate(self, prompt: str, generate_length: int) -> str:
        """Generate exactly `generate_length` tokens, whatever they are; the conversation stays.

        Returns:
            The text; `stats` has the speeds.
        """
        settings = GenerationConfig(
            max_tokens=generate_length, ignore_eos=True, temperature=0.0, stop=[]
        )
        ids = self.prompts.encode_text(prompt)
        # Stop strings of the model's template don't count either.
        return self._run(ids, settings, (), None).text

    def embed_text(self, text: str) -> np.ndarray:
        """The vectors that the first layer reads for a text: [tokens, hidden] float32."""
        chunk = self.library.metadata.limits.prefill_chunk_size
        ids = np.asarray(self.prompts.encode_text(text), np.int32)
        if not len(ids):
            raise RequestError("embed_text: the text has no tokens, expected at least one")
        return np.concatenate(
            [self.executor.embed(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
        )

    def _generate(
        self,
        prompt: str | Sequence[Message],
        settings: GenerationConfig,
        callback: StreamCallback | None,
        stateless: bool,
    ) -> str | list[str]:
        if isinstance(prompt, str):
            history = [] if stateless else self.messages
            messages: list[Message] = [*history, {"role": "user", "content": prompt}]
        else:
            messages = list(prompt)
        if self.prompts.source == "none":
            if len(messages) != 1:
                raise RequestError(
                    f"{self.folder} has no chat template, so a conversation cannot be continued: "
                    "give one prompt, or set --conv-template in gen_config"
                )
            ids = self.prompts.encode_text(str(messages[0]["content"]))
            self._check_fits(len(ids))
        else:
            messages, ids = self._fit(messages, settings)
        first = self._run(ids, settings, self.prompts.stop_strings, callback)
        if not stateless and self.prompts.source != "none":
            self.messages = [*messages, {"role": "assistant", "content": first.text}]
        texts = [reply.text for reply in self.replies]
        return texts if settings.n > 1 else texts[0]

    def _run(
        self,
        ids: list[int],
        settings: GenerationConfig,
        stop_strings: Sequence[str],
        callback: StreamCallback | None,
    ) -> Reply:
        """Generate from token ids, reusing what the cache holds of them."""
        if not ids:
            raise RequestError("the prompt has no tokens, expected at least one")
        cached = self._reusable(ids)
        room = self._room(len(ids), settings.n)
        try:
            self.replies, self.timings = self.generator.generate(
                cached.seq,
                ids,
                settings,
                self.prompts.stop_token_ids,
                stop_strings,
                room,
                (lambda reply, text: callback.on_token(text)) if callback else lambda *_: None,
            )
        except BaseException:
            self._drop_cache()  # it holds an unknown part of the prompt and the reply
            raise
        first = self.replies[0]
        self._cached = _Cached(cached.seq, [*ids, *first.tokens[:-1]])
        return first

    def _reusable(self, ids: list[int]) -> _Cached:
        """The cached sequence, cut back to what it has in common with a prompt."""
        if self._cached is not None:
            held = self._cached.tokens
            # The last token has to run: its logits choose the first token of the reply.
            common = next(
                (i for i, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b),
                min(len(held), len(ids)),
            )
            common = min(common, len(ids) - 1)
            if common and self.sequences.can_truncate(self._cached.seq, common):
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
        self.forgotten_messages = 0
        ids = self.prompts.encode(messages)
        if self._window:
            return messages, ids
        window = self.context_window_size
        reserve = min(settings.max_tokens or window // 4, window // 4)
        while len(ids) + reserve > window:
            shorter = _without_oldest_turn(messages)
            if shorter is None or self.chat_config.context_overflow == "error":
                break
            self.forgotten_messages += len(messages) - len(shorter)
            messages, ids = shorter, self.prompts.encode(shorter)
        self._check_fits(len(ids))
        return messages, ids

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
            return 2**31 - 1
        return max(1, (self.context_window_size - prompt) // n)

    def _settings(self, given: GenerationConfig | Mapping[str, Any] | None) -> GenerationConfig:
        if given is None:
            given = GenerationConfig()
        elif not isinstance(given, GenerationConfig):
            given = GenerationConfig(**given)
        file = self.config
        defaults: dict[str, Any] = {
            "temperature": file.temperature,
            "top_p": file.top_p,
            "repetition_penalty": file.repetition_penalty,
            "presence_penalty": file.presence_penalty,
            "frequency_penalty": file.frequency_penalty,
            "top_k": file.relaxlm.top_k,
            "min_p": file.relaxlm.min_p,
        }
        settings = given.merged({**defaults, **self.chat_config.sampling()})
        if settings.n > self.max_replies:
            why = "with a sliding window" if self._window else "with this library"
            raise RequestError(
                f"n = {settings.n}: at most {self.max_replies} at a time {why}; ask several times"
            )
        return settings

    def _library(self, path: str | Path | None, device: str) -> Library:
        if path is None:
            from relaxlm.runtime.jit import library_for

            return library_for(self.folder, device, self.chat_config.overrides())
        library = Library.load(path)
        info = library.metadata
        if device not in ("auto", info.target.kind):
            raise ConfigError(f"device {device!r}, but {path} was compiled for {info.target.kind}")
        if info.quantization != self.config.quantization:
            raise ConfigError(
                f"{path} was compiled for {info.quantization}, the weights in {self.folder} are "
                f"{self.config.quantization}; compile for this folder"
            )
        self._check_limits(library)
        return library

    def _check_limits(self, library: Library) -> None:
        limits = {
            **library.metadata.limits.model_dump(),
            "kv_cache_dtype": library.metadata.kv_cache.dtype,
        }
        for name, compiled in limits.items():
            wanted = getattr(self.chat_config, name, None)
            smaller = name == "context_window_size" and wanted is not None and wanted <= compiled
            if wanted not in (None, compiled) and not smaller:
                raise ConfigError(
                    f"chat_config: {name} = {wanted!r}, but {library.path} was compiled for "
                    f"{compiled!r}; compile again with --overrides, or leave it out"
                )


def _checked_config(given: ChatConfig | Mapping[str, Any] | None) -> ChatConfig:
    if isinstance(given, ChatConfig):
        return given
    try:
        return ChatConfig.model_validate(given or {})
    except ValidationError as error:
        raise ConfigError(f"chat_config: {explained(error)}") from None


def _with_template(config: ChatConfigFile, name: str) -> ChatConfigFile:
    """The configuration with a named template in place of the model's own."""
    section = config.relaxlm.model_copy(update={"chat_template": None})
    content = {**config.as_json(), "conv_template": name}
    content["relaxlm"] = section.model_dump(exclude_defaults=True)
    return ChatConfigFile.parse(content, "chat_config")


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
