import json
import random
from pathlib import Path

import pytest

from relaxlm.errors import RequestError, TokenizerError
from relaxlm.runtime.tokenizer import Tokenizer, TokenizerInfo
from tests.runtime.tokenizer_samples import (
    LFS_POINTER,
    SPECIAL,
    byte_fallback_json,
    byte_level_json,
    model_folder,
    shared_file,
    write_json,
)
from tests.shared_data import SHARED, needs_shared_data

USABLE = {  # name in encode_expected.json -> files of the folder
    "llama-2": ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"],
    "llama-3": ["tokenizer.json.xz", "tokenizer_config.json"],
    "qwen2": ["tokenizer.json.xz", "tokenizer_config.qwen2.5.json"],
    "phi-3": ["tokenizer.json", "tokenizer_config.json"],
    "phi-2": ["tokenizer.json", "tokenizer_config.json"],
    "gpt2": ["tokenizer.json"],
    "gpt-neox": ["tokenizer.json"],
}


def shared_folder(name: str, folder: Path) -> Path:
    for file in USABLE[name]:
        target = file.removesuffix(".xz").replace(".qwen2.5", "")
        (folder / target).write_bytes(shared_file(f"{name}/{file}"))
    return folder


@needs_shared_data
@pytest.mark.parametrize("name", USABLE)
def test_ids_and_texts_of_real_tokenizers(name: str, tmp_path: Path) -> None:
    expected = json.loads((SHARED / "tokenizers" / "encode_expected.json").read_text("utf-8"))[name]
    tokenizer = Tokenizer.load(shared_folder(name, tmp_path))
    assert tokenizer.vocab_size == expected["vocab"]
    assert len(expected["cases"]) == 13
    for case in expected["cases"]:
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]
        assert tokenizer.encode(case["text"]) == case["ids_with_special"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
        stream = tokenizer.stream()
        parts = [stream.push([token_id]) for token_id in case["ids"]]
        assert "".join(parts) + stream.finish() == case["decoded"]


@needs_shared_data
@pytest.mark.parametrize("name", ["llama-2", "llama-3", "qwen2", "phi-3", "gpt2"])
def test_llama_cpp_vectors(name: str, tmp_path: Path) -> None:
    folder = SHARED / "tokenizers" / name
    texts = next(folder.glob("*.inp")).read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = next(folder.glob("*.out")).read_text("utf-8").splitlines()
    tokenizer = Tokenizer.load(shared_folder(name, tmp_path))
    assert len(texts) >= len(lines) >= 40
    for text, line in zip(texts, lines, strict=False):
        assert tokenizer.encode(text, add_special_tokens=False) == list(map(int, line.split()))


@needs_shared_data
@pytest.mark.parametrize("name", ["llama-2", "llama-3", "qwen2", "phi-3"])
def test_special_tokens_are_read_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared_folder(name, tmp_path)
    tokenizer = Tokenizer.load(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.special_tokens == theirs.special_tokens_map
    assert tokenizer.vocab_size == len(theirs)
    for ours, reference in [
        (tokenizer.bos_id, theirs.bos_token_id),
        (tokenizer.eos_id, theirs.eos_token_id),
        (tokenizer.pad_id, theirs.pad_token_id),
    ]:
        assert ours == reference
    added = [t.content for t in theirs.backend_tokenizer.get_added_tokens_decoder().values()]
    generator = random.Random(7)
    for _ in range(40):
        text = "".join(generator.choice([*added, " hi", "you ", "\n", " ", "😀"]) for _ in range(8))
        for special in (False, True):
            ids = tokenizer.encode(text, special)
            assert ids == theirs(text, add_special_tokens=special)["input_ids"]
            assert tokenizer.decode(ids, special) == theirs.decode(
                ids, skip_special_tokens=special, clean_up_tokenization_spaces=False
            )


def test_bos_comes_from_the_post_processor_unless_the_configuration_says_otherwise() -> None:
    content = byte_fallback_json().encode()
    names = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    tokenizer = Tokenizer(content, names)
    the = tokenizer.token_to_id("▁the")
    assert tokenizer.encode("the") == [1, the]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, True)
    assert Tokenizer(content, names | {"add_bos_token": False}).encode("the") == [the]
    both = {"add_bos_token": True, "add_eos_token": True}
    assert Tokenizer(content, names | both).encode("the") == [1, the, 2]
    assert Tokenizer(byte_level_json().encode(), {"add_bos_token": True}).encode("the") == (
        Tokenizer(byte_level_json().encode()).encode("the")
    )


def test_a_token_behind_every_text_stays_whatever_is_said_of_bos() -> None:
    """As in Qwen3-Embedding, whose vectors are the states at that token."""
    content = json.loads(byte_level_json())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    content = json.dumps(content).encode()
    plain = Tokenizer(byte_level_json().encode()).encode("the cat sat")
    for settings in ({}, {"add_bos_token": False, "eos_token": "<|im_end|>"}):
        tokenizer = Tokenizer(content, settings)
        assert tokenizer.encode("the cat sat") == [*plain, 0]
        assert tokenizer.encode("the cat sat", longest=3) == [*plain[:2], 0]
        assert tokenizer.encode("the cat sat", False, longest=2) == plain[:2]
    without = {"add_eos_token": False, "eos_token": "<|endoftext|>"}
    assert Tokenizer(content, without).encode("the cat sat") == plain


def test_limits_in_the_file_do_not_cut_texts() -> None:
    content = json.loads(byte_level_json())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    assert len(Tokenizer(json.dumps(content).encode()).encode("again " * 9)) > 9


def test_tokens_and_their_bytes() -> None:
    level, fallback = (
        Tokenizer(byte_level_json().encode()),
        Tokenizer(byte_fallback_json().encode()),
    )
    assert level.token_bytes(level.encode("é")[0]) == b"\xc3"
    assert level.token_bytes(0) == b"<|endoftext|>"
    assert level.special_ids == {0, 1, 2}
    assert fallback.token_bytes(fallback.token_to_id("▁the") or 0) == b" the"
    assert fallback.token_bytes(fallback.token_to_id("<0xE4>") or 0) == b"\xe4"
    assert (fallback.id_to_token(-1), fallback.id_to_token(10**6)) == (None, None)
    assert fallback.token_bytes(10**6) == b""
    assert b"".join(level.token_bytes(i) for i in level.encode("lazy 你好")) == "lazy 你好".encode()


def test_tokenizer_info() -> None:
    assert Tokenizer(byte_level_json().encode()).info == TokenizerInfo(
        token_postproc_method="byte_level"
    )
    assert Tokenizer(byte_fallback_json().encode()).info == TokenizerInfo(
        token_postproc_method="byte_fallback",
        prepend_space_in_encode=True,
        strip_space_in_decode=True,
    )


def test_tokens_that_only_the_configuration_has_are_added(tmp_path: Path) -> None:
    size = Tokenizer(byte_level_json().encode()).vocab_size
    settings = {
        "added_tokens_decoder": {
            str(size): {"content": "<tool>", "special": False},
            "1": {"content": "<|im_start|>", "special": True},
        },
        "eos_token": "<|im_end|>",
        "additional_special_tokens": ["<think>", {"content": "</think>"}],
    }
    folder = model_folder(tmp_path, tokenizer_config__json=settings)
    write_json(folder / "special_tokens_map.json", {"eos_token": "x", "pad_token": "<|endoftext|>"})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("<tool><think></think>") == [size, size + 1, size + 2]
    assert tokenizer.special_ids == {0, 1, 2, size + 1, size + 2}
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (2, 0, size + 3)
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "pad_token": SPECIAL[0]}


def test_a_token_whose_id_differs_between_the_files(tmp_path: Path) -> None:
    settings = {"added_tokens_decoder": {"7": {"content": "<|im_start|>"}}}
    folder = model_folder(tmp_path, tokenizer_config__json=settings)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(folder)
    assert str(caught.value) == (
        f"{folder}/tokenizer.json: token '<|im_start|>' has id 1, but 7 in tokenizer_config.json. "
        "Are the two files from the same revision?"
    )


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(TokenizerError) as caught:
            Tokenizer.load(tmp_path / "model")
        return str(caught.value)

    folder = tmp_path / "model"
    assert message() == f"{folder}: no such folder, so no tokenizer.json in it"
    folder.mkdir()
    assert message() == (
        f"{folder}: no tokenizer.json. Copy it from the Hugging Face folder that the weights came "
        "from, or run `relaxlm gen_config` on that folder."
    )
    (folder / "tokenizer.model").write_bytes(b"")
    assert message() == (
        f"{folder}: no tokenizer.json, only tokenizer.model. `relaxlm gen_config` converts it; use "
        "the folder that it writes."
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            LFS_POINTER,
            "{path} is a Git LFS pointer, not tokenizer.json (132 bytes): run `git lfs pull` in "
            "{folder}, or download the file again",
        ),
        (
            b'{"version": "1.0",',
            "{path}: not valid JSON: Expecting property name enclosed in double quotes at line 1, "
            "column 19. Is the file complete?",
        ),
        (b"\xff\xfe{}", "{path}: byte 0 is not UTF-8 text. Is the file complete?"),
        (b"[1, 2]", "{path}: expected a JSON object, found a list"),
        (b"[" * 100_000, "{path}: the JSON is nested too deeply to be read"),
        (
            b'{"added_tokens": [{"content": 1}]}',
            "{path}: added_tokens is not a list of tokens with content and id",
        ),
    ],
    ids=["lfs", "cut off", "utf-16", "list", "deep", "added tokens"],
)
def test_a_file_that_is_no_tokenizer(content: bytes, expected: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path, tokenizer__json=content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(folder)
    assert str(caught.value) == expected.format(path=folder / "tokenizer.json", folder=folder)


def test_json_that_the_library_refuses(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, tokenizer__json={"version": "1.0"})
    with pytest.raises(TokenizerError, match=r"/tokenizer\.json: not a tokenizer\.json: "):
        Tokenizer.load(folder)


@pytest.mark.parametrize(("key", "shown"), [("content", "'<|im_end|>'"), ("id", "2")])
def test_duplicate_added_tokens_are_refused(key: str, shown: str, tmp_path: Path) -> None:
    content = json.loads(byte_level_json())
    double = {**content["added_tokens"][2]}
    double["id" if key == "content" else "content"] = 299 if key == "content" else "<|other|>"
    content["added_tokens"].append(double)
    folder = model_folder(tmp_path, tokenizer__json=content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(folder)
    assert str(caught.value) == (
        f"{folder}/tokenizer.json: 2 added tokens have the {key} {shown}, which makes encoding "
        "ambiguous. Remove the duplicates from added_tokens, or get a corrected file."
    )


def test_ids_that_the_library_would_change_silently(tmp_path: Path) -> None:
    content = json.loads(byte_level_json())
    content["added_tokens"].append({**content["added_tokens"][2], "id": 400, "content": "<far>"})
    folder = model_folder(tmp_path, tokenizer__json=content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(folder)
    assert str(caught.value) == (
        f"{folder}/tokenizer.json: added token '<far>' has id 400, but the tokenizers library "
        "gives it 300, because the ids before it have gaps. Get a corrected file."
    )


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(model_folder(tmp_path / "model"))
    with pytest.raises(RequestError) as error:
        tokenizer.encode("ab\ud800")
    assert str(error.value) == (
        r"the text has '\ud800' at position 2, half of a surrogate pair and no character: "
        "send valid Unicode"
    )
