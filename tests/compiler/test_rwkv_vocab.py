"""RWKV's vocabularies become a tokenizer.json that cuts texts as the published code does."""

import json
import random
from pathlib import Path

import pytest

from relaxlm.compiler.rwkv_vocab import END, parse_vocabulary
from relaxlm.compiler.tokenizer_files import collect_tokenizer_files
from relaxlm.errors import TokenizerError
from relaxlm.runtime.tokenizer import Tokenizer
from tests.shared_data import SHARED, needs_shared_data

# Prefixes of each other with gaps between, characters of several bytes, and parts of such.
WORDS = [
    "ab",
    "abcde",
    "bc",
    "cde",
    "  ",
    "\n\n",
    "日本語",
    "日",
    b"\xe6\x97",
    b"\xf0\x9f",
    "é!",
    "'",
]


def vocabulary() -> str:
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [w.encode() if isinstance(w, str) else w for w in WORDS if w not in ("'",)]
    lines = []
    for number, token in enumerate(tokens, start=1):
        try:
            literal = repr(token.decode("utf-8"))
        except UnicodeDecodeError:
            literal = repr(token)
        lines.append(f"{number} {literal} {len(token)}")
    return "\n".join(lines) + "\n"


def cut(tokens: dict[bytes, int], text: str) -> list[int]:
    """From the left, the longest token that fits."""
    data, ids, longest = text.encode("utf-8"), [], max(map(len, tokens))
    while data:
        length = next(n for n in range(longest, 0, -1) if data[:n] in tokens and n <= len(data))
        ids.append(tokens[data[:length]])
        data = data[length:]
    return ids


def loaded(folder: Path) -> Tokenizer:
    files, settings = collect_tokenizer_files(folder, "rwkv5")
    return Tokenizer(files["tokenizer.json"], settings, "tokenizer.json")


def check_cuts(tokenizer: Tokenizer, tokens: dict[bytes, int], texts: list[str]) -> None:
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == cut(tokens, text), text
        assert tokenizer.decode(ids) == text


def test_texts_are_cut_into_the_longest_tokens(tmp_path: Path) -> None:
    (tmp_path / "rwkv_vocab_v1.txt").write_text(vocabulary(), encoding="utf-8")
    tokens, rng = parse_vocabulary(vocabulary(), "file"), random.Random(3)
    parts = [w for w in WORDS if isinstance(w, str)] + [*"abcde \n", "語", "🙂", "é", "\x00"]
    texts = [
        "",
        "abcdeabcd",
        "日日本語日本",
        *("".join(rng.choices(parts, k=9)) for _ in range(99)),
    ]
    tokenizer = loaded(tmp_path)
    check_cuts(tokenizer, tokens, texts)
    assert tokenizer.eos_id == tokenizer.bos_id == 0
    assert tokenizer.encode(f"ab{END}ab") == [257, 0, 257]


def test_a_folder_may_name_what_ends_a_text(tmp_path: Path) -> None:
    (tmp_path / "rwkv_vocab_v1.txt").write_text(vocabulary(), encoding="utf-8")
    end = "<|rwkv_tokenizer_end_of_text|>"
    settings = {"eos_token": end, "added_tokens_decoder": {"0": {"content": end}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert loaded(tmp_path).encode(f"ab{end}") == [257, 0]


@needs_shared_data
def test_the_world_vocabulary_cuts_texts_as_the_published_code_does(tmp_path: Path) -> None:
    source = SHARED / "tokenizers" / "rwkv" / "rwkv_vocab_v20230424.txt"
    text = source.read_text(encoding="utf-8")
    (tmp_path / source.name).write_text(text, encoding="utf-8")
    tokens, rng = parse_vocabulary(text, "file"), random.Random(4)
    assert (len(tokens), max(tokens.values())) == (65529, 65529)
    some = list(tokens)
    texts = [
        "Today is a beautiful day. 今天是美好的一天。",
        "-" * 200 + " " * 300 + "\r\n\t",
        *(b"".join(rng.choices(some, k=12)).decode("utf-8", "ignore") for _ in range(100)),
    ]
    tokenizer = loaded(tmp_path)
    check_cuts(tokenizer, tokens, texts)
    # As published for this text with the tokenizer of the RWKV team.
    assert tokenizer.encode(texts[0]) == [
        *(33520, 4600, 332, 59219, 21509, 47, 33, 10381, 11639, 13091, 15597, 11685, 14734),
        *(10250, 11639, 10080),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5 'a' 2", "line 257: \"5 'a' 2\" is not a number, a token and its length in bytes"),
        ("a 'a' 1", "line 257: \"a 'a' 1\" is not a number"),
        ("300 open('x') 9", "line 257: \"300 open\\('x'\\) 9\" is not a number"),
        ("300 'a' 1", "line 257: b'a' is there twice"),
    ],
)
def test_a_damaged_file_is_refused(line: str, message: str) -> None:
    text = "\n".join(f"{byte + 1} {bytes([byte])!r} 1" for byte in range(256)) + f"\n{line}"
    with pytest.raises(TokenizerError, match=f"file: {message}"):
        parse_vocabulary(text, "file")
