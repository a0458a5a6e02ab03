import json
from typing import Any

import pytest

from relaxlm.compiler import sentencepiece
from relaxlm.errors import RequestError, TemplateError
from relaxlm.runtime.chat_config import ChatConfigFile
from relaxlm.runtime.prompt import PromptBuilder
from relaxlm.runtime.tokenizer import Tokenizer
from tests.runtime.tokenizer_samples import CHATML, byte_fallback_json, byte_level_json
from tests.shared_data import SHARED, needs_shared_data

HELLO = [{"role": "user", "content": "the lazy dog"}]
TEMPLATE = {
    "name": "test",
    "system_prefix_token_ids": [1],
    "roles": {"user": "", "assistant": "ox"},
    "seps": [" "],
    "stop_str": ["the"],
    "stop_token_ids": [7],
}


def config(**changes: Any) -> ChatConfigFile:
    content = {
        "model_type": "llama",
        "quantization": "q0f32",
        "model_config": {},
        "vocab_size": 320,
        "context_window_size": 128,
        "eos_token_id": [3, 4],
    }
    return ChatConfigFile.parse(content | changes)


def level(settings: dict[str, Any] | None = None) -> Tokenizer:
    return Tokenizer(byte_level_json().encode(), settings or {"eos_token": "<|im_end|>"})


def fallback(settings: dict[str, Any] | None = None) -> Tokenizer:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(byte_fallback_json().encode(), names | (settings or {}))


def test_the_chat_template_comes_before_the_conv_template() -> None:
    both = config(relaxlm={"chat_template": CHATML}, conv_template=TEMPLATE)
    builder = PromptBuilder(both, level())
    text = "<|im_start|>user\nthe lazy dog<|im_end|>\n<|im_start|>assistant\n"
    assert builder.source == "chat_template"
    assert builder.text(HELLO) == text
    assert builder.encode(HELLO) == level().encode(text)
    assert builder.encode(HELLO)[0] == 1
    assert (
        builder.text(HELLO, add_generation_prompt=False) == text[: -len("<|im_start|>assistant\n")]
    )
    # The conv_template's stop tokens belong to its format; the model's own always hold.
    assert builder.stop_token_ids == {2, 3, 4}
    assert builder.stop_strings == ()


def test_a_conv_template_gets_its_leading_tokens_once() -> None:
    builder = PromptBuilder(config(conv_template=TEMPLATE), fallback())
    assert builder.source == "conv_template"
    assert builder.text(HELLO) == "the lazy dog ox"
    ids = fallback().encode("the lazy dog ox", add_special_tokens=False)
    assert builder.encode(HELLO) == [1, *ids]
    assert builder.stop_token_ids == {2, 3, 4, 7}
    assert builder.stop_strings == ("the",)
    spelled = PromptBuilder(config(conv_template=TEMPLATE | {"system_message": "<s>"}), fallback())
    assert spelled.text(HELLO) == "<s>the lazy dog ox"
    assert spelled.encode(HELLO).count(1) == 1


def test_a_chat_template_decides_on_bos_by_itself() -> None:
    with_bos = config(relaxlm={"chat_template": "{{ bos_token }}{{ messages[0].content }}"})
    without = config(relaxlm={"chat_template": "{{ messages[0].content }}"})
    the = fallback().encode("the lazy dog", add_special_tokens=False)
    assert PromptBuilder(with_bos, fallback()).encode(HELLO) == [1, *the]
    assert PromptBuilder(without, fallback()).encode(HELLO) == the


def test_special_tokens_of_the_section_serve_folders_without_tokenizer_config() -> None:
    section = {
        "chat_template": "{{ bos_token }}|{{ eos_token }}",
        "special_tokens": {"bos_token": "B"},
    }
    assert PromptBuilder(config(relaxlm=section), level()).text(HELLO) == "B|<|im_end|>"


def test_plain_prompts_have_one_bos() -> None:
    builder = PromptBuilder(config(), fallback())
    assert builder.encode_text("the")[0] == 1
    assert builder.encode_text("<s>the") == builder.encode_text("the")
    assert PromptBuilder(config(), fallback({"add_bos_token": False})).encode_text("the") == (
        fallback().encode("the", add_special_tokens=False)
    )
    assert PromptBuilder(config(), level()).encode_text("the") == level().encode("the")


def test_several_templates_and_variables() -> None:
    templates = {"default": "D{{ mood }}", "tool_use": "T{{ tools[0].name }}"}
    builder = PromptBuilder(config(relaxlm={"chat_template": templates}), level())
    assert builder.text(HELLO, variables={"mood": "!"}) == "D!"
    assert builder.text(HELLO, tools=[{"name": "f"}]) == "Tf"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    builder = PromptBuilder(config(conv_template=TEMPLATE), fallback())
    assert builder.text([{"role": "user", "content": parts}]) == "a\nb ox"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "the conversation has no messages"),
        (["hi"], "message 0 is 'hi': expected an object with role and content"),
        (
            [*HELLO, {"content": "x"}],
            "message 1 is {'content': 'x'}: expected an object with role and content",
        ),
        ([{"role": "user", "content": 5}], "message 0 has the content 5: expected text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "message 0 has content of a kind other than text, which this model cannot read",
        ),
    ],
)
def test_messages_of_another_shape(messages: list[Any], expected: str) -> None:
    builder = PromptBuilder(config(conv_template=TEMPLATE), fallback())
    with pytest.raises(RequestError) as caught:
        builder.text(messages)
    assert str(caught.value) == expected


def test_errors_name_the_folder_and_the_template() -> None:
    text = "{{ raise_exception('only users') }}"
    builder = PromptBuilder(config(relaxlm={"chat_template": text}), level(), "dist/model")
    with pytest.raises(TemplateError) as caught:
        builder.encode(HELLO)
    assert str(caught.value) == (
        "dist/model: chat template 'default': line 1: refuses this conversation: only users"
    )


def test_a_model_without_any_template() -> None:
    builder = PromptBuilder(config(), level())
    assert builder.source == "none"
    with pytest.raises(TemplateError) as caught:
        builder.text(HELLO)
    assert str(caught.value) == (
        "the model's folder has neither a chat template nor a conv_template, so only plain prompts "
        "can be continued. `relaxlm gen_config --conv-template NAME` sets one."
    )


# Chat requests with the ids of Mistral's own tokenizer: version -> vocabulary and samples. Left out
# are get_weather_*, whose requests the published templates order in another way.
MISTRAL = {
    "v1": ("v1", ["no_tools"]),
    "v2": ("v3", ["no_tools", "several_calls"]),
    "v3": ("v3", ["no_tools", "several_calls", "parallel_calls"]),
}


@needs_shared_data
@pytest.mark.parametrize("version", MISTRAL)
def test_ids_of_real_chat_requests(version: str) -> None:
    folder = SHARED / "tokenizers" / "mistral"
    vocabulary, samples = MISTRAL[version]
    content = (folder / f"tokenizer.model.{vocabulary}").read_bytes()
    model = sentencepiece.parse_model(content, vocabulary)
    settings = sentencepiece.special_tokens(model)
    tokenizer = Tokenizer(json.dumps(sentencepiece.convert(model, settings)).encode(), settings)
    for sample in samples:
        request = json.loads((folder / "samples" / sample / "sample.json").read_text("utf-8"))
        path = folder / "samples" / sample / f"tokens_{version}.json"
        if version == "v1":
            # The published template leaves out the space that begins an answer's first token.
            chosen = config(conv_template="mistral_default", conv_config={"system_template": ""})
        else:
            source = (folder / f"chat_template.{version}.jinja").read_text("utf-8")
            chosen = config(relaxlm={"chat_template": source})
        tools = request.get("tools") or None
        ids = PromptBuilder(chosen, tokenizer).encode(request["messages"], tools=tools)
        assert ids == json.loads(path.read_text("utf-8"))["tokens"]
