"""Answers end where the chat template ends the assistant's turns."""

from pathlib import Path

import pytest

from relaxlm.runtime.template import ChatTemplate
from relaxlm.runtime.tokenizer import Tokenizer
from relaxlm.runtime.turn_end import turn_ends
from tests.runtime.tokenizer_samples import CHATML, byte_level_json
from tests.shared_data import SHARED, needs_shared_data

TURNS = "{% for m in messages %}{{ m.role + ': ' + m.content }}END{% endfor %}"


def ends(source: str, special: tuple[str, ...] = (), bos: str | None = None) -> set[str]:
    settings = {"additional_special_tokens": list(special)} | (
        {} if bos is None else {"bos_token": bos}
    )
    tokenizer = Tokenizer(byte_level_json().encode(), settings)
    found = turn_ends(ChatTemplate(source), tokenizer, {"bos_token": "<s>"})
    return {tokenizer.id_to_token(i) or "" for i in found}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, {"<|im_end|>"}),
        (TURNS.replace("END", "<end_of_turn>\n"), {"<end_of_turn>"}),
        (TURNS.replace("END", " <end_of_turn><|im_start|>"), {"<end_of_turn>"}),
        (TURNS.replace("END", "\n"), set()),
        (TURNS.replace("END", " end"), set()),
        ("{{ messages[0].content }}", set()),
        ("{{ raise_exception('tools only') }}", set()),
    ],
)
def test_the_token_behind_an_answer(source: str, expected: set[str]) -> None:
    assert ends(source, ("<end_of_turn>",)) == expected


def test_the_beginning_of_the_next_text_is_no_end() -> None:
    assert ends(TURNS.replace("END", "<|im_start|>")) == {"<|im_start|>"}
    assert ends(TURNS.replace("END", "<|im_start|>"), bos="<|im_start|>") == set()


def test_turns_of_several_messages() -> None:
    special = ("<|end|>", "<|return|>", "<|call|>", "<|channel|>", "<|message|>")
    source = TURNS.replace("END", "<|end|>") + "<|channel|><|message|>"
    assert ends(source, special) == {"<|return|>", "<|call|>"}


REAL = {
    "gemma/chat_template.gemma-2-2b-it.jinja": {"<end_of_turn>"},
    "gpt-oss/chat_template.jinja": {"<|return|>", "<|call|>"},
    "glm/chat_template.glm-4.5.jinja": set(),
    "llama-3/chat_template.Llama-3.3-70B-Instruct.jinja": {"<|eot_id|>"},
    "phi-3/chat_template.Phi-3.5-mini-instruct.jinja": {"<|end|>"},
    "smollm3/chat_template.jinja": {"<|im_end|>"},
}


@needs_shared_data
@pytest.mark.parametrize("name", REAL)
def test_templates_of_real_models(name: str) -> None:
    source = Path(SHARED / "tokenizers" / name).read_text(encoding="utf-8")
    assert (
        ends(source, tuple({token for tokens in REAL.values() for token in tokens})) == REAL[name]
    )
