import base64
import json
import random
from itertools import pairwise
from typing import Any

import pytest
import tokenizers

from relaxlm.compiler.byte_level_bpe import (
    TEKKEN_SETTINGS,
    from_ranks,
    from_tekken,
    from_vocab_and_merges,
    merges_from_ranks,
    parse_ranks,
)
from relaxlm.errors import TokenizerError
from relaxlm.runtime.tokenizer import Tokenizer
from tests.runtime.tokenizer_samples import TEXT, byte_level_json, shared_file
from tests.shared_data import needs_shared_data

SAMPLES = [*TEXT, "I'm  \n\n   don't 12345 \t x\r\n  ", "été 3.14 HTML5 你好!!! ..."]


def merges_of(description: dict[str, Any]) -> list[list[str]]:
    merges = description["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]


def assert_same_tokenizer(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for key in ("added_tokens", "normalizer", "pre_tokenizer", "decoder"):
        assert ours[key] == theirs[key]
    for key in ("type", "vocab", "ignore_merges", "fuse_unk", "byte_fallback", "unk_token"):
        assert ours["model"][key] == theirs["model"].get(key, False)
    assert merges_of(ours) == merges_of(theirs)


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "config", "reference"),
    [
        ("gpt2", None, "gpt2/tokenizer.json"),
        ("qwen2", "qwen2/tokenizer_config.qwen2.5.json", "qwen2/tokenizer.json.xz"),
    ],
)
def test_real_vocab_and_merges(name: str, config: str | None, reference: str) -> None:
    ours = from_vocab_and_merges(
        json.loads(shared_file(f"{name}/vocab.json")),
        shared_file(f"{name}/merges.txt").decode("utf-8"),
        json.loads(shared_file(config)) if config else {},
        name,
        name,
    )
    assert_same_tokenizer(ours, json.loads(shared_file(reference)))


@needs_shared_data
def test_real_tiktoken_file_of_llama_3() -> None:
    ranks = parse_ranks(shared_file("llama-3/tokenizer.model"), "tokenizer.model")
    assert ranks is not None
    assert len(ranks) == 128000
    settings = json.loads(shared_file("llama-3/tokenizer_config.json"))
    ours = from_ranks(ranks, settings, "tokenizer.model")
    assert_same_tokenizer(ours, json.loads(shared_file("llama-3/tokenizer.json.xz")))
    tokenizer = Tokenizer(json.dumps(ours).encode(), settings)
    assert tokenizer.encode("Hello world") == [128000, 9906, 1917]


def joined_by_rank(ranks: dict[bytes, int], word: bytes) -> list[int]:
    """tiktoken's algorithm, as slow as it is short."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        unions = [ranks.get(a + b, 1 << 30) for a, b in pairwise(parts)]
        if word in ranks:
            return [ranks[word]]
        if not unions or min(unions) == 1 << 30:
            return [ranks[part] for part in parts]
        at = unions.index(min(unions))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def random_ranks(generator: random.Random) -> dict[bytes, int]:
    """A vocabulary that grew by joining random neighbours, over few letters so that cuts abound."""
    tokens = [bytes([byte]) for byte in range(256)]
    pool = [b"a", b"b", b" "]
    while len(pool) < 40:
        union = generator.choice(pool) + generator.choice(pool)
        if union not in pool and len(union) < 9:
            pool.append(union)
    return {token: rank for rank, token in enumerate([*tokens, *pool[3:]])}


def test_ranks_become_merges_that_join_the_same_way() -> None:
    generator = random.Random(4)
    for _ in range(20):
        ranks = random_ranks(generator)
        vocab = {"".join(chr(b) for b in token).replace(" ", "Ġ"): r for token, r in ranks.items()}
        merges = [(left, right) for left, right in merges_from_ranks(ranks)]
        letters = {token: rank for token, rank in vocab.items() if set(token) <= set("abĠ")}
        model = tokenizers.models.BPE(vocab=letters, merges=merges, ignore_merges=True)
        tokenizer = tokenizers.Tokenizer(model)
        for _ in range(50):
            word = "".join(generator.choice("aab ") for _ in range(generator.randrange(1, 16)))
            ids = tokenizer.encode(word.replace(" ", "Ġ"), add_special_tokens=False).ids
            assert ids == joined_by_rank(ranks, word.encode())


def test_a_vocabulary_in_two_files_gives_the_ids_of_one() -> None:
    reference = json.loads(byte_level_json())
    settings = {
        "tokenizer_class": "GPT2TokenizerFast",
        "eos_token": "<|endoftext|>",
        "added_tokens_decoder": {"1": {"content": "<|im_start|>", "special": True}},
    }
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges_of(reference)), ""])
    ours = from_vocab_and_merges(
        reference["model"]["vocab"], merges, settings, "x", "x", {"<|im_end|>": 2, "<extra>": 400}
    )
    tokenizer, theirs = Tokenizer(json.dumps(ours).encode()), Tokenizer(byte_level_json().encode())
    for text in [*SAMPLES, "<|im_start|>user<|im_end|>"]:
        assert tokenizer.encode(text) == theirs.encode(text)
    assert tokenizer.encode("<extra>") == [400]
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.decode([400]) == "<extra>"


def test_a_class_whose_pattern_is_not_known() -> None:
    with pytest.raises(TokenizerError) as caught:
        from_vocab_and_merges({}, "", {"tokenizer_class": "BartTokenizer"}, "bart", "dir")
    assert str(caught.value) == (
        "dir: how BartTokenizer cuts texts into words is not known, so vocab.json and merges.txt "
        "cannot be converted (known are GPT2Tokenizer, CodeGenTokenizer, Qwen2Tokenizer, "
        "Qwen3Tokenizer). Save a tokenizer.json with transformers: "
        "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )
    with pytest.raises(TokenizerError, match="dir: how model_type 'bart' cuts texts"):
        from_vocab_and_merges({}, "", {}, "bart", "dir")


@pytest.mark.parametrize("line", ["a", "a b c", "a z"])
def test_merges_that_do_not_fit_the_vocabulary(line: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        from_vocab_and_merges({"a": 0, "b": 1, "ab": 2}, f"a b\n{line}\n", {}, "gpt2", "dir")
    assert str(caught.value) == (
        f"dir: merges.txt, line 2: {line!r} is not two tokens whose union is in vocab.json. "
        "Are the "
        "two files from the same revision?"
    )


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def test_tiktoken_files() -> None:
    ranks = {b"a": 0, b"\xff\x00": 1, b"\n": 2}
    assert parse_ranks(tiktoken_file(ranks), "x") == ranks
    assert parse_ranks(b"\n\x0b\n\x05<unk>", "x") is None
    with pytest.raises(TokenizerError) as caught:
        parse_ranks(tiktoken_file(ranks) + b"!\n", "dir/tokenizer.model")
    assert str(caught.value) == (
        "dir/tokenizer.model: line 4 is not a token in base64 and its rank"
    )
    with pytest.raises(TokenizerError) as caught:
        parse_ranks(tiktoken_file({b"a": 0, b"b": 2}), "dir/tokenizer.model")
    assert str(caught.value) == (
        "dir/tokenizer.model: ranks are missing or doubled: is the file complete?"
    )


def test_tiktoken_files_that_are_not_converted() -> None:
    with pytest.raises(TokenizerError) as caught:
        from_ranks({b"a": 0}, {}, "x.tiktoken")
    assert str(caught.value) == (
        "x.tiktoken: a tiktoken file of 1 ranks, whose way to cut texts into words is not known "
        "(known are those of 128000, 100256, 151643 ranks). Save a tokenizer.json with "
        "transformers."
    )
    ranks = {i.to_bytes(3, "big"): i for i in range(128000)}
    with pytest.raises(TokenizerError) as caught:
        from_ranks(ranks, {}, "x.tiktoken")
    assert str(caught.value) == (
        "x.tiktoken: a tiktoken file has no special tokens, and there is no tokenizer_config.json "
        "beside it with added_tokens_decoder. Copy it from the model's Hugging Face folder."
    )


def tekken(**changes: Any) -> dict[str, Any]:
    ranks = random_ranks(random.Random(8))
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode()}
        for token, rank in ranks.items()
    ]
    return {
        "config": {
            "pattern": r"\s*\w+|\s+",
            "default_vocab_size": len(ranks) + 10 - 1,  # the last token is not used
            "default_num_special_tokens": 10,
        },
        "vocab": vocab,
        "special_tokens": [
            {"rank": 0, "token_str": "<unk>", "is_control": True},
            {"rank": 1, "token_str": "<s>", "is_control": True},
            {"rank": 2, "token_str": "</s>", "is_control": True},
            {"rank": 3, "token_str": "[INST]", "is_control": True},
        ],
        **changes,
    }


def test_tekken_files() -> None:
    content = tekken()
    tokenizer = Tokenizer(json.dumps(from_tekken(content, "tekken.json")).encode(), TEKKEN_SETTINGS)
    assert tokenizer.vocab_size == content["config"]["default_vocab_size"]
    assert tokenizer.token_to_id("<SPECIAL_9>") == 9
    ids = tokenizer.encode("[INST]a b")
    assert ids[:2] == [1, 3]
    assert tokenizer.decode(ids) == "a b"
    assert tokenizer.encode("é", add_special_tokens=False) == [0xC3 + 10, 0xA9 + 10]


def test_tekken_files_that_are_not_converted() -> None:
    with pytest.raises(TokenizerError) as caught:
        from_tekken(tekken(special_tokens=None), "dir/tekken.json")
    assert str(caught.value) == (
        "dir/tekken.json: this early tekken.json does not list its special tokens. Use the "
        "tokenizer.json of the model's Hugging Face folder."
    )
    with pytest.raises(TokenizerError) as caught:
        from_tekken({"vocab": []}, "dir/tekken.json")
    assert str(caught.value) == "dir/tekken.json: not a tekken.json: KeyError('config')"
