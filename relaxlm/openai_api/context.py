"""What all services share: the engine, its model's names, threads for slow work."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from relaxlm.engine.replies import ReplyFormat, reply_format
from relaxlm.engine.types import Update
from relaxlm.errors import BusyError, RequestError
from relaxlm.openai_api.errors import ApiError
from relaxlm.versions import RELAXLM_VERSION

if TYPE_CHECKING:
    from relaxlm.engine.grammar import GrammarCompiler
    from relaxlm.engine.loop import EngineLoop
    from relaxlm.runtime.model import ServedModel

Result = TypeVar("Result")

# Tokenizing, templates and grammars; none of them holds the others up for long.
_THREADS = 4
_FINGERPRINT_LETTERS = 12
# Tokens whose bytes are remembered, for log probabilities.
_REMEMBERED = 16384


class ServiceContext:
    """
    Attributes:
        name: what the model is called in replies.
        created: when the service was started, seconds since 1970.
        fingerprint: of code, library, weights and settings.
        token_bytes: of the tokenizer, remembered.
    """

    def __init__(
        self,
        engine: EngineLoop,
        name: str | None = None,
        strict_model_name: bool = False,
        on_update: Callable[[Update], None] | None = None,
    ) -> None:
        self.engine, self.model = engine, engine.model
        self.name = name or engine.model.name
        self.strict_model_name, self.on_update = strict_model_name, on_update
        self.created, self.fingerprint = now(), fingerprint(self.model)
        self.token_bytes = lru_cache(_REMEMBERED)(self.model.tokenizer.token_bytes)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="relaxlm-prepare")

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def in_thread(self, call: Callable[..., Result], *args: Any) -> Result:
        """Run slow work beside the event loop.

        Raises:
            BusyError: the service is closed.
        """
        try:
            work = asyncio.get_running_loop().run_in_executor(self._pool, call, *args)
        except RuntimeError:
            raise BusyError("the engine has ended", closing=True) from None
        return await work

    def check_model(self, asked: str | None) -> None:
        """
        Raises:
            ApiError: another model than the loaded one, if names are taken strictly.
        """
        if self.strict_model_name and asked is not None and asked != self.name:
            raise ApiError(
                f"model = {asked!r} is not here: this server has {self.name!r}",
                404,
                param="model",
                code="model_not_found",
            )

    def check_writes(self) -> None:
        """
        Raises:
            ApiError: the model makes vectors of texts and writes no replies.
        """
        try:
            self.model.refuse_embedding_model()
        except RequestError as error:
            raise ApiError(str(error), param="model", code="model_not_supported") from None

    def reads(self, name: str) -> bool:
        """Whether the model's chat templates speak of a variable, key or role of this name."""
        return any(
            re.search(rf"\b{re.escape(name)}\b", source)
            for source in self.model.prompts.sources.values()
        )

    @cached_property
    def replies(self) -> ReplyFormat:
        """How the model writes reasoning and tool calls."""
        return reply_format(self.model.prompts.sources, self.model.tokenizer)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        from relaxlm.engine.grammar import GrammarCompiler  # here: llguidance may not be installed

        prompts = self.model.prompts
        return GrammarCompiler(self.model.tokenizer, self.model.vocab_size, prompts.stop_token_ids)


def fingerprint(model: ServedModel) -> str:
    """Changes whenever the code, the library, the weights or their settings do."""
    digest = hashlib.sha256(RELAXLM_VERSION.encode())
    digest.update(model.library.path.read_bytes())
    for name in ("tensor-cache.json", "ndarray-cache.json", "mlc-chat-config.json"):
        path = model.folder / name
        if path.is_file():
            digest.update(path.read_bytes())
    return f"relaxlm-{RELAXLM_VERSION}-{digest.hexdigest()[:_FINGERPRINT_LETTERS]}"


def new_id(prefix: str) -> str:
    """Such as "chatcmpl-" and 32 letters that nobody guesses."""
    return f"{prefix}{secrets.token_hex(16)}"


def now() -> int:
    """Seconds since 1970, as replies have it."""
    return int(time.time())
