"""Makes a tokenizer.json from the vocabulary of RWKV's "World" models.

Such a file has a token per line: its number, a Python literal of its text or bytes, and how many
bytes those are. A text is cut from the left, each time into the longest token that fits. Here a
regular expression does that, the tree of all tokens written out: at every byte it goes on as long
as there are longer tokens, and back to the last that is one. What it has cut is looked up.
"""

import ast
import re
from typing import Any

from relaxlm.errors import TokenizerError
from relaxlm.runtime.token_decoding import byte_letters
from relaxlm.runtime.tokenizer import special_token_names

# What ends a text has number 0, and no line.
END, END_ID = "<|endoftext|>", 0

_LETTERS = {byte: letter for letter, byte in byte_letters().items()}
# A byte's letter in a regular expression.
_ESCAPED = {
    byte: re.escape(letter) if letter.isascii() else letter for byte, letter in _LETTERS.items()
}


def parse_vocabulary(text: str, where: str) -> dict[bytes, int]:
    """Token -> number.

    Raises:
        TokenizerError: a line that is no token, one that is there twice, or a byte that is missing.
    """
    tokens: dict[bytes, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line:
            continue
        try:
            first, last = line.index(" "), line.rindex(" ")
            token = ast.literal_eval(line[first + 1 : last].strip())
            token = token.encode("utf-8") if isinstance(token, str) else token
            token_id, length = int(line[:first]), int(line[last:])
            if not isinstance(token, bytes) or len(token) != length or token_id == END_ID:
                raise ValueError
        except (ValueError, SyntaxError):
            raise TokenizerError(
                f"{where}: line {number}: {line[:80]!r} is not a number, a token and its length in "
                "bytes. Is the file complete?"
            ) from None
        if token in tokens:
            raise TokenizerError(f"{where}: line {number}: {token!r} is there twice")
        tokens[token] = token_id
    missing = [byte for byte in range(256) if bytes([byte]) not in tokens]
    if missing:
        raise TokenizerError(
            f"{where}: {len(missing)} bytes are no tokens, such as {missing[0]}, so not every text "
            "can be cut. Is the file complete?"
        )
    return tokens


def convert(tokens: dict[bytes, int], settings: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json.

    Args:
        settings: tokenizer_config.json, for the added tokens and for what ends a text.
    """
    added = {
        int(token_id): entry["content"]
        for token_id, entry in (settings.get("added_tokens_decoder") or {}).items()
    }
    added.setdefault(END_ID, end_token(tokens, settings))
    vocab = {"".join(_LETTERS[byte] for byte in token): i for token, i in tokens.items()}
    vocab |= {content: token_id for token_id, content in added.items()}
    pieces = {
        "type": "Split",
        "pattern": {"Regex": _longest(_tree(tokens), optional=False)},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token_id, content in sorted(added.items())
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{**byte_level, "use_regex": False}, pieces],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": added[END_ID]},
    }


def end_token(tokens: dict[bytes, int], settings: dict[str, Any]) -> str:
    """What the token of number 0 is called."""
    named = special_token_names(settings).get("eos_token")
    return END if named is None or named.encode("utf-8") in tokens else named


def _tree(tokens: dict[bytes, int]) -> dict:
    """Byte -> tree of what may follow; None is a key where a token ends."""
    root: dict = {}
    for token in tokens:
        node = root
        for byte in token:
            node = node.setdefault(byte, {})
        node[None] = {}
    return root


def _longest(node: dict, optional: bool) -> str:
    """A pattern of the longest way on from here; `optional` if a token may end here."""
    single, longer = [], []
    for byte, following in node.items():
        if byte is None:
            continue
        if following.keys() == {None}:
            single.append(_ESCAPED[byte])
        else:
            longer.append(_ESCAPED[byte] + _longest(following, None in following))
    if single:
        longer.append(single[0] if len(single) == 1 else f"[{''.join(single)}]")
    return f"(?:{'|'.join(longer)})" + ("?" if optional else "")
