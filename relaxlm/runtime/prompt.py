"""From messages to the token ids that a model continues, and what ends its answer.

The one place that knows both ways to write a prompt: the model's own chat template, if its
folder has one, and otherwise the `conv_template` of mlc-chat-config.json.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from relaxlm.errors import RequestError, TemplateError
from relaxlm.runtime import tool_messages
from relaxlm.runtime.chat_config import ChatConfigFile
from relaxlm.runtime.template import ChatTemplate, select_template
from relaxlm.runtime.tokenizer import Tokenizer
from relaxlm.runtime.tool_messages import ToolHabits
from relaxlm.runtime.turn_end import turn_ends

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]

# How templates spell that the system message has the functions: as text, or as they are.
_TOOLS_AS_TEXT = ("message['tools']", 'message["tools"]', "message.tools")
_TOOLS_OF_MESSAGE = ("item['tools']", 'item["tools"]', "item.tools")


class PromptBuilder:
    """Writes prompts for one model.

    `stop_token_ids` and `stop_strings` end an answer; neither belongs to it.
    """

    def __init__(self, config: ChatConfigFile, tokenizer: Tokenizer, where: str = "") -> None:
        """
        Args:
            where: the model's folder, for errors.

        Raises:
            TemplateError: a chat template that is not valid Jinja.
            ConfigError: a `conv_template` that does not fit.
        """
        self.tokenizer = tokenizer
        prefix = f"{where}: " if where else ""
        self._templates = {
            name: ChatTemplate(source, f"{prefix}chat template {name!r}")
            for name, source in config.chat_templates.items()
        }
        self._habits: dict[str, ToolHabits] = {}
        self._conversation = config.conversation(tokenizer)
        # Roles of the tokenizer's own files come first; the section serves folders without them.
        self._special_tokens = config.relaxlm.special_tokens | tokenizer.special_tokens
        stop = {*config.eos_token_ids}
        if tokenizer.eos_id is not None:
            stop.add(tokenizer.eos_id)
        for template in self._templates.values():
            stop |= turn_ends(template, tokenizer, self._special_tokens)
        strings: list[str] = []
        if self._conversation is not None and not self._templates:
            stop.update(self._conversation.stop_token_ids)
            strings = self._conversation.stop_str
        self.stop_token_ids = frozenset(stop)
        self.stop_strings = tuple(strings)

    @property
    def source(self) -> Literal["chat_template", "conv_template", "none"]:
        """Where prompts come from; "none" if the folder has no template of either kind."""
        if self._templates:
            return "chat_template"
        return "none" if self._conversation is None else "conv_template"

    @property
    def sources(self) -> dict[str, str]:
        """The text of the templates, which tells how the model writes reasoning and tool calls."""
        if self._templates or self._conversation is None:
            return {name: template.source for name, template in self._templates.items()}
        found = self._conversation
        texts = (found.system_template, found.system_message, found.role_empty_sep)
        return {found.name or "conv_template": "\n".join((*texts, *found.role_templates.values()))}

    def text(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Tools | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation as text (a conv_template's leading tokens are not in it).

        Args:
            messages: dictionaries with "role" and "content", as in the OpenAI API. A list of
                text parts as content is joined by line ends. `tool_calls` of the assistant have
                their arguments as JSON text, or as objects.
            tools: {"type": "function", "function": {..}} each.
            variables: further names that a chat template reads ("enable_thinking").

        Raises:
            RequestError: messages of another shape.
            TemplateError: the template refuses the conversation or has no place for tools or their
                calls, or there is none.
        """
        checked = [_checked(message, i) for i, message in enumerate(messages)]
        if not checked:
            raise RequestError("the conversation has no messages")
        if self._templates:
            return self._from_template(checked, add_generation_prompt, tools, variables)
        if self._conversation is None:
            raise TemplateError(
                "the model's folder has neither a chat template nor a conv_template, so only "
                "plain prompts "
                "can be continued. `relaxlm gen_config --conv-template NAME` sets one."
            )
        named = f"conversation template {self._conversation.name or 'without a name'}"
        source = "\n".join(self.sources.values())
        checked = _developer_is_system(_with_written_calls(checked, source, named))
        return self._conversation.render(checked, add_generation_prompt, tools)

    def _from_template(
        self,
        messages: list[Message],
        add_generation_prompt: bool,
        tools: Tools | None,
        variables: Mapping[str, Any] | None,
    ) -> str:
        name = select_template(self._templates, tools)
        template = self._templates[name]

        def render(messages: Sequence[Message], tools: Tools | None) -> str:
            return template.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                special_tokens=self._special_tokens,
                variables=variables,
            )

        def tried(messages: Sequence[Message], tools: Tools | None) -> str:
            # Without a request's variables: all requests share what is found.
            return template.render(messages, tools=tools, special_tokens=self._special_tokens)

        if "developer" not in template.source:
            messages = _developer_is_system(messages)
        results = any(message["role"] == "tool" for message in messages)
        if not tools and not results and not any("tool_calls" in m for m in messages):
            return render(messages, tools)
        if name not in self._habits:
            self._habits[name] = tool_messages.habits(tried)
        habits = self._habits[name]
        if results and not habits.results:
            raise TemplateError(f"{template.where} leaves out messages of the role tool")
        messages = tool_messages.fitted(messages, habits)
        if not habits.calls:
            messages = _with_written_calls(messages, template.source, template.where)
        if tools:
            tools = tool_messages.complete_tools(tools, habits.descriptions)
            if not habits.tools:
                as_text = any(spelling in template.source for spelling in _TOOLS_AS_TEXT)
                if not as_text and not any(name in template.source for name in _TOOLS_OF_MESSAGE):
                    raise TemplateError(
                        f"{template.where} has no place for tools: send none, or give the model's "
                        "folder a template that writes them"
                    )
                messages = tool_messages.tools_in_system_message(messages, tools, as_text)
        return render(messages, tools)

    def encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Tools | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt of a conversation as token ids. Arguments and errors as for `text`.

        A chat template writes BOS itself, or leaves it out on purpose. A conv_template's leading
        tokens are put in front, unless its text begins with them already.
        """
        text = self.text(messages, add_generation_prompt, tools, variables)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if self._templates or self._conversation is None:
            return ids
        prefix = self._conversation.system_prefix_token_ids or []
        return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a plain text to continue, with BOS if the model expects it, and never
        twice.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        bos = self.tokenizer.bos_id
        if not self.tokenizer.adds_bos or bos is None or ids[:1] == [bos]:
            return ids
        return [bos, *ids]


def _checked(message: Message, index: int) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(
            f"message {index} is {_shown(message)}: expected an object with role and content"
        )
    content = message.get("content")
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
            for part in content
        ]
        if all(isinstance(text, str) for text in texts):
            joined = {**message, "content": "\n".join(str(text) for text in texts)}
            return tool_messages.checked_calls(joined, index)
        raise RequestError(
            f"message {index} has content of a kind other than text, which this model cannot read"
        )
    if content is not None and not isinstance(content, str):
        raise RequestError(f"message {index} has the content {_shown(content)}: expected text")
    return tool_messages.checked_calls(message, index)


def _developer_is_system(messages: Sequence[Message]) -> list[Message]:
    """OpenAI's newer name of the role, which few templates know."""
    return [
        {**message, "role": "system"} if message["role"] == "developer" else message
        for message in messages
    ]


def _with_written_calls(messages: Sequence[Message], source: str, where: str) -> list[Message]:
    """Messages with their calls in their content, for a template that does not write calls."""
    written: list[Message] = []
    for message in messages:
        if "tool_calls" in message:
            turns = tool_messages.calls_as_turns(message, source)
            if turns is not None:
                written += turns
                continue
            changed = tool_messages.calls_as_text(message, source)
            if changed is None:
                raise TemplateError(
                    f"{where} has no place for the tool_calls of earlier messages: send none, or "
                    "give the model's folder a template that writes them"
                )
            message = changed
        written.append(message)
    return written


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
