"""The tokenizer files of a converted folder: copied, and tokenizer.json made where there is
none.
"""

from pathlib import Path
from typing import Any

from relaxlm.compiler import byte_level_bpe, rwkv_vocab, sentencepiece
from relaxlm.errors import TokenizerError
from relaxlm.files import json_bytes, parse_json_object, read_bytes, read_text
from relaxlm.runtime.tokenizer import load_settings

# What MLC's tools copy, in their order, and the file where older folders name the special tokens.
COPIED = (
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def collect_tokenizer_files(
    folder: Path, model_type: str
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The tokenizer files to write, and the settings that hold with them.

    Args:
        folder: the Hugging Face folder.
        model_type: of its config.json.

    Returns:
        files: name -> content; tokenizer.json is always among them. A folder whose vocabulary
            had to be converted and that has no tokenizer_config.json gets one with the special
            tokens.
        settings: tokenizer_config.json, completed by special_tokens_map.json.

    Raises:
        TokenizerError: a file that is a Git LFS pointer or broken, or no known vocabulary.
    """
    files = {
        name: read_bytes(folder / name, TokenizerError)
        for name in COPIED
        if (folder / name).is_file()
    }
    settings = load_settings(folder)
    if "tokenizer.json" not in files:
        description, roles = _converted(folder, files, settings, model_type)
        files["tokenizer.json"] = json_bytes(description, indent=None)
        if roles and not settings:
            settings = roles
            files["tokenizer_config.json"] = json_bytes(roles)
    return files, settings


def _converted(
    folder: Path, files: dict[str, bytes], settings: dict[str, Any], model_type: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json, and what a tokenizer_config.json would say of the special tokens."""
    if "tokenizer.model" in files:
        where, content = str(folder / "tokenizer.model"), files["tokenizer.model"]
        ranks = byte_level_bpe.parse_ranks(content, where)
        if ranks is not None:
            return byte_level_bpe.from_ranks(ranks, settings, where), {}
        model = sentencepiece.parse_model(content, where)
        return sentencepiece.convert(model, settings), sentencepiece.special_tokens(model)
    if "vocab.json" in files and "merges.txt" in files:
        vocab = parse_json_object(files["vocab.json"], folder / "vocab.json", TokenizerError)
        merges = read_text(folder / "merges.txt", TokenizerError)
        extra = {}
        if "added_tokens.json" in files:
            path = folder / "added_tokens.json"
            extra = parse_json_object(files["added_tokens.json"], path, TokenizerError)
        description = byte_level_bpe.from_vocab_and_merges(
            vocab, merges, settings, model_type, str(folder), extra
        )
        return description, {"eos_token": "<|endoftext|>"} if "<|endoftext|>" in vocab else {}
    if (folder / "tekken.json").is_file():
        path = folder / "tekken.json"
        tekken = parse_json_object(read_bytes(path, TokenizerError), path, TokenizerError)
        return byte_level_bpe.from_tekken(tekken, str(path)), byte_level_bpe.TEKKEN_SETTINGS
    for path in sorted([*folder.glob("*.tiktoken"), *folder.glob("tiktoken.model")]):
        ranks = byte_level_bpe.parse_ranks(read_bytes(path, TokenizerError), str(path))
        if ranks is None:
            raise TokenizerError(f"{path}: line 1 is not a token in base64 and its rank")
        return byte_level_bpe.from_ranks(ranks, settings, str(path)), {}
    for path in sorted(folder.glob("rwkv_vocab_*.txt")):
        tokens = rwkv_vocab.parse_vocabulary(read_text(path, TokenizerError), str(path))
        end = rwkv_vocab.end_token(tokens, settings)
        return rwkv_vocab.convert(tokens, settings), {"bos_token": end, "eos_token": end}
    raise TokenizerError(
        f"{folder}: no tokenizer. Expected tokenizer.json, tokenizer.model, vocab.json with "
        "merges.txt, tekken.json or rwkv_vocab_*.txt. Download the tokenizer files of the model "
        "into this folder."
    )
