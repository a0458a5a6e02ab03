"""From messages to the token ids that a model continues, and what ends its answer.

The one place that knows both ways to write a prompt: the model's own chat template, if its
folder has one, and otherwise the `conv_template` of mlc-chat-config.json.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from relaxlm.errors import RequestError, TemplateError
from relaxlm.runtime.chat_config import ChatConfigFile
from relaxlm.runtime.template import ChatTemplate, select_template
from relaxlm.runtime.tokenizer import Tokenizer

Message = Mapping[str, Any]


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
        self._conversation = config.conversation(tokenizer)
        # Roles of the tokenizer's own files come first; the section serves folders without them.
        self._special_tokens = config.relaxlm.special_tokens | tokenizer.special_tokens
        stop = {*config.eos_token_ids}
        if tokenizer.eos_id is not None:
            stop.add(tokenizer.eos_id)
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

    def text(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation as text (a conv_template's leading tokens are not in it).

        Args:
            messages: dictionaries with "role" and "content", as in the OpenAI API. A list of
                text parts as content is joined by line ends.
            variables: further names that a chat template reads ("enable_thinking").

        Raises:
            RequestError: messages of another shape.
            TemplateError: the template refuses the conversation, or there is none.
        """
        checked = [_checked(message, i) for i, message in enumerate(messages)]
        if not checked:
            raise RequestError("the conversation has no messages")
        if self._templates:
            name = select_template(self._templates, tools)
            return self._templates[name].render(
                checked,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                special_tokens=self._special_tokens,
                variables=variables,
            )
        if self._conversation is None:
            raise TemplateError(
                "the model's folder has neither a chat template nor a conv_template, so only "
                "plain prompts "
                "can be continued. `relaxlm gen_config --conv-template NAME` sets one."
            )
        return self._conversation.render(checked, add_generation_prompt, tools)

    def encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
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
            return {**message, "content": "\n".join(str(text) for text in texts)}
        raise RequestError(
            f"message {index} has content of a kind other than text, which this model cannot read"
        )
    if content is not None and not isinstance(content, str):
        raise RequestError(f"message {index} has the content {_shown(content)}: expected text")
    return message


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
