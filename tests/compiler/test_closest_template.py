import pytest

from relaxlm.compiler.closest_template import PROBES, closest_template
from relaxlm.runtime.template import ChatTemplate
from relaxlm.runtime.tokenizer import Tokenizer
from tests.runtime.tokenizer_samples import CHATML, byte_fallback_json, byte_level_json

LEVEL = Tokenizer(byte_level_json().encode())
FALLBACK = Tokenizer(byte_fallback_json().encode(), {"bos_token": "<s>", "eos_token": "</s>"})
LLAMA_2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set lead = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set lead = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (lead if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s><s>' }}{% endif %}{% endfor %}"
)
DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nI am Ada.<|im_end|>\n{% endif %}"
    + CHATML
)


@pytest.mark.parametrize(
    ("source", "tokenizer", "model_type", "name", "alike", "message"),
    [
        (DEFAULT, LEVEL, "llama", "chatml", 3, "I am Ada."),
        (DEFAULT, LEVEL, "qwen2", "qwen2", 3, "I am Ada."),
        (CHATML, LEVEL, "qwen3", "qwen3", 1, "You are a helpful assistant."),
        (LLAMA_2, FALLBACK, "llama", "llama-2", 1, None),
        # Alike but for spaces.
        (CHATML.replace("'<|im_end|>\n'", "'<|im_end|>'"), LEVEL, "llama", "chatml", 0, None),
        # One conversation alike is chance; the vocabulary says more.
        (
            "{% if messages | length == 1 %}<s>[INST] {{ messages[0].content }} [/INST]{% endif %}",
            LEVEL,
            "llama",
            "chatml",
            0,
            None,
        ),
        ("{{ raise_exception('tools only') }}", FALLBACK, "llama", "LM", 0, ""),
    ],
)
def test_the_named_template_for_a_chat_template(
    source: str, tokenizer: Tokenizer, model_type: str, name: str, alike: int, message: str | None
) -> None:
    found = closest_template(ChatTemplate(source), tokenizer, model_type)
    assert (found.template.name, found.alike) == (name, alike)
    if message is not None:
        assert found.template.system_message == message


def test_alike_means_the_same_text() -> None:
    found = closest_template(ChatTemplate(DEFAULT), LEVEL, "llama")
    for probe in PROBES:
        assert found.template.render(probe) == ChatTemplate(DEFAULT).render(probe)
