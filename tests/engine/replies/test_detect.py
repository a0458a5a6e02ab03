import json
from typing import Any

import pytest

from relaxlm.engine.replies import ReplyFormat, reply_format
from relaxlm.engine.replies.detect import REASONING
from relaxlm.engine.replies.formats import FORMATS
from relaxlm.engine.replies.harmony import TOKENS as HARMONY_TOKENS
from relaxlm.errors import ConfigError
from relaxlm.runtime import tool_messages
from relaxlm.runtime.chat_config import ChatConfigFile
from relaxlm.runtime.prompt import PromptBuilder
from tests.engine.replies.samples import parsed, request, tokenizer
from tests.runtime.tokenizer_samples import CHATML
from tests.shared_data import SHARED, needs_shared_data


def detected(template: str, special: tuple[str, ...] = (), **names: str) -> ReplyFormat:
    return reply_format({"default": template}, tokenizer(special), **names)


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("<tool_call> <think>", "hermes", "<think>"),
        ("[TOOL_CALLS] [THINK]", "mistral", "[THINK]"),
        ("<|channel>thought\\n", "json", "<|channel>thought\n"),
        (CHATML, "json", None),
        ("", "json", None),
    ],
)
def test_the_template_tells(template: str, tools: str, reasoning: str | None) -> None:
    found = detected(template)
    assert found.tools.name == tools
    assert (found.reasoning.begin if found.reasoning else None) == reasoning


def test_the_tokens_tell_of_reasoning() -> None:
    found = detected(CHATML, ("<think>",))
    assert found.reasoning is not None and found.reasoning.end == "</think>"


def test_what_is_detected_can_be_set() -> None:
    found = detected("<tool_call><think>", tools="llama3", reasoning="none")
    assert (found.tools.name, found.reasoning) == ("llama3", None)
    with pytest.raises(ConfigError, match="tool format 'x' is not known; there are harmony, deep"):
        detected("", tools="x")
    with pytest.raises(ConfigError, match="reasoning format 'x' is not known; there are none, th"):
        detected("", reasoning="x")


@pytest.mark.parametrize("tag", ["answer", "response"])
@pytest.mark.parametrize("with_tools", [True, False])
def test_marks_around_an_answer_are_no_part_of_it(tag: str, with_tools: bool) -> None:
    begin, end = f"<{tag}>", f"</{tag}>"
    found = detected(f"<tool_call> <think></think> {begin}{end}")

    def read(text: str) -> tuple[str | None, str | None]:
        message = parsed(found.parser(request() if with_tools else None), list(text))
        return message.reasoning_content, message.content

    assert read(f"<think>\nhm\n</think>\n{begin}\nYes {end[:3]}\n{end}") == (
        "hm",
        f"Yes {end[:3]}",
    )
    assert read(f"<think>\n\n</think>{begin}Yes, {end}{end} x") == (None, f"Yes,{end} x")
    assert read(f"<think>hm</think>{begin}Yes") == ("hm", "Yes")
    for text in (f"{begin}Yes{end}", f"x {begin}Yes{end}"):  # without reasoning
        assert read(text) == (None, text)
    assert read(f"<think>hm</think>Yes {begin}x{end}") == ("hm", f"Yes {begin}x{end}")
    if with_tools:
        call = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
        message = parsed(found.parser(request()), [f"<think>hm</think>{begin}So {call}{end}"])
        assert message.content == "So" and [c.name for c in message.tool_calls] == ["g"]
    assert detected("<think>").reasoning == REASONING["think"]


def test_templates_of_several_names_are_read_together() -> None:
    found = reply_format({"default": CHATML, "tool_use": "<tool_call>"}, tokenizer())
    assert found.tools.name == "hermes"


def test_special_tokens_that_are_shown() -> None:
    special = ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[OTHER]")
    found = detected("[TOOL_CALLS][ARGS][THINK]", special)
    ids = {text: tokenizer(special).token_to_id(text) for text in special}
    assert found.shown_special(None) == {ids["[THINK]"]}
    assert found.shown_special(request()) == {ids[text] for text in special[:3]}
    assert detected("[TOOL_CALLS]").shown_special(request()) == set()
    harmony = detected("<|channel|><|message|>", ("<|channel|>", "<|message|>", "<|start|>"))
    assert len(harmony.shown_special(None)) == 3 and harmony.reasoning is None


def test_where_a_prompt_ends() -> None:
    found = detected("<think>")
    assert found.starts_in_reasoning("<|im_start|>assistant\n<think>\n")
    assert not found.starts_in_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not found.starts_in_reasoning("<|im_start|>assistant\n")
    assert not detected("").starts_in_reasoning("<think>\n")


# Templates of real models: what they write of a call is read back as the same call.

ARGUMENTS = {"s": 'ü "quoted" {', "n": -3}
CALLS = [
    {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": ARGUMENTS}},
    {"id": "bcdefghij", "type": "function", "function": {"name": "g", "arguments": {}}},
]
# These write but one call of a message.
ONE_CALL = ("llama-3/", "gpt-oss/")
EXPECTED = {
    "command-r/chat_template.c4ai-command-r-plus-tool_use.jinja": "cohere",
    "deepseek/chat_template.deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja": "deepseek_r1",
    "deepseek/chat_template.deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja": "deepseek_r1",
    "deepseek/chat_template.deepseek-ai-DeepSeek-V3.1.jinja": "deepseek",
    "glm/chat_template.glm-4.5.jinja": "glm",
    "gpt-oss/chat_template.jinja": "harmony",
    "hermes/chat_template.Hermes-3-Llama-3.1-8B-tool_use.jinja": "hermes",
    "llama-3/chat_template.Llama-3.1-8B-Instruct.jinja": "llama3",
    "llama-3/chat_template.Llama-3.2-3B-Instruct.jinja": "llama3",
    "llama-3/chat_template.Llama-3.3-70B-Instruct.jinja": "llama3",
    "mistral/chat_template.Mistral-Small-3.2-24B-Instruct-2506.jinja": "mistral_call_id",
    "mistral/chat_template.mistralai-Mistral-Nemo-Instruct-2407.jinja": "mistral",
    "mistral/chat_template.v13.jinja": "mistral_args",
    "mistral/chat_template.v3.jinja": "mistral",
    "mistral/chat_template.v7.jinja": "mistral",
    "phi-4-mini/chat_template.phi-4-mini-reasoning.jinja": "phi4",
    "qwen2/chat_template.QwQ-32B.jinja": "hermes",
    "qwen2/chat_template.Qwen2.5-7B-Instruct.jinja": "hermes",
    "qwen2/chat_template.Qwen3-0.6B.jinja": "hermes",
    "smollm3/chat_template.jinja": "hermes",
}


def builder(source: str) -> PromptBuilder:
    content = {
        "model_type": "llama",
        "quantization": "q0f32",
        "model_config": {},
        "vocab_size": 320,
        "context_window_size": 128,
        "relaxlm": {"chat_template": source, "special_tokens": {"bos_token": "<s>"}},
    }
    return PromptBuilder(ChatConfigFile.parse(content), tokenizer())


def written_calls(prompts: PromptBuilder, calls: list[dict[str, Any]], tools: Any) -> str:
    """What a template writes of the assistant's turn."""
    user = {"role": "user", "content": "hi"}
    variables = {"enable_thinking": True}
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    before = prompts.text([user], True, tools, variables)
    whole = prompts.text([user, answer], False, tools, variables)
    turn = "<|CHATBOT_TOKEN|>"  # Command R has instructions behind the conversation
    if turn in whole:
        return whole.partition(turn)[2]
    if not whole.startswith(before):  # the reasoning of earlier turns is left out
        before = before.partition("<think>")[0].rstrip("\n")
    assert whole.startswith(before)
    return whole[len(before) :]


@needs_shared_data
@pytest.mark.parametrize("name", EXPECTED)
def test_calls_that_real_templates_write_are_read_back(name: str) -> None:
    prompts = builder((SHARED / "tokenizers" / name).read_text("utf-8"))
    found = reply_format(prompts.sources, prompts.tokenizer)
    assert found.tools.name == EXPECTED[name]
    calls = CALLS[:1] if name.startswith(ONE_CALL) else CALLS
    about = {"description": "d", "parameters": {"type": "object", "properties": {}}}
    tools: Any = [{"type": "function", "function": {"name": n, **about}} for n in "fg"]
    if name.startswith("deepseek"):
        tools = None
    text = written_calls(prompts, calls, tools)
    message = parsed(found.parser(request()), list(text))
    assert [call.name for call in message.tool_calls] == ["f", "g"][: len(calls)]
    assert json.loads(message.tool_calls[0].arguments) == ARGUMENTS
    assert all(call.arguments == "{}" for call in message.tool_calls[1:])


@needs_shared_data
def test_real_templates_that_end_inside_of_the_reasoning() -> None:
    ends = {}
    for name in ("qwen2/chat_template.QwQ-32B.jinja", "qwen2/chat_template.Qwen3-0.6B.jinja"):
        prompts = builder((SHARED / "tokenizers" / name).read_text("utf-8"))
        found = reply_format(prompts.sources, prompts.tokenizer)
        for thinking in (True, False):
            variables = {"enable_thinking": thinking}
            text = prompts.text([{"role": "user", "content": "hi"}], variables=variables)
            ends[name[20:25], thinking] = found.starts_in_reasoning(text)
    assert ends == {
        ("QwQ-3", True): True,
        ("QwQ-3", False): False,
        ("Qwen3", True): False,
        ("Qwen3", False): False,
    }


def test_a_named_template_tells_of_channels() -> None:
    content = {"model_type": "gpt_oss", "quantization": "q0f32", "model_config": {}}
    sizes = {"vocab_size": 320, "context_window_size": 128, "conv_template": "gpt-oss"}
    prompts = PromptBuilder(ChatConfigFile.parse(content | sizes), tokenizer(HARMONY_TOKENS))
    assert reply_format(prompts.sources, prompts.tokenizer).channels
    ends = {prompts.tokenizer.token_to_id(token) for token in ("<|return|>", "<|call|>")}
    assert ends < prompts.stop_token_ids


# What is told of templates that are not among the shared files.
TOLD = {
    "apertus": "{%- set inner_token = '<|inner_prefix|>' -%} '<|tools_prefix|>'",
    "command_a": "{{ '<|START_THINKING|>' }}<|START_ACTION|>[",
    "glm4": "[gMASK]<sop>{% for m in messages %}<|observation|>",
    "granite": "<|start_of_role|>system<|end_of_role|> write <|tool_call|> and a list",
    "hermes": "<|start_of_role|>system<|end_of_role|> <tool_call>",
    "hunyuan": "'<tool_calls>\\n' <tool_call>name\\n```json\\n{}\\n```</tool_call>",
    "internlm2": "<|im_start|>system name=<|plugin|>\\n",
    "kimi": "<|tool_calls_section_begin|> <|tool_call_begin|>",
    "lfm2": "List of tools: [",
    "minimax": "{% set begin = '<minimax:tool_call>' %}<think>",
    "minitron": "<extra_id_1>User {{ '\\n<tool> ' + tool | tojson + ' </tool>' }}",
    "nemotron": "<TOOLCALL>[{",
    "seed": "<seed:tool_call>\\n<function=x>\\n<parameter=y> {{ '<seed:think>' }}",
    "tool_calls": "'<tool_calls>[{\"name\": <function-name>}]</tool_calls>'",
    "olmo3": "You may call functions within <function_calls></function_calls> XML tags.",
    "qwen3_coder": "<tool_call><function=x><parameter=y>",
}


@pytest.mark.parametrize("name", TOLD)
def test_what_a_template_says_of_calls(name: str) -> None:
    found = detected(TOLD[name])
    assert found.tools.name == name
    tags = {
        "apertus": "<|inner_prefix|>",
        "command_a": "<|START_THINKING|>",
        "minimax": "<think>",
        "seed": "<seed:think>",
    }
    assert (found.reasoning.begin if found.reasoning else None) == tags.get(name)


def test_calls_written_into_the_text_are_read_back() -> None:
    """For templates that write none themselves: in the form that they speak of."""
    also = {"<|tool_call|>": "<|start_of_role|>", "<tool> ": "<extra_id_1>"}
    names = []
    for mark in tool_messages._TEXTS:
        template = mark + also.get(mark, "")
        found = detected(template)
        names.append(found.tools.name)
        message = {"role": "assistant", "content": "Wait.", "tool_calls": CALLS}
        changed = tool_messages.calls_as_text(message, template)
        assert changed is not None
        read = parsed(found.parser(request()), list(changed["content"]))
        assert (read.content, [call.name for call in read.tool_calls]) == ("Wait.", ["f", "g"])
        assert json.loads(read.tool_calls[0].arguments) == ARGUMENTS
    assert names == ["hermes", "phi4", "granite", "lfm2", "minitron"]


def test_every_format_is_detected_by_a_template() -> None:
    assert {entry.name for entry in FORMATS} - {*EXPECTED.values(), *TOLD} == {"json"}
