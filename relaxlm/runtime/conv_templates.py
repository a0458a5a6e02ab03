"""Conversation templates as MLC's tools store them: `conv_template` of mlc-chat-config.json.

Such a template is data, not a program. A prompt is

    system_template with the system message, then for every message
    roles[role] + role_content_sep + the message in role_templates[role] + separator

with seps[0] behind user messages and seps[-1] behind the assistant's. A turn that is still to be
written is roles["assistant"] + role_empty_sep. `system_prefix_token_ids` come in front of the
encoded prompt.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from relaxlm.errors import TemplateError

SYSTEM = "{system_message}"
FUNCTIONS = "{function_string}"
HERMES_TOOLS = "{hermes_tools}"  # WebLLM's
_CONTENT = {
    "user": "{user_message}",
    "assistant": "{assistant_message}",
    "tool": "{tool_message}",
}


class ConvTemplate(BaseModel):
    """One template. Defaults are those that readers in the field assume for keys that are left out.

    `messages` are turns that stand before every conversation. `add_role_after_system_message` false
    means that the first message continues the system message's turn ([INST] style).
    `strip_reasoning_in_history` drops what comes before "</think>" in the assistant's earlier
    turns.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    system_template: str = SYSTEM
    system_message: str = ""
    system_prefix_token_ids: list[int] | None = None
    add_role_after_system_message: bool = True
    roles: dict[str, str]
    role_templates: dict[str, str] = Field(default_factory=dict, validate_default=True)
    messages: list[tuple[str, str | None]] = Field(default_factory=list)
    seps: list[str] = Field(min_length=1, max_length=2)
    role_content_sep: str = ""
    role_empty_sep: str = ""
    stop_str: list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    strip_reasoning_in_history: bool = False
    function_string: str = ""
    use_function_calling: bool = False

    @field_validator("roles")
    @classmethod
    def _both_sides(cls, roles: dict[str, str]) -> dict[str, str]:
        missing = [role for role in ("user", "assistant") if role not in roles]
        if missing:
            raise ValueError(f"no role named {' or '.join(missing)}")
        return roles

    @field_validator("role_templates")
    @classmethod
    def _plain_where_missing(cls, given: dict[str, str]) -> dict[str, str]:
        return _CONTENT | given

    @field_validator("stop_str")
    @classmethod
    def _no_empty_stop(cls, given: list[str]) -> list[str]:
        # Published folders have [""], where a special token was lost; it would stop at once.
        return [text for text in given if text]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt of a conversation, without the tokens of `system_prefix_token_ids`.

        Args:
            messages: dictionaries with "role" and a text "content". System messages replace the
                template's own, wherever they stand; several are joined by a blank line.

        Raises:
            TemplateError: a role that the template lacks, content that is not text, or tools in a
                template without a place for them.
        """
        system = [_text(message) for message in messages if message.get("role") == "system"]
        turns = [
            (str(message.get("role")), _text(message))
            for message in messages
            if message.get("role") != "system"
        ]
        history = [(role, text) for role, text in self.messages if text is not None] + turns
        if self.strip_reasoning_in_history:
            history = _without_reasoning(history)

        message = "\n\n".join(system) if system else self.system_message
        start = self.system_template.replace(SYSTEM, message)
        parts = [start]
        for i, (role, text) in enumerate(history):
            if role not in self.roles or role not in self.role_templates:
                raise TemplateError(
                    f"conversation template {self.name or 'without a name'} has no role {role!r}; "
                    f"its roles: {', '.join(['system', *self.roles])}"
                )
            if i > 0 or self.add_role_after_system_message or not start:
                parts.append(self.roles[role] + self.role_content_sep)
            parts.append(self.role_templates[role].replace(_CONTENT.get(role, ""), text))
            parts.append(self.seps[-1] if role == "assistant" else self.seps[0])
        if add_generation_prompt:
            parts.append(self.roles["assistant"] + self.role_empty_sep)
        return self._with_tools("".join(parts), tools)

    def _with_tools(self, prompt: str, tools: Sequence[Mapping[str, Any]] | None) -> str:
        if tools and FUNCTIONS not in prompt and HERMES_TOOLS not in prompt:
            raise TemplateError(
                f"conversation template {self.name or 'without a name'} has no place for tools"
            )
        text = json.dumps(list(tools), ensure_ascii=False) if tools else self.function_string
        # The functions stand with the last user message only.
        before, found, after = prompt.rpartition(FUNCTIONS)
        if found:
            prompt = before.replace(FUNCTIONS, "") + text + after
        return prompt.replace(HERMES_TOOLS, text)


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if not isinstance(content, str):
        raise TemplateError(
            f"a {message.get('role')} message's content is of type {type(content).__name__}: "
            "conversation templates take text"
        )
    return content


def _without_reasoning(history: list[tuple[str, str]]) -> list[tuple[str, str]]:
    last_user = max((i for i, (role, _) in enumerate(history) if role == "user"), default=-1)
    return [
        (role, text.rpartition("</think>")[2].lstrip("\n"))
        if role == "assistant" and i < last_user and "</think>" in text
        else (role, text)
        for i, (role, text) in enumerate(history)
    ]
