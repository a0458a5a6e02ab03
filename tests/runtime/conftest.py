"""ChatModule on the tiny random model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relaxlm import ChatModule
from tests.runtime.chatting import GREEDY
from tests.tiny_model import TinyModel


@pytest.fixture(scope="module")
def load(tiny: TinyModel) -> Callable[..., ChatModule]:
    def make(folder: Path = tiny.folder, library: Path = tiny.library, **options) -> ChatModule:
        return ChatModule(folder, "cpu", model_lib=library, **options)

    return make


@pytest.fixture(scope="module")
def loaded(load) -> ChatModule:
    return load()


@pytest.fixture
def chat(loaded: ChatModule) -> ChatModule:
    loaded.reset_chat()
    return loaded


@pytest.fixture
def digits(chat: ChatModule) -> dict[str, Any]:
    """Greedy settings that allow only digits."""
    return {**GREEDY, "logit_bias": {chat.tokenizer.token_to_id(d): 100.0 for d in "0123456789"}}
