"""Replies on channels, as gpt-oss writes them, are one text in a chat."""

import json
import shutil
from pathlib import Path

import pytest

from relaxlm.engine.replies.harmony import TOKENS as HARMONY
from relaxlm.runtime.channels import channel_format, parted
from relaxlm.runtime.tokenizer import Tokenizer
from tests.runtime.chatting import Recorder, say, scripted
from tests.tiny_model import tokenizer_json

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final"
    "{% endif %}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
SETTINGS = {"eos_token": "<|return|>", "additional_special_tokens": list(HARMONY)}
ANALYSIS = "<|channel|>analysis<|message|>He says hi.<|end|><|start|>assistant"
REPLY = f"{ANALYSIS}<|channel|>final<|message|>Hello < you!"
SPELLED = "<think>\nHe says hi.\n</think>\n\nHello < you!"


def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_json().encode(), SETTINGS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (REPLY, SPELLED),
        ("<|channel|>final<|message|>Hello", "Hello"),
        (
            f"{ANALYSIS}{ANALYSIS}<|channel|>final<|message|>x",
            "<think>\nHe says hi.\nHe says hi.\n</think>\n\nx",
        ),
        ("<|channel|>analysis<|message|>cut", "<think>\ncut"),
        (
            "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant" + REPLY,
            f"Wait.\n\n{SPELLED}",
        ),
        ("plain", "plain"),
    ],
)
def test_the_text_of_a_reply(text: str, expected: str) -> None:
    found = channel_format({"default": TEMPLATE}, tokenizer())
    assert found is not None
    for pieces in ([text], list(text)):
        reply = found.new([])
        assert "".join(map(reply.push, pieces)) + reply.finish() == expected


def test_other_models_have_no_channels() -> None:
    assert channel_format({"default": "<|im_start|>"}, tokenizer()) is None
    plain = Tokenizer(tokenizer_json().encode(), {})
    assert channel_format({"default": "[THINK]<think>"}, plain) is None


@pytest.mark.parametrize(
    "marks", [("[THINK]", "[/THINK]"), ("<|inner_prefix|>", "<|inner_suffix|>")]
)
def test_special_tokens_around_the_reasoning(marks: tuple[str, str]) -> None:
    begin, end = marks
    special = Tokenizer(tokenizer_json().encode(), {"additional_special_tokens": list(marks)})
    found = channel_format({"default": f"{begin}{end}"}, special)
    ids = [special.token_to_id(mark) for mark in marks]
    assert found is not None and found.shown == set(ids)

    def read(text: str, prompt: list[int | None]) -> str:
        reply = found.new(prompt)
        return "".join(map(reply.push, text)) + reply.finish()

    assert read(f"{begin}hm{end}Hello", [5]) == "<think>\nhm\n</think>\n\nHello"
    assert read(f"hm{end}Hello", [5, ids[0]]) == "<think>\nhm\n</think>\n\nHello"
    assert read(f"hm{end}Hello", [5, ids[0], 7]) == "<think>\nhm\n</think>\n\nHello"
    assert read("Hello", [ids[0], 5, 7]) == "Hello"


def test_the_parts_of_a_text() -> None:
    assert parted(SPELLED) == {"content": "Hello < you!", "reasoning_content": "He says hi."}
    assert parted("Hello") == {"content": "Hello"}
    assert parted("<think>\ncut") == {"content": "", "reasoning_content": "cut"}


def test_a_chat_with_channels(tiny, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    path = folder / "mlc-chat-config.json"
    content = json.loads(path.read_text("utf-8"))
    content["relaxlm"] = {"chat_template": TEMPLATE}
    path.write_text(json.dumps(content), "utf-8")
    chat = load(folder)
    ids = chat.tokenizer.encode(REPLY, add_special_tokens=False)
    end = chat.tokenizer.token_to_id("<|return|>")
    scripted(monkeypatch, [*ids, end, *ids, end])
    stream = Recorder()
    assert chat.generate("hi", progress_callback=stream) == SPELLED
    assert "".join(stream.pieces) == SPELLED and len(stream.pieces) > 10
    answer = {"role": "assistant", "content": "Hello < you!", "reasoning_content": "He says hi."}
    assert chat.messages == [say("user", "hi"), answer]
    assert chat.replies[0].finish_reason == "stop"
    # A stop string is looked for in what is shown.
    assert chat.generate("hi", {"stop": " < "}).endswith("</think>\n\nHello")
    assert "He says" not in chat.prompts.text(chat.messages)
