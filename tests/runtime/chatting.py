"""What tests of ChatModule share: a callback that records, and what they ask."""

from collections.abc import Callable
from typing import Any

import pytest

from relaxlm import ChatModule
from relaxlm.runtime.streaming import StreamCallback

# Digits are tokens that never merge: a reply of digits has the same tokens when it comes back in
# the next prompt.
GREEDY = {"temperature": 0.0, "max_tokens": 12}


class Recorder(StreamCallback):
    def __init__(self, on_text: Callable[[str], None] = lambda text: None) -> None:
        super().__init__(callback_interval=1)
        self.pieces: list[str] = []
        self.ends: list[BaseException | None] = []
        self.on_text = on_text

    def text(self, delta: str) -> None:
        self.pieces.append(delta)
        self.on_text(delta)

    def ended(self, error: BaseException | None) -> None:
        self.ends.append(error)


def free_pages(chat: ChatModule) -> int:
    chat.sequences.check()
    return chat.sequences.pool.free


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def scripted(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    """Make the model say this."""
    from relaxlm.runtime.sampling import Sampled

    left = iter(tokens)
    monkeypatch.setattr(
        "relaxlm.runtime.generator.sample",
        lambda logits, states, *_: [Sampled(next(left), None, ()) for _ in states],
    )


def refused(error: type[Exception], act: Callable[[], Any]) -> str:
    with pytest.raises(error) as raised:
        act()
    assert type(raised.value) is error
    return str(raised.value)
