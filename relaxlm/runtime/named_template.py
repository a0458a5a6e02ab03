# ruff: noqa: RUF001 (the tokens of DeepSeek are spelled with a full-width bar)
"""Conversation templates whose tokens are still text, and the shapes that several of them share.

The same format is used with many vocabularies: "chatml" ends a turn with <|im_end|>, which is id
2, 32000, 151645 or 100265. So the table (conv_template_table.py) names tokens, and `resolve`
finds their ids.
"""

from dataclasses import dataclass

from relaxlm.runtime.conv_templates import SYSTEM, ConvTemplate
from relaxlm.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class NamedTemplate:
    """A template whose tokens are still text.

    `begin` come in front of the prompt, `stop` end the assistant's turn; tokens that a vocabulary
    lacks are left out when it is resolved.
    """

    template: ConvTemplate
    begin: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()

    def resolve(self, tokenizer: Tokenizer) -> ConvTemplate:
        """The template with the ids of this vocabulary."""
        begin = [tokenizer.token_to_id(token) for token in self.begin]
        stop = [tokenizer.token_to_id(token) for token in self.stop]
        update = {
            "system_prefix_token_ids": [i for i in begin if i is not None] or None,
            "stop_token_ids": [i for i in stop if i is not None],
        }
        return self.template.model_copy(update=update)


def named(
    name: str,
    user: str,
    assistant: str,
    seps: list[str],
    content: str = "",
    empty: str = "",
    *,
    system: str = SYSTEM,
    message: str = "",
    begin: tuple[str, ...] = (),
    stop: tuple[str, ...] = (),
    stop_str: tuple[str, ...] = (),
    tool: str | None = None,
    templates: dict[str, str] | None = None,
    role_after_system: bool = True,
    strip_reasoning: bool = False,
) -> NamedTemplate:
    """`content` and `empty` follow the role's header: in front of a message, and of one still to
    come.
    """
    roles = {"user": user, "assistant": assistant} | ({} if tool is None else {"tool": tool})
    template = ConvTemplate(
        name=name,
        system_template=system,
        system_message=message,
        add_role_after_system_message=role_after_system,
        roles=roles,
        role_templates=templates or {},
        seps=seps,
        role_content_sep=content,
        role_empty_sep=empty,
        stop_str=list(stop_str),
        strip_reasoning_in_history=strip_reasoning,
    )
    return NamedTemplate(template, begin, stop)


def chatml(
    name: str,
    message: str = "",
    stop: tuple[str, ...] = ("<|im_end|>",),
    *,
    system: str = "<|im_start|>system\n{system_message}<|im_end|>\n",
    begin: tuple[str, ...] = (),
    open_reply: str = "",
    tool: str | None = None,
    strip_reasoning: bool = False,
) -> NamedTemplate:
    return named(
        name,
        "<|im_start|>user",
        "<|im_start|>assistant",
        ["<|im_end|>\n"],
        "\n",
        "\n" + open_reply,
        system=system,
        message=message,
        begin=begin,
        stop=stop,
        stop_str=("<|im_end|>",),
        tool=tool,
        strip_reasoning=strip_reasoning,
    )


def llama3(
    name: str,
    message: str,
    stop: tuple[str, ...],
    stop_str: tuple[str, ...] = (),
    tool: str | None = None,
) -> NamedTemplate:
    return named(
        name,
        "<|start_header_id|>user",
        "<|start_header_id|>assistant",
        ["<|eot_id|>"],
        "<|end_header_id|>\n\n",
        "<|end_header_id|>\n\n",
        system="<|start_header_id|>system<|end_header_id|>\n\n{system_message}<|eot_id|>",
        message=message,
        begin=("<|begin_of_text|>",),
        stop=stop,
        stop_str=stop_str,
        tool=tool,
    )


def gemma(name: str) -> NamedTemplate:
    return named(
        name,
        "<start_of_turn>user",
        "<start_of_turn>model",
        ["<end_of_turn>\n"],
        "\n",
        "\n",
        begin=("<bos>",),
        stop=("<eos>", "<end_of_turn>"),
        stop_str=("<end_of_turn>",),
    )


def deepseek_r1(name: str, open_reply: str) -> NamedTemplate:
    return named(
        name,
        "<｜User｜>",
        "<｜Assistant｜>",
        ["", "<｜end▁of▁sentence｜>"],
        empty=open_reply,
        begin=("<｜begin▁of▁sentence｜>",),
        stop=("<｜end▁of▁sentence｜>",),
        strip_reasoning=True,
    )


def deepseek(name: str) -> NamedTemplate:
    return named(
        name,
        "User",
        "Assistant",
        ["\n\n", "<｜end▁of▁sentence｜>"],
        ": ",
        ":",
        begin=("<｜begin▁of▁sentence｜>",),
        stop=("<｜end▁of▁sentence｜>",),
        stop_str=("<｜end▁of▁sentence｜>",),
    )


def plain(
    name: str, begin: tuple[str, ...], stop: tuple[str, ...], stop_str: tuple[str, ...] = ()
) -> NamedTemplate:
    """No roles at all: the messages as they are, to be continued."""
    return named(name, "", "", [""], begin=begin, stop=stop, stop_str=stop_str)


def mistral_tokens(name: str) -> NamedTemplate:
    """Mistral's formats whose marks are tokens and not text (v7 and later)."""
    return named(
        name,
        "",
        "",
        [""],
        system="[SYSTEM_PROMPT]{system_message}[/SYSTEM_PROMPT]{function_string}",
        templates={
            "user": "[INST]{user_message}[/INST]",
            "assistant": "{assistant_message}</s>",
            "tool": "[TOOL_RESULTS]{tool_message}[/TOOL_RESULTS]",
        },
        tool="",
        begin=("<s>",),
        stop=("</s>",),
        stop_str=("</s>",),
    )
