"""Conversation templates of families that the MLC ecosystem has no name for.

Formats are those of the models' own chat templates. What a named template cannot say is left out:
dates, and a system message that is not there unless someone sends one (named templates have a
default in its place).
"""

from collections.abc import Sequence

from relaxlm.runtime.named_template import NamedTemplate, chatml, named

_HELPFUL = "You are a helpful assistant."
_INTERNLM = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI "
    "Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the "
    "user such as English and 中文."
)
_CODING = (
    "You are an exceptionally intelligent coding assistant that consistently delivers accurate and "
    "reliable responses to user instructions."
)
_END_S = ("</s>",)
_GLM_STOP = ("<|endoftext|>", "<|user|>", "<|observation|>")


def _glm(
    name: str, begin: tuple[str, ...], stop: tuple[str, ...], content: str, thought: str = ""
) -> NamedTemplate:
    """`thought` stands in front of earlier answers."""
    return named(
        name,
        "<|user|>",
        "<|assistant|>",
        [""],
        content,
        system=f"<|system|>{content}{{system_message}}",
        message=_HELPFUL,
        begin=begin,
        stop=stop,
        tool="<|observation|>",
        templates={"assistant": thought + "{assistant_message}"},
        strip_reasoning=bool(thought),
    )


def _roles(
    name: str,
    headers: Sequence[str],
    ends: Sequence[str],
    message: str = _HELPFUL,
    *,
    empty: str = "",
    begin: tuple[str, ...] = (),
    stop: tuple[str, ...] = (),
    tool: str | None = None,
    strip_reasoning: bool = False,
) -> NamedTemplate:
    """Turns of a header, the text and an end.

    Args:
        headers, ends: of the system's, the user's and the assistant's turns.
        empty: what follows the header of the turn still to come.
    """
    return named(
        name,
        headers[1],
        headers[2],
        [*ends[1:]],
        empty=empty,
        system=f"{headers[0]}{{system_message}}{ends[0]}",
        message=message,
        begin=begin,
        stop=stop,
        tool=tool,
        strip_reasoning=strip_reasoning,
    )


def _granite(role: str) -> str:
    return f"<|start_of_role|>{role}<|end_of_role|>"


FAMILY_TEMPLATES = (
    # IBM, Microsoft, OpenAI, Nvidia, Cohere
    _roles(
        "granite",
        (_granite("system"), _granite("user"), _granite("assistant")),
        ("<|end_of_text|>\n",) * 3,
        "You are Granite, developed by IBM. You are a helpful AI assistant.",
        stop=("<|end_of_text|>",),
        tool=_granite("tool_response"),
    ),
    _roles(
        "phi-4-14b",
        tuple(f"<|im_start|>{role}<|im_sep|>" for role in ("system", "user", "assistant")),
        ("<|im_end|>",) * 3,
        stop=("<|endoftext|>", "<|im_end|>"),
    ),
    named(
        "gpt-oss",
        "<|start|>user",
        "<|start|>assistant",
        ["<|end|>"],
        system=(
            "<|start|>system<|message|>"
            "You are ChatGPT, a large language model trained by OpenAI.\n"
            "Knowledge cutoff: 2024-06\n\nReasoning: medium\n\n"
            "# Valid channels: analysis, commentary, final. Channel must be included for every "
            "message.<|end|><|start|>developer<|message|># Instructions\n\n{system_message}\n\n"
            "<|end|>"
        ),
        message=_HELPFUL,
        templates={
            "user": "<|message|>{user_message}",
            "assistant": "<|channel|>final<|message|>{assistant_message}",
        },
        stop=("<|return|>", "<|call|>"),
        strip_reasoning=True,
    ),
    _roles(
        "nemotron_nano_v2",
        ("<SPECIAL_10>System\n", "<SPECIAL_11>User\n", "<SPECIAL_11>Assistant\n"),
        ("\n\n", "\n", "\n<SPECIAL_12>\n"),
        empty="<think>\n",
        stop=("<SPECIAL_12>",),
        strip_reasoning=True,
    ),
    _roles(
        "command-r",
        tuple(f"<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>" for role in ("SYSTEM", "USER", "CHATBOT")),
        ("<|END_OF_TURN_TOKEN|>",) * 3,
        "You are Command-R, a brilliant, sophisticated, AI-assistant trained to assist human users "
        "by providing thorough responses.",
        begin=("<BOS_TOKEN>",),
        stop=("<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    ),
    # Zhipu
    _glm("chatglm3", ("[gMASK]", "sop"), ("</s>", "<|user|>", "<|observation|>"), "\n "),
    _glm("glm-4", ("[gMASK]", "<sop>"), _GLM_STOP, "\n"),
    _glm("glm-4.5", ("[gMASK]", "<sop>"), _GLM_STOP, "\n", "<think></think>\n"),
    # Moonshot, MiniMax, Baidu, Xiaohongshu, Baichuan, OpenBMB, Shanghai AI Laboratory
    _roles(
        "kimi_k2",
        (
            "<|im_system|>system<|im_middle|>",
            "<|im_user|>user<|im_middle|>",
            "<|im_assistant|>assistant<|im_middle|>",
        ),
        ("<|im_end|>",) * 3,
        "You are Kimi, an AI assistant created by Moonshot AI.",
        stop=("[EOS]", "<|im_end|>"),
        tool="<|im_system|>tool<|im_middle|>",
        strip_reasoning=True,
    ),
    _roles(
        "minimax_m2",
        ("]~!b[]~b]system\n", "]~b]user\n", "]~b]ai\n"),
        ("[e~[\n",) * 3,
        empty="<think>\n",
        stop=("[e~[",),
        strip_reasoning=True,
    ),
    _roles(
        "ernie-4.5",
        ("", "User: ", "Assistant: "),
        ("\n", "\n", "<|end_of_sentence|>"),
        begin=("<|begin_of_sentence|>",),
        stop=("</s>", "<|end_of_sentence|>"),
    ),
    _roles(
        "dots1",
        ("<|system|>", "<|userprompt|>", "<|response|>"),
        ("<|endofsystem|>", "<|endofuserprompt|>", "<|endofresponse|>"),
        stop=("<|endofresponse|>",),
    ),
    named("baichuan", "<reserved_102>", "<reserved_103>", [""], stop=_END_S),
    named("baichuan2", "<reserved_106>", "<reserved_107>", [""], stop=_END_S),
    named("minicpm", "<用户>", "<AI>", [""], begin=("<s>",), stop=_END_S),
    chatml("internlm2", _INTERNLM, ("</s>", "<|im_end|>"), begin=("<s>",)),
    # Hugging Face, BigCode, Liquid, Xiaomi
    chatml(
        "smollm3",
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face.",
        system=(
            "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\n"
            "Reasoning Mode: /think\n\n## Custom Instructions\n\n{system_message}\n\n"
        ),
        strip_reasoning=True,
    ),
    _roles(
        "starcoder2-instruct",
        ("", "### Instruction\n", "### Response\n"),
        ("\n\n", "\n\n", "<|endoftext|>"),
        _CODING,
        begin=("<|endoftext|>",),
        stop=("<|endoftext|>",),
    ),
    chatml(
        "lfm2",
        "You are a helpful assistant trained by Liquid AI.",
        begin=("<|startoftext|>",),
        tool="<|im_start|>tool",
    ),
    chatml("mimo", "You are MiMo, an AI assistant developed by Xiaomi.", strip_reasoning=True),
    # Mistral's third release: marks are tokens, without spaces around them
    named(
        "mistral_v3",
        "[INST]",
        "[/INST]",
        ["", "</s>"],
        system="[INST]{system_message}\n\n",
        message=_HELPFUL,
        begin=("<s>",),
        stop=_END_S,
        role_after_system=False,
    ),
)
