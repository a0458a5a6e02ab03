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


def tool(name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


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
    templates["tool_use"] = "T{{ tools[0].function.description }}"
    builder = PromptBuilder(config(relaxlm={"chat_template": templates}), level())
    assert builder.text(HELLO, tools=[tool(description="f")]) == "Tf"


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
# are get_weather_*, where a tool's result is JSON, and in v2 parallel_calls, which has two results
# in a row: Mistral's own tokenizer writes the first as an object and the second as one list, and
# the published templates write them as text and one by one.
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


# Tools

CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "f", "arguments": '{"ä": "<1>"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
]
WRITES_TOOLS = (
    "{% for t in tools or [] %}<{{ t.function.name }}:{{ t.function.description }}>{% endfor %}"
)
WRITES_CALLS = (
    "{% for m in messages %}{{ m.role }}={{ m.content }};"
    "{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments | tojson }});"
    "{% endfor %}{% endfor %}"
)


def with_template(source: str) -> PromptBuilder:
    return PromptBuilder(config(relaxlm={"chat_template": source}), level(), "dist/m")


def test_calls_and_results_in_the_shape_of_clients() -> None:
    builder = with_template(WRITES_TOOLS + WRITES_CALLS)
    assert builder.text(CALLS, tools=[tool(description="F")]) == (
        '<f:F>user=hi;assistant=;f({"ä": "<1>"});tool=sunny;'
    )
    as_object = json.loads(json.dumps(CALLS))
    as_object[1]["tool_calls"][0]["function"]["arguments"] = {"ä": "<1>"}
    assert builder.text(as_object) == builder.text(CALLS)


@pytest.mark.parametrize("calls", [None, []])
def test_no_calls_are_no_calls(calls: Any) -> None:
    message = {"role": "assistant", "content": "x", "tool_calls": calls}
    builder = with_template("{{ 'tool_calls' in messages[0] }}")
    assert builder.text([message]) == "False"


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("x", "tool_calls[0] is no call of a function: expected an object with function"),
        ({}, "tool_calls[0] is no call of a function: expected an object with function"),
        ({"function": {}}, "tool_calls[0].function.name is missing: expected text"),
        (
            {"function": {"name": "f", "arguments": "{"}},
            "tool_calls[0].function.arguments is not JSON: Expecting property name enclosed in "
            "double quotes: line 1 column 2 (char 1)",
        ),
        (
            {"function": {"name": "f", "arguments": "[1]"}},
            "tool_calls[0].function.arguments is of type list: expected a JSON object",
        ),
    ],
)
def test_calls_of_another_shape(call: Any, expected: str) -> None:
    message = {"role": "assistant", "tool_calls": [call]}
    with pytest.raises(RequestError) as caught:
        with_template(WRITES_CALLS).text([*HELLO, message])
    assert str(caught.value) == f"message 1: {expected}"


def test_calls_without_arguments() -> None:
    for arguments in ({"arguments": ""}, {"arguments": None}, {}):
        message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", **arguments}}]}
        assert with_template(WRITES_CALLS).text([message]) == "assistant=;f({});"


def test_a_template_without_a_place_for_tools_refuses_them() -> None:
    with pytest.raises(TemplateError) as caught:
        with_template(WRITES_CALLS).text(HELLO, tools=[tool(description="F")])
    assert str(caught.value) == (
        "dist/m: chat template 'default' has no place for tools: send none, or give the model's "
        "folder a template that writes them"
    )
    with pytest.raises(TemplateError) as caught:
        with_template("{{ messages[0].content }}").text(CALLS)
    assert str(caught.value) == (
        "dist/m: chat template 'default' leaves out messages of the role tool"
    )
    with pytest.raises(TemplateError) as caught:
        with_template(CHATML).text(CALLS[:2])
    assert str(caught.value) == (
        "dist/m: chat template 'default' has no place for the tool_calls of earlier messages: send "
        "none, or give the model's folder a template that writes them"
    )


def test_a_conv_template_without_a_place_for_tools_refuses_them() -> None:
    builder = PromptBuilder(config(conv_template=TEMPLATE), fallback())
    with pytest.raises(TemplateError, match="conversation template test has no place for tools"):
        builder.text(HELLO, tools=[tool()])
    with pytest.raises(TemplateError, match="conversation template test has no place for the tool"):
        builder.text(CALLS[:2])


def test_a_conv_template_of_the_hermes_format() -> None:
    hermes = TEMPLATE | {
        "roles": {"user": "U:", "assistant": "A:", "tool": "T:"},
        "system_template": "{system_message}{hermes_tools} as <tool_call>{}</tool_call> ",
    }
    builder = PromptBuilder(config(conv_template=hermes), fallback())
    assert builder.text(CALLS, tools=[tool()]).split(" as <tool_call>{}</tool_call> ") == [
        '[{"type": "function", "function": {"name": "f"}}]',
        'U:hi A:<tool_call>\n{"name": "f", "arguments": {"ä": "<1>"}}\n</tool_call> T:sunny A:',
    ]
    assert "<tool_call>" in builder.sources["test"]


def test_the_developer_s_message_is_the_system_s() -> None:
    messages = [{"role": "developer", "content": "be brief"}]
    assert with_template("{{ messages[0].role }}").text(messages) == "system"
    knows = "{{ messages[0].role }}{# developer #}"
    assert with_template(knows).text(messages) == "developer"
    conversation = PromptBuilder(config(conv_template=TEMPLATE), fallback())
    assert conversation.text(messages) == "be briefox"


def test_variables_of_one_request_do_not_change_what_others_get() -> None:
    source = "{% if bad %}{{ raise_exception('bad') }}{% endif %}" + WRITES_TOOLS + WRITES_CALLS
    builder = with_template(source)
    with pytest.raises(TemplateError, match="bad"):
        builder.text(CALLS, tools=[tool(description="F")], variables={"bad": True})
    assert "sunny" in builder.text(CALLS, tools=[tool(description="F")])


def test_sources_tell_what_a_model_writes() -> None:
    assert with_template("abc").sources == {"default": "abc"}
    assert PromptBuilder(config(), level()).sources == {}


@needs_shared_data
def test_tools_in_the_templates_of_real_models() -> None:
    """Each writes the tool, the call with its arguments, and the result; or refuses."""
    refused = {}
    tools = [tool(description="tells the weather", parameters={"type": "object"})]
    for path in sorted((SHARED / "tokenizers").glob("**/*.jinja")):
        name = str(path.relative_to(SHARED / "tokenizers"))
        settings = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
        chosen = config(relaxlm={"chat_template": path.read_text("utf-8")})
        builder = PromptBuilder(chosen, level(settings))
        try:
            text = builder.text(CALLS, tools=tools)
        except TemplateError as reason:
            refused[name] = str(reason).split(":")[0].removeprefix("chat template 'default' ")
            continue
        for part in ("tells the weather", "<1>", "ä", "sunny"):
            assert part in text, (name, part)
        assert "None" not in text and "&#34;" not in text, name
    no_tools = "has no place for tools"
    no_results = "leaves out messages of the role tool"
    assert refused == {
        "deepseek/chat_template.deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja": no_tools,
        "deepseek/chat_template.deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja": no_tools,
        "deepseek/chat_template.deepseek-ai-DeepSeek-V3.1.jinja": no_tools,
        "gemma/chat_template.gemma-2-2b-it.jinja": no_results,
        "mistral/chat_template.v1.jinja": no_results,
        "phi-3/chat_template.Phi-3.5-mini-instruct.jinja": no_results,
        "rwkv/chat_template.rwkv-world.jinja": no_results,
    }


@needs_shared_data
def test_channels_of_gpt_oss() -> None:
    """Its own template drops what was thought in earlier turns; calls and results are messages."""
    source = (SHARED / "tokenizers" / "gpt-oss" / "chat_template.jinja").read_text("utf-8")
    marks = ["<|return|>", "<|call|>", "<|end|>"]
    tokenizer = level({"eos_token": "<|return|>", "additional_special_tokens": marks})
    builder = PromptBuilder(config(relaxlm={"chat_template": source}), tokenizer)
    ends = {tokenizer.token_to_id(mark) for mark in marks[:2]}
    assert builder.stop_token_ids == {3, 4, *ends}
    answered = {"role": "assistant", "content": "4", "reasoning_content": "hm"}
    text = builder.text([*HELLO, answered, *HELLO])
    assert "<|start|>assistant<|channel|>final<|message|>4<|end|>" in text
    assert "hm" not in text and text.endswith("<|end|><|start|>assistant")
    tools = [tool(description="tells the weather", parameters={"type": "object"})]
    text = builder.text(CALLS, tools=tools)
    assert "to=functions.f<|channel|>commentary json<|message|>" in text
    assert "<|start|>functions.f to=assistant<|channel|>commentary<|message|>" in text


# GLM 4, in short: functions of the system message, roles as they are called, a name as metadata.
GLM = (
    "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>"
    "{% for tool in item['tools'] %}{{ '\n## ' + tool.function.name }}{% endfor %}{% endif %}"
    "{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_calls_and_results_of_glm_4() -> None:
    builder = PromptBuilder(config(relaxlm={"chat_template": GLM}), level())
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"s": "ü"}'}}
    other = {"id": "b", "type": "function", "function": {"name": "g", "arguments": ""}}
    text = builder.text(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "I look.", "tool_calls": [call, other]},
            {"role": "tool", "tool_call_id": "a", "content": "sunny"},
        ],
        tools=[tool("f"), tool("g")],
    )
    assert text == (
        "[gMASK]<sop><|system|>\n## f\n## g<|user|>\nHi<|assistant|>\nI look."
        '<|assistant|>f\n{"s": "ü"}<|assistant|>g\n{}<|observation|>\nsunny<|assistant|>'
    )
