"""Small tokenizers made on the spot, and the shared ones unpacked."""

import json
import lzma
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tests.shared_data import SHARED

TEXT = [
    "the quick brown fox jumps over the lazy dog, again and again",
    "Żółw i łódź: café naïve über 你好、世界 😀👨\u200d👩",
    "def f(x):\n    return x ** 2  # twice\n",
    "1 2 3 14 15 92 65 35 89 79",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@cache
def byte_level_json() -> str:
    """A byte-level BPE of some 300 tokens that covers only a part of TEXT, and SPECIAL."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer.to_str()


@cache
def byte_fallback_json() -> str:
    """A SentencePiece-like BPE: "▁" for spaces, bytes for other characters, <s> in front."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["▁", *"theabcdfoxłz", "▁t", "he", "▁the", "▁▁", "▁▁▁▁", "ox", "▁a"]
    vocab = {piece: i for i, piece in enumerate([*pieces, *letters])}
    merges = [
        ["▁", "t"],
        ["h", "e"],
        ["▁t", "he"],
        ["▁", "▁"],
        ["▁▁", "▁▁"],
        ["o", "x"],
        ["▁", "a"],
    ]
    added = [{"id": i, "content": pieces[i], "special": True} for i in range(3)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    undo = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{**token, **flags} for token in added],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace],
            },
            "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [begin, text],
                "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [undo, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": "<unk>",
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": vocab,
                "merges": merges,
            },
        }
    )


LLAMA_CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.40.0",
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def model_folder(folder: Path, **files: object) -> Path:
    """A Hugging Face folder: config.json, a byte-level tokenizer.json, and what else is given.

    Args:
        files: file name with "." written as "__" -> text, bytes, a JSON value, or None to leave
        it out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given: dict[str, object] = {
        "config__json": dict(LLAMA_CONFIG),
        "tokenizer__json": byte_level_json(),
        "tokenizer_config__json": {
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHATML,
        },
        **files,
    }
    for name, value in given.items():
        path = folder / name.replace("__", ".")
        if isinstance(value, bytes):
            path.write_bytes(value)
        elif isinstance(value, str):
            path.write_text(value, encoding="utf-8")
        elif value is not None:
            write_json(path, value)
    return folder


def shared_file(name: str) -> bytes:
    """A file of the shared tokenizers, unpacked."""
    content = (SHARED / "tokenizers" / name).read_bytes()
    return lzma.decompress(content) if name.endswith(".xz") else content


LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 9085657\n"
)
