"""Engine and AsyncEngine: the API without a server.

    with Engine("dist/qwen-q4f16_1") as engine:
        reply = engine.chat.completions.create(messages=[{"role": "user", "content": "Hello"}])
        print(reply.choices[0].message.content)
        for chunk in engine.chat.completions.create(messages=..., stream=True):
            print(chunk.choices[0].delta.content or "", end="")

Arguments of `create` are the fields of the HTTP API (docs/openai-api.md), and what comes back are
its replies as objects. Any number of threads, or of tasks, may ask at a time: the engine works on
all of their requests together.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from relaxlm.engine.config import EngineConfig, Mode
from relaxlm.engine.loop import EngineLoop
from relaxlm.engine.types import EngineStats
from relaxlm.errors import ConfigError
from relaxlm.openai_api.interfaces import (
    AsyncChat,
    AsyncCompletions,
    AsyncEmbeddings,
    AsyncResponses,
    Chat,
    Completions,
    Embeddings,
    Models,
    Responses,
)
from relaxlm.openai_api.runner import Runner
from relaxlm.openai_api.service import ApiService
from relaxlm.runtime.chat_settings import ChatConfig
from relaxlm.runtime.model import either_name


def _settings(mode: Mode | None, given: EngineConfig | Mapping[str, Any] | None) -> EngineConfig:
    if given is None:
        return EngineConfig() if mode is None else EngineConfig(mode=mode)
    if isinstance(given, EngineConfig):
        given = {name: getattr(given, name) for name in given.model_fields_set}
    if mode is not None and given.get("mode", mode) != mode:
        raise ConfigError(
            f"mode = {mode!r} and engine_config has mode = {given['mode']!r}: give one of them"
        )
    return EngineConfig(**{**given, **({} if mode is None else {"mode": mode})})


class _Base(ABC):
    """The engine and its API, for both interfaces."""

    def __init__(
        self,
        model: str | Path,
        device: str = "auto",
        model_lib: str | Path | None = None,
        mode: Mode | None = None,
        engine_config: EngineConfig | Mapping[str, Any] | None = None,
        chat_config: ChatConfig | Mapping[str, Any] | None = None,
        model_lib_path: str | Path | None = None,
        opt: str | None = None,
        threads: int | None = None,
        progress: Callable[[str, float], None] = lambda stage, share: None,
    ) -> None:
        """Load a model and start.

        Args:
            model: a folder made by `convert_weight` and `gen_config` (or published in this form).
            device: "auto", "cpu" or "cuda".
            model_lib: the compiled library; compiled now and cached if None. `model_lib_path` is
                another name for it.
            mode: "local" (the default), "interactive" or "server"; see `EngineConfig`.
            engine_config: sizes and limits, as an `EngineConfig` or its fields.
            chat_config: replaces settings of the folder.
            opt: as `relaxlm compile --opt` takes it; only without `model_lib`.
            threads: that kernels run on; one per usable core if None.
            progress: called with a stage's name and the share of the work done before it, if the
                library is compiled now.

        Raises:
            RelaxLMError: a folder, library or setting that is wrong; says what to do.
        """
        self.loop = EngineLoop.load(
            model,
            model_lib=either_name(model_lib, model_lib_path),
            device=device,
            config=_settings(mode, engine_config),
            chat_config=ChatConfig.of(chat_config),
            opt=opt,
            threads=threads,
            progress=progress,
        )
        self.service = ApiService(self.loop)
        self.models = Models(self.service)
        self._closed = False
        self._connect()

    @abstractmethod
    def _connect(self) -> None:
        """Make the attributes that have `create`."""

    def stats(self) -> EngineStats:
        """Counters since the start."""
        return self.loop.stats()

    def _end(self, drain: float) -> None:
        self.loop.close(drain)
        self.service.close()


class AsyncEngine(_Base):
    """A model that answers any number of tasks at a time. Errors are `ApiError`.

        async with AsyncEngine("dist/qwen-q4f16_1") as engine:
            reply = await engine.chat.completions.create(messages=[...])
            async for chunk in await engine.chat.completions.create(messages=[...], stream=True):
                ...

    A cancelled task, or a stream that is closed, ends its request at once. Ending the `async with`
    block, `terminate` or `close` ends the engine.

    Attributes:
        chat.completions, completions, responses, embeddings: each has a `create`.
        models: has a `list`.
    """

    def _connect(self) -> None:
        self.chat = AsyncChat(self.service)
        self.completions = AsyncCompletions(self.service)
        self.responses = AsyncResponses(self.service)
        self.embeddings = AsyncEmbeddings(self.service)

    async def terminate(self, drain: float = 0.0) -> None:
        """End: let requests go on for `drain` seconds, then cancel them."""
        if not self._closed:
            self._closed = True
            await asyncio.get_running_loop().run_in_executor(None, self._end, drain)

    close = terminate

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.terminate()


class Engine(_Base):
    """A model that answers any number of threads at a time. Errors are `ApiError`.

    See the module's example. A stream that is not read to its end is closed, by `close` or `with`,
    which ends its request; so does the garbage collector. Ending the `with` block, `terminate` or
    `close` ends the engine.

    Attributes:
        chat.completions, completions, responses, embeddings: each has a `create`.
        models: has a `list`.
    """

    def _connect(self) -> None:
        self._runner = Runner()
        self.chat = Chat(self.service, self._runner)
        self.completions = Completions(self.service, self._runner)
        self.responses = Responses(self.service, self._runner)
        self.embeddings = Embeddings(self.service, self._runner)

    def terminate(self, drain: float = 0.0) -> None:
        """End: let requests go on for `drain` seconds, then cancel them."""
        if not self._closed:
            self._closed = True
            self._end(drain)
            self._runner.close()

    close = terminate

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.terminate()
