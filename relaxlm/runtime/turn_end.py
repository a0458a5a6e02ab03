"""The tokens with which a chat template ends the assistant's turns.

A model writes them where its answer ends. Not every configuration names them as ends of a text:
Gemma's turns end with <end_of_turn>, and some of its files know only <eos>.
"""

from collections.abc import Mapping

from relaxlm.errors import TemplateError
from relaxlm.runtime.template import ChatTemplate
from relaxlm.runtime.tokenizer import Tokenizer

_ANSWER = "probe-of-an-answer"
_TURNS = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": _ANSWER})
# gpt-oss writes several messages in a turn, each with an end of its own; these two end the turn.
_CHANNELS = ("<|channel|>", "<|message|>")
_ENDS_OF_CHANNELS = ("<|return|>", "<|call|>")


def writes_channels(template: str) -> bool:
    """Whether a template's text speaks of messages on channels, as gpt-oss writes them."""
    return all(mark in template for mark in _CHANNELS)


def turn_ends(
    template: ChatTemplate, tokenizer: Tokenizer, special_tokens: Mapping[str, str]
) -> frozenset[int]:
    """The special tokens behind an answer, none if the template writes none there.

    Args:
        special_tokens: role ("bos_token") -> token.
    """
    if writes_channels(template.source):
        found = [tokenizer.token_to_id(token) for token in _ENDS_OF_CHANNELS]
        return frozenset(i for i in found if i is not None)
    try:
        text = template.render(_TURNS, add_generation_prompt=False, special_tokens=special_tokens)
    except TemplateError:
        return frozenset()
    _, answer, rest = text.rpartition(_ANSWER)
    if not answer or not rest.strip():
        return frozenset()
    first = next(iter(tokenizer.encode(rest.lstrip(), add_special_tokens=False)), None)
    begins = first == tokenizer.bos_id != tokenizer.eos_id
    if first is None or first not in tokenizer.special_ids or begins:
        return frozenset()
    return frozenset({first})
