import io
import json
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from relaxlm.compiler.sentencepiece import convert, parse_model, special_tokens
from relaxlm.errors import TokenizerError
from relaxlm.runtime.tokenizer import Tokenizer
from tests.shared_data import SHARED, needs_shared_data

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # SWIG's types, in sentencepiece itself
    sentencepiece = pytest.importorskip("sentencepiece")

REAL = {  # name in encode_expected.json -> file
    "mistral-v1": "tokenizers/mistral/tokenizer.model.v1",
    "mistral-v3": "tokenizers/mistral/tokenizer.model.v3",
    "chatglm3": "tokenizers/chatglm3/tokenizer.model",
    "llama-2-spm": "tokenizers/llama-2/tokenizer.model",
}
WORDS = [
    *(
        "the",
        "  ",
        "   ",
        "      ",
        "aaaa",
        "aaaaa",
        "hello",
        "Łódź",
        "你好",
        "\n\n",
        "\t",
        "=====",
    ),
    *("-----", "    return", "😀", "é", "1234", "....", "xyz", "////", "the quick", "again"),
]


def converted(content: bytes, settings: dict[str, Any] | None = None) -> Tokenizer:
    description = convert(parse_model(content, "tokenizer.model"), settings or {})
    return Tokenizer(json.dumps(description).encode(), settings)


def random_texts(seed: int, count: int) -> list[str]:
    generator = random.Random(seed)
    return [
        "".join(
            generator.choice(WORDS)
            if generator.random() < 0.8
            else generator.choice("a =-_. x") * generator.randrange(1, 30)
            for _ in range(generator.randrange(1, 10))
        )
        for _ in range(count)
    ]


@needs_shared_data
@pytest.mark.parametrize("name", REAL)
def test_real_models_give_the_ids_of_sentencepiece(name: str) -> None:
    path = SHARED / "tokenizers" / "encode_expected.json"
    expected = json.loads(path.read_text("utf-8"))[name]
    content = (SHARED / REAL[name]).read_bytes()
    tokenizer = converted(content)
    assert tokenizer.vocab_size == expected["vocab"]
    assert len(expected["cases"]) == 13
    for case in expected["cases"]:
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    reference = sentencepiece.SentencePieceProcessor(model_proto=content)
    for text in random_texts(1, 300):
        ids = reference.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == reference.decode(ids)


@needs_shared_data
def test_broken_bytes_are_written_as_sentencepiece_writes_them() -> None:
    content = (SHARED / REAL["llama-2-spm"]).read_bytes()
    tokenizer = converted(content)
    reference = sentencepiece.SentencePieceProcessor(model_proto=content)
    generator = random.Random(3)
    for _ in range(300):
        data = bytes(generator.choice("é你😀a".encode()) for _ in range(generator.randrange(1, 12)))
        ids = [15043, *(reference.piece_to_id(f"<0x{byte:02X}>") for byte in data)]
        assert tokenizer.decode(ids) == reference.decode(ids)


@needs_shared_data
def test_the_llama_2_file_is_converted_as_it_was_published() -> None:
    content = (SHARED / REAL["llama-2-spm"]).read_bytes()
    ours = convert(parse_model(content, ""), {})
    theirs = json.loads((SHARED / "tokenizers" / "llama-2" / "tokenizer.json").read_text("utf-8"))
    for key in ("normalizer", "pre_tokenizer", "decoder", "added_tokens"):
        assert ours[key] == theirs[key]
    assert ours["post_processor"]["single"] == theirs["post_processor"]["single"]
    assert ours["model"]["vocab"] == theirs["model"]["vocab"]
    merges = {tuple(pair.split(" ")) for pair in theirs["model"]["merges"]}
    assert {tuple(pair) for pair in ours["model"]["merges"]} == merges


def trained(**options: Any) -> bytes:
    """A model trained on the spot, on words of random letters."""
    generator = random.Random(11)
    letters = "abcdefgh éł你"
    lines = ["".join(generator.choices(letters, k=30)) + " the quick fox" for _ in range(400)]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=file,
        minloglevel=2,
        **{"vocab_size": 330, "character_coverage": 1.0, "hard_vocab_limit": False, **options},
    )
    return file.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
        {"model_type": "bpe", "byte_fallback": False, "vocab_size": 60},
        {"model_type": "unigram", "byte_fallback": True},
        {"model_type": "unigram", "byte_fallback": False, "vocab_size": 60},
        {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False},
        {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False},
        {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "nfkc_cf"},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_models_of_every_kind_give_the_ids_of_sentencepiece(options: dict[str, Any]) -> None:
    content = trained(**options)
    tokenizer = converted(content)
    reference = sentencepiece.SentencePieceProcessor(model_proto=content)
    texts = ["", " ", "the quick fox", "  the  ", "a\nb", "ａｂｃ ﬁ", "THE Quick"]  # noqa: RUF001
    generator = random.Random(2)
    for text in texts + [
        "".join(generator.choices("abcdefgh éł你?\t😀 ", k=20)) for _ in range(300)
    ]:
        ids = reference.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        if reference.unk_id() not in ids:
            assert tokenizer.decode(ids) == reference.decode(ids), text


def test_tokens_and_flags() -> None:
    content = trained(
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<sep>"],
        control_symbols=["[INST]"],
        pad_id=3,
    )
    model = parse_model(content, "tokenizer.model")
    names = special_tokens(model)
    assert names == {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    tokenizer = converted(content, names)
    sep, inst = tokenizer.token_to_id("<sep>"), tokenizer.token_to_id("[INST]")
    assert inst in tokenizer.special_ids
    assert sep is not None
    assert sep not in tokenizer.special_ids
    assert tokenizer.encode("[INST]the<sep>")[:2] == [1, inst]
    assert tokenizer.encode("the<sep>")[-1] == sep
    assert tokenizer.decode(tokenizer.encode("[INST]the<sep>")) == "the<sep>"
    ids = converted(content, names | {"add_bos_token": False, "add_eos_token": True}).encode("the")
    assert (ids[0] == 1, ids[-1]) == (False, 2)


def test_with_legacy_false_only_a_text_s_beginning_gets_a_space() -> None:
    content = trained(model_type="bpe", byte_fallback=True, control_symbols=["[INST]"])

    def shown(settings: dict[str, Any]) -> str:
        tokenizer = converted(content, settings)
        ids = tokenizer.encode("the[INST]the", add_special_tokens=False)
        return "".join(tokenizer.id_to_token(i) or "" for i in ids)

    assert shown({}) == "▁the[INST]▁the"
    assert shown({"legacy": True}) == "▁the[INST]▁the"
    assert shown({"legacy": False}) == "▁the[INST]the"
    assert shown({"add_prefix_space": False}) == "the[INST]the"


def field(number: int, value: int | bytes) -> bytes:
    def varint(n: int) -> bytes:
        low = bytes([n & 0x7F | (0x80 if n > 0x7F else 0)])
        return low + (varint(n >> 7) if n > 0x7F else b"")

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


PIECE = field(1, field(1, b"a") + b"\x15\0\0\0\0")
BPE = field(3, 2)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a SentencePiece model, or cut off: it has no pieces. Download the file again."),
        (
            b"<html>404</html>",
            "not a SentencePiece model, or cut off: wire type 4 at byte 1. Download the file "
            "again.",
        ),
        (
            (PIECE + field(2, BPE))[:-2],
            "not a SentencePiece model, or cut off: 2 bytes expected at byte 12, 0 are there. "
            "Download the file again.",
        ),
        (
            field(1, field(1, 5)) + field(2, BPE),
            "not a SentencePiece model, or cut off: a number where bytes are expected. "
            "Download the "
            "file again.",
        ),
        (
            PIECE + field(2, field(3, 4)),
            "SentencePiece model_type char is not converted: expected unigram or bpe",
        ),
        (
            PIECE + field(2, BPE + field(24, 1)),
            "a SentencePiece model with treat_whitespace_as_suffix = true is not converted",
        ),
        (
            PIECE + field(2, BPE) + field(3, field(5, 0)),
            "a SentencePiece model with escape_whitespaces = false is not converted",
        ),
        (
            PIECE + field(1, field(1, b"b") + field(3, 5)) + field(2, BPE),
            "a SentencePiece model with pieces of type UNUSED is not converted",
        ),
    ],
    ids=["empty", "html", "cut off", "wrong type", "char", "suffix", "escape", "unused"],
)
def test_files_that_are_not_converted(content: bytes, expected: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        parse_model(content, "m/tokenizer.model")
    assert str(caught.value) == f"m/tokenizer.model: {expected}"


def test_any_damage_is_an_error_or_another_model_and_never_a_crash() -> None:
    content = trained(model_type="bpe", byte_fallback=True)
    generator = random.Random(9)
    damages: list[Callable[[bytes], bytes]] = [
        lambda data: data[: generator.randrange(len(data))],
        lambda data: data[: (at := generator.randrange(len(data)))] + b"\xff" + data[at + 1 :],
    ]
    refused = 0
    for _ in range(300):
        try:
            parse_model(generator.choice(damages)(content), "tokenizer.model")
        except TokenizerError:
            refused += 1
    assert refused > 100
