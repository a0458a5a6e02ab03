"""Which format a model's replies have, from its chat template and vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from relaxlm.engine.grammar import GrammarSpec
from relaxlm.engine.replies.formats import FORMATS, ToolFormat, format_named, format_of
from relaxlm.engine.replies.grammar import ReplyGrammar
from relaxlm.engine.replies.harmony import TOKENS as HARMONY_TOKENS
from relaxlm.engine.replies.harmony import read_harmony
from relaxlm.engine.replies.parser import ReasoningTags, ReplyParser, read_reply
from relaxlm.engine.replies.reader import Reader, Wait
from relaxlm.engine.replies.sink import NewId, Sink, openai_id, short_id
from relaxlm.engine.replies.tools import ToolRequest
from relaxlm.errors import ConfigError

if TYPE_CHECKING:
    from relaxlm.runtime.tokenizer import Tokenizer

# Tags of reasoning, by the name that an override gives them.
REASONING: Mapping[str, ReasoningTags] = {
    "think": ReasoningTags("<think>", "</think>"),
    "THINK": ReasoningTags("[THINK]", "[/THINK]"),
    "THINKING": ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>"),
    "seed": ReasoningTags("<seed:think>", "</seed:think>"),
    "inner": ReasoningTags("<|inner_prefix|>", "<|inner_suffix|>"),
    "channel": ReasoningTags("<|channel>thought\n", "<channel|>"),
}
# What stands around the answer behind reasoning, where templates speak of it: those of Hunyuan and
# of Granite 3.3.
_ANSWERS = (("<answer>", "</answer>"), ("<response>", "</response>"))


@dataclass(frozen=True)
class ReplyFormat:
    """How one model writes its replies. Made by `reply_format`.

    Attributes:
        tools: the format of tool calls.
        reasoning: the tags of its reasoning; None if it does not reason, or in channels (harmony).
        special: text -> id of the format's marks that are special tokens.
    """

    tools: ToolFormat
    reasoning: ReasoningTags | None
    special: Mapping[str, int]

    @property
    def channels(self) -> bool:
        """Whether replies are messages on channels, as those of gpt-oss."""
        return self.tools.name == "harmony"

    def shown_special(self, request: ToolRequest | None) -> frozenset[int]:
        """The special tokens that the parser needs to see: for GenerationRequest."""
        needed = set(HARMONY_TOKENS) if self.channels else set()
        if request is not None:
            needed.update(self.tools.tokens)
        if self.reasoning is not None:
            needed.update(self.reasoning.texts)
        return frozenset(i for text, i in self.special.items() if text in needed)

    def grammar(
        self, request: ToolRequest | None, starts_in_reasoning: bool = False
    ) -> GrammarSpec | None:
        """What the reply must match to do what the request says about tools: a call where one is
        required, only functions that may be called, at most one call without `parallel`, and the
        schemas of strict functions. None if the model is free.

        Raises:
            RequestError: a strict function whose schema the format cannot keep to.
        """
        if request is None:
            return None
        return self._grammar.calls(request, starts_in_reasoning)

    def after_reasoning(self, spec: GrammarSpec, starts_in_reasoning: bool = False) -> GrammarSpec:
        """A grammar for an answer, such as a `response_format`, made one for the reply: a model
        that reasons may do so first. Kind "lark" stays as it is.
        """
        return self._grammar.after_reasoning(spec, starts_in_reasoning)

    @property
    def _grammar(self) -> ReplyGrammar:
        return ReplyGrammar(self.tools, self.reasoning, self.special)

    def starts_in_reasoning(self, prompt: str) -> bool:
        """Whether a prompt (its text, from PromptBuilder.text) ends inside of the reasoning."""
        if self.reasoning is None:
            return False
        return prompt.rstrip().endswith(self.reasoning.begin.rstrip())

    def parser(
        self,
        request: ToolRequest | None = None,
        starts_in_reasoning: bool = False,
        new_id: NewId | None = None,
    ) -> ReplyParser:
        """A parser for one reply.

        Args:
            request: what `tool_request` gave; without it, nothing is taken for a call.
            new_id: makes the ids of calls.
        """

        def read(reader: Reader, sink: Sink) -> Wait:
            if self.channels:
                return read_harmony(reader, sink, request is not None)
            if request is None:
                return read_reply(reader, sink, self.reasoning, starts_in_reasoning, (), None)
            return read_reply(
                reader,
                sink,
                self.reasoning,
                starts_in_reasoning,
                self.tools.marks_of(request.names),
                lambda reader, sink, mark: self.tools.read(reader, sink, mark, request),
                on_lines=self.tools.named,
                in_reasoning=self.tools.in_reasoning,
            )

        return ReplyParser(read, new_id or (short_id if self.tools.short_ids else openai_id))


def reply_format(
    templates: Mapping[str, str],
    tokenizer: Tokenizer,
    tools: str | None = None,
    reasoning: str | None = None,
) -> ReplyFormat:
    """The format of a model's replies.

    Args:
        templates: the model's chat templates by name, none for a model without.
        tools: the name of a tool format (`FORMATS`), in place of what the template says.
        reasoning: a name of `REASONING` or "none", in place of what the template says.

    Raises:
        ConfigError: no format of that name.
    """
    source = "\n".join(templates.values())
    if tools is None:
        chosen = format_of(source)
    else:
        named = format_named(tools)
        if named is None:
            names = ", ".join(entry.name for entry in FORMATS)
            raise ConfigError(f"tool format {tools!r} is not known; there are {names}")
        chosen = named
    tags = _reasoning(source, tokenizer, reasoning)
    if chosen.name == "harmony":
        tags = None
    texts = [*chosen.tokens, *([] if tags is None else tags.texts)]
    special = {
        text: token
        for text in texts
        if (token := tokenizer.token_to_id(text)) is not None and token in tokenizer.special_ids
    }
    return ReplyFormat(chosen, tags, special)


def _reasoning(source: str, tokenizer: Tokenizer, name: str | None) -> ReasoningTags | None:
    if name == "none":
        return None
    if name is not None:
        if name not in REASONING:
            raise ConfigError(
                f"reasoning format {name!r} is not known; there are none, {', '.join(REASONING)}"
            )
        return _with_answer(REASONING[name], source)
    for tags in REASONING.values():
        # Templates spell a line end in their own ways. Some models reason whose template says
        # nothing of it; their vocabulary does.
        begin = tags.begin.rstrip()
        if begin in source or tags.end in source or tokenizer.token_to_id(begin) is not None:
            return _with_answer(tags, source)
    return None


def _with_answer(tags: ReasoningTags, source: str) -> ReasoningTags:
    around = (pair for pair in _ANSWERS if all(text in source for text in pair))
    return replace(tags, answer=next(around, None))
