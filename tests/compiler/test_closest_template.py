import pytest

from relaxlm.compiler.closest_template import OF_FAMILY, PROBES, closest_template
from relaxlm.models import MODELS
from relaxlm.runtime.conv_template_table import CONV_TEMPLATES
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
        # The only one of its family, if the vocabulary has its tokens.
        ("{{ raise_exception('tools only') }}", LEVEL, "smollm3", "smollm3", 0, None),
        ("{{ raise_exception('tools only') }}", FALLBACK, "smollm3", "LM", 0, None),
        ("{{ raise_exception('tools only') }}", LEVEL, "qwen3_5", "chatml", 0, None),
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


# Of these there are base models and encoders only.
WITHOUT_CHAT = {
    *("bert", "bloom", "gpt2", "gpt_bigcode", "gptj", "mamba2", "opt", "roberta", "xlm-roberta"),
}
# These bring a chat template whose format no other tool has a name for.
WITHOUT_NAME = {"apertus", "cohere2", "exaone4", "falcon", "hunyuan_v1_dense", "seed_oss"}


def test_every_architecture_has_names_or_no_chat_models() -> None:
    assert set(MODELS) == {*OF_FAMILY, *WITHOUT_CHAT, *WITHOUT_NAME}
    assert {name for names in OF_FAMILY.values() for name in names} <= set(CONV_TEMPLATES)


# What models' own templates write: in front of all, around a system message, around a question,
# around an answer, in front of an answer to come.
WRITTEN: dict[str, tuple[str, tuple[str, str], tuple[str, str], tuple[str, str], str]] = {
    "granite": (
        "",
        ("<|start_of_role|>system<|end_of_role|>", "<|end_of_text|>\n"),
        ("<|start_of_role|>user<|end_of_role|>", "<|end_of_text|>\n"),
        ("<|start_of_role|>assistant<|end_of_role|>", "<|end_of_text|>\n"),
        "<|start_of_role|>assistant<|end_of_role|>",
    ),
    "chatglm3": (
        "[gMASK]sop",
        ("<|system|>\n ", ""),
        ("<|user|>\n ", ""),
        ("<|assistant|>\n ", ""),
        "<|assistant|>",
    ),
    "glm-4": (
        "[gMASK]<sop>",
        ("<|system|>\n", ""),
        ("<|user|>\n", ""),
        ("<|assistant|>\n", ""),
        "<|assistant|>",
    ),
    "kimi_k2": (
        "",
        ("<|im_system|>system<|im_middle|>", "<|im_end|>"),
        ("<|im_user|>user<|im_middle|>", "<|im_end|>"),
        ("<|im_assistant|>assistant<|im_middle|>", "<|im_end|>"),
        "<|im_assistant|>assistant<|im_middle|>",
    ),
    "minimax_m2": (
        "]~!b[",
        ("]~b]system\n", "[e~[\n"),
        ("]~b]user\n", "[e~[\n"),
        ("]~b]ai\n", "[e~[\n"),
        "]~b]ai\n<think>\n",
    ),
    "ernie-4.5": (
        "<|begin_of_sentence|>",
        ("", "\n"),
        ("User: ", "\n"),
        ("Assistant: ", "<|end_of_sentence|>"),
        "Assistant: ",
    ),
    "dots1": (
        "",
        ("<|system|>", "<|endofsystem|>"),
        ("<|userprompt|>", "<|endofuserprompt|>"),
        ("<|response|>", "<|endofresponse|>"),
        "<|response|>",
    ),
    "phi-4-14b": (
        "",
        ("<|im_start|>system<|im_sep|>", "<|im_end|>"),
        ("<|im_start|>user<|im_sep|>", "<|im_end|>"),
        ("<|im_start|>assistant<|im_sep|>", "<|im_end|>"),
        "<|im_start|>assistant<|im_sep|>",
    ),
    "nemotron_nano_v2": (
        "",
        ("<SPECIAL_10>System\n", "\n\n"),
        ("<SPECIAL_11>User\n", "\n"),
        ("<SPECIAL_11>Assistant\n", "\n<SPECIAL_12>\n"),
        "<SPECIAL_11>Assistant\n<think>\n",
    ),
    "minicpm": ("<s>", ("", ""), ("<用户>", ""), ("<AI>", ""), "<AI>"),
    "internlm2": (
        "<s>",
        ("<|im_start|>system\n", "<|im_end|>\n"),
        ("<|im_start|>user\n", "<|im_end|>\n"),
        ("<|im_start|>assistant\n", "<|im_end|>\n"),
        "<|im_start|>assistant\n",
    ),
    "lfm2": (
        "<|startoftext|>",
        ("<|im_start|>system\n", "<|im_end|>\n"),
        ("<|im_start|>user\n", "<|im_end|>\n"),
        ("<|im_start|>assistant\n", "<|im_end|>\n"),
        "<|im_start|>assistant\n",
    ),
    "aya-23": (
        "<BOS_TOKEN>",
        ("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_templates_of_families(name: str) -> None:
    begin, system, user, assistant, to_come = WRITTEN[name]
    turns = {"system": system, "user": user, "assistant": assistant}
    source = (
        f"{{% set turns = {turns!r} %}}{{{{ {begin!r} }}}}{{% for m in messages %}}"
        "{{ turns[m.role][0] + m.content + turns[m.role][1] }}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {to_come!r} }}}}{{% endif %}}"
    )
    found = closest_template(ChatTemplate(source), LEVEL, "other")
    assert found.template.name == name
    # Without a system message, a named template writes its default one.
    assert found.alike == (3 if name == "minicpm" else 1)


def test_a_token_gives_the_family_away() -> None:
    source = "{{ raise_exception('tools only') }}"
    for token, name in {"<|channel|>": "gpt-oss", "<|start_of_role|>": "granite"}.items():
        settings = {"additional_special_tokens": [token, "<|end|>"]}
        tokenizer = Tokenizer(byte_level_json().encode(), settings)
        found = closest_template(ChatTemplate(source), tokenizer, "other")
        assert (found.template.name, found.alike) == (name, 0)
