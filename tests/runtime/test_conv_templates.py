import json
from typing import Any

import pytest
from pydantic import ValidationError

from relaxlm.errors import ConfigError, TemplateError
from relaxlm.runtime.conv_template_table import CONV_TEMPLATES, get_conv_template
from relaxlm.runtime.conv_templates import ConvTemplate
from relaxlm.runtime.tokenizer import Tokenizer
from tests.runtime.tokenizer_samples import byte_fallback_json, byte_level_json
from tests.shared_data import SHARED, needs_shared_data

USER = {"role": "user", "content": "2+2?"}
SYSTEM = {"role": "system", "content": "Be terse."}
REPLY = {"role": "assistant", "content": "4"}
AGAIN = {"role": "user", "content": "And\n3?"}
CHAT = [SYSTEM, USER, REPLY, AGAIN]


def rendered(name: str, messages: list[dict[str, Any]] = CHAT, **options: Any) -> str:
    return get_conv_template(name).template.render(messages, **options)


def test_the_parts_of_a_prompt() -> None:
    template = ConvTemplate(
        system_template="<S>{system_message}</S>",
        system_message="default",
        roles={"user": "U", "assistant": "A"},
        role_templates={"user": "({user_message})"},
        seps=["/u", "/a"],
        role_content_sep=": ",
        role_empty_sep=":",
    )
    assert template.render(CHAT) == "<S>Be terse.</S>U: (2+2?)/uA: 4/aU: (And\n3?)/uA:"
    assert template.render([USER], add_generation_prompt=False) == "<S>default</S>U: (2+2?)/u"
    assert template.render([SYSTEM, SYSTEM]) == "<S>Be terse.\n\nBe terse.</S>A:"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
            "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nAnd\n3?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "llama-2",
            "[INST] <<SYS>>\nBe terse.\n<</SYS>>\n\n2+2? [/INST] 4 </s><s>[INST] And\n3? [/INST]",
        ),
        ("redpajama_chat", "Be terse.<human>: 2+2?\n<bot>: 4\n<human>: And\n3?\n<bot>:"),
        ("vicuna_v1.1", "Be terse. USER: 2+2? ASSISTANT: 4</s>USER: And\n3? ASSISTANT:"),
        (
            "tinyllama_v1_0",
            "<|system|>\nBe terse.</s>\n<|user|>\n2+2?</s>\n<|assistant|>\n4</s>\n<|user|>\n"
            "And\n3?</s>\n<|assistant|>\n",
        ),
        ("mistral_default", "[INST] Be terse.\n\n2+2? [/INST] 4</s>[INST] And\n3? [/INST]"),
        (
            "ministral3",
            "[SYSTEM_PROMPT]Be terse.[/SYSTEM_PROMPT][INST]2+2?[/INST]4</s>[INST]And\n3?[/INST]",
        ),
        ("LM", "Be terse.2+2?4And\n3?"),
        ("phi-2", "Be terse.Instruct: 2+2?\nOutput: 4\nInstruct: And\n3?\nOutput:"),
        ("orion", "Be terse.Human: 2+2?\n\nAssistant: 4</s>Human: And\n3?\n\nAssistant: </s>"),
    ],
)
def test_prompts_of_named_templates(name: str, expected: str) -> None:
    assert rendered(name) == expected


# Named template -> a template of the same family in the reference renderings.
SAME = {
    "qwen2": "qwen2/tokenizer_config.qwen2.5.json",
    "qwen3": "qwen2/chat_template.Qwen3-0.6B.jinja",
    "chatml": "qwen2/tokenizer_config.qwen3.json",
    "llama-3": "llama-3/tokenizer_config.json",
    "phi-3": "phi-3/tokenizer_config.json",
    "phi-4": "phi-4/tokenizer_config.json",
    "glm-4.5": "glm/chat_template.glm-4.5.jinja",
    "ministral3": "mistral/chat_template.v7.jinja",
    "deepseek_r1_llama": "deepseek/chat_template.deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja",
}


@needs_shared_data
@pytest.mark.parametrize("name", SAME)
def test_the_model_s_own_template_writes_the_same(name: str) -> None:
    expected, conversations = _reference(SAME[name])
    entry = get_conv_template(name)
    text = entry.template.render(conversations["system_multi"]["messages"])
    assert "".join(entry.begin) + text == expected["system_multi"]


@needs_shared_data
def test_known_differences_from_the_model_s_own_template() -> None:
    # Gemma 1 and 2 refuse system messages, which the named template writes in front.
    expected, conversations = _reference("gemma/chat_template.gemma-2-2b-it.jinja")
    user = conversations["user"]["messages"]
    assert "<bos>" + rendered("gemma_instruction", user) == expected["user"]
    assert "System role not supported" in expected["system_multi"]["error"]

    # Llama 3.1 to 3.3 write dates in front of the system message.
    expected, conversations = _reference("llama-3/chat_template.Llama-3.1-8B-Instruct.jinja")
    multi = conversations["system_multi"]["messages"]
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    ours = "<|begin_of_text|>" + rendered("llama-3_1", multi)
    assert ours == expected["system_multi"].replace(dates, "")

    # SmolLM3's writes a date, too.
    expected, conversations = _reference("smollm3/chat_template.jinja")
    multi = conversations["system_multi"]["messages"]
    date = "Today Date: 26 Jul 2024\n"
    assert rendered("smollm3", multi) == expected["system_multi"].replace(date, "")

    # gpt-oss's does, and speaks of functions that are not there; this one is of an early release.
    expected, conversations = _reference("gpt-oss/chat_template.jinja")
    multi = conversations["system_multi"]["messages"]
    theirs = expected["system_multi"]
    for text, later in {
        "Current date: 2024-07-26\n": "",
        "reasoning:": "Reasoning:",
        "\nCalls to these tools must go to the commentary channel: 'functions'.": "",
        "terse assistant.": "terse assistant.\n\n",
        "assistant<|message|>": "assistant<|channel|>final<|message|>",
    }.items():
        assert text in theirs
        theirs = theirs.replace(text, later)
    assert rendered("gpt-oss", multi) == theirs

    # Mistral's puts a system message in front of the last question.
    expected, conversations = _reference("mistral/chat_template.v3.jinja")
    multi = conversations["system_multi"]["messages"]
    instruction = "You are a terse assistant.\n\n"
    ours = "<s>" + rendered("mistral_v3", multi)
    assert instruction in ours
    assert ours.replace(instruction, "") == expected["system_multi"].replace(instruction, "")

    # mistral-common puts no space in front of an answer, whose tokens begin with one anyway.
    expected, conversations = _reference("mistral/chat_template.v1.jinja")
    multi = conversations["system_multi"]["messages"]
    ours = "<s>" + rendered("mistral_default", multi)
    assert ours.replace("[/INST] ", "[/INST]") == expected["system_multi"]


def _reference(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    path = SHARED / "tokenizers" / "chat_template_expected.json"
    content = json.loads(path.read_text("utf-8"))
    return content["templates"][name]["rendered"], content["conversations"]


def test_reasoning_is_dropped_from_earlier_answers_only() -> None:
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}
    assert "hm" not in rendered("qwen3", [USER, thought, AGAIN])
    assert "\n4<|im_end|>" in rendered("qwen3", [USER, thought, AGAIN])
    assert "hm" in rendered("qwen3", [USER, thought], add_generation_prompt=False)
    assert "hm" in rendered("qwen2", [USER, thought, AGAIN])


def test_tools_stand_with_the_last_user_message() -> None:
    tools = [{"name": "weather"}]
    text = rendered("gorilla", [USER, REPLY, AGAIN], tools=tools)
    assert "<<question>> 2+2? <<function>> \n" in text
    assert '<<question>> And\n3? <<function>> [{"name": "weather"}]\n' in text
    hermes = get_conv_template("chatml").template.model_copy(
        update={"system_message": "Tools: {hermes_tools}"}
    )
    assert 'Tools: [{"name": "weather"}]<|im_end|>' in hermes.render([USER], tools=tools)
    with pytest.raises(TemplateError) as caught:
        rendered("chatml", [USER], tools=tools)
    assert str(caught.value) == "conversation template chatml has no place for tools"


def test_a_role_that_a_template_lacks() -> None:
    with pytest.raises(TemplateError) as caught:
        rendered("llama-3", [USER, {"role": "tool", "content": "18 C"}])
    assert str(caught.value) == (
        "conversation template llama-3 has no role 'tool'; its roles: system, user, assistant"
    )
    assert "ipython<|end_header_id|>\n\n18 C" in rendered(
        "llama-3_1", [USER, {"role": "tool", "content": "18 C"}]
    )


def test_content_that_is_not_text() -> None:
    with pytest.raises(TemplateError) as caught:
        rendered("chatml", [{"role": "user", "content": [{"type": "image_url"}]}])
    assert str(caught.value) == (
        "a user message's content is of type list: conversation templates take text"
    )
    assert rendered("LM", [{"role": "user", "content": None}]) == ""


def test_the_template_s_own_turns_come_first() -> None:
    template = get_conv_template("redpajama_chat").template.model_copy(
        update={"messages": [("user", "Hi"), ("assistant", "Hello"), ("user", None)]}
    )
    assert template.render([USER]) == "<human>: Hi\n<bot>: Hello\n<human>: 2+2?\n<bot>:"


def test_an_unknown_name_is_answered_with_all_names() -> None:
    with pytest.raises(ConfigError) as caught:
        get_conv_template("chatlm")
    assert str(caught.value) == (
        f"conversation template 'chatlm' is not known. Known are: {', '.join(CONV_TEMPLATES)}"
    )
    for name in """
        chatml chatml_nosystem llama-2 llama-3 llama-3_1 mistral_default redpajama_chat phi-2 phi-3
        phi-4 gemma_instruction gemma3_instruction qwen2 qwen3 deepseek deepseek_r1_qwen
        tinyllama_v1_0 vicuna_v1.1 LM gpt2 wizardlm_7b wizard_coder_or_math codellama_instruct
        codellama_completion open_hermes_mistral neural_hermes_mistral hermes2_pro_llama3
        hermes3_llama-3_1 glm olmo orion stablelm stablelm-2 aya-23
    """.split():
        assert name in str(caught.value)


@pytest.mark.parametrize("name", CONV_TEMPLATES)
def test_every_named_template_writes_a_chat_and_survives_json(name: str) -> None:
    entry = get_conv_template(name)
    text = entry.template.render(CHAT)
    assert all(part in text for part in ("Be terse.", "2+2?", "4", "And\n3?"))
    assert "{" not in text.replace("{}", "")
    assert ConvTemplate.model_validate(json.loads(entry.template.model_dump_json())) == (
        entry.template
    )
    assert entry.stop


def test_tokens_are_found_in_the_model_s_own_vocabulary() -> None:
    level, fallback = (
        Tokenizer(byte_level_json().encode()),
        Tokenizer(byte_fallback_json().encode()),
    )
    qwen = get_conv_template("qwen2")
    assert qwen.resolve(level).stop_token_ids == [0, 2]
    assert qwen.resolve(level).system_prefix_token_ids is None
    assert qwen.resolve(fallback).stop_token_ids == []
    assert get_conv_template("llama-2").resolve(fallback).system_prefix_token_ids == [1]
    assert get_conv_template("llama-2").resolve(fallback).stop_token_ids == [2]


def test_published_templates_with_lost_stop_strings() -> None:
    template = ConvTemplate(
        roles={"user": "user", "assistant": "assistant"}, seps=["\n"], stop_str=["", "</s>"]
    )
    assert template.stop_str == ["</s>"]


@pytest.mark.parametrize(
    "change",
    [{"seps": []}, {"seps": ["a", "b", "c"]}, {"roles": {"user": "u"}}, {"separator": "x"}],
)
def test_objects_that_are_no_template(change: dict[str, Any]) -> None:
    valid = {"roles": {"user": "u", "assistant": "a"}, "seps": ["\n"]}
    with pytest.raises(ValidationError):
        ConvTemplate.model_validate(valid | change)
