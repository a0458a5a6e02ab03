"""What a sentence-transformers folder says of making vectors.

    modules.json                           the modules, in order, and the folder of each
    sentence_bert_config.json              longest text, whether texts are lower-cased
    1_Pooling/config.json                  which states are pooled
    config_sentence_transformers.json      what stands in front of texts

Source: `sentence_transformers/models/` of that library, releases 2 to 5.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.files import read_json_object
from relaxlm.models.task import MODULES, module_kinds
from relaxlm.runtime.chat_config import EmbeddingSection, Pooling

# Its names of what we have; each is also a key of older files, pooling_mode_cls_token and so on.
POOLING: Mapping[str, Pooling] = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last"}
_OLD_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
# Of the pooling's own configuration, which say nothing that we don't know.
_SIZES = ("word_embedding_dimension", "embedding_dimension")


@dataclass(frozen=True)
class SentenceTransformer:
    """
    Attributes:
        longest: tokens that a text may have; None if nothing is said.
        section: what mlc-chat-config.json has no place of its own for.
    """

    pooling: Pooling
    normalize: bool
    longest: int | None
    section: EmbeddingSection


def read(folder: Path) -> SentenceTransformer | None:
    """Read the files of a Hugging Face folder; None if it has no modules.json.

    Raises:
        ConfigError: a file is missing or malformed.
        UnsupportedError: a module or a pooling that relaxlm does not implement.
    """
    if not (folder / MODULES).is_file():
        return None
    modules = module_kinds(folder)
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedError(
            f"{folder / MODULES}: the modules {', '.join(kinds)} are not supported: expected "
            "Transformer, Pooling and, maybe, Normalize"
        )
    if modules[0][1]:
        raise UnsupportedError(
            f"{folder / MODULES}: the model is in the folder {modules[0][1]!r} within, expected "
            "this one: give its files, and those of tokenizer and modules, one folder"
        )
    longest, lowercase = _texts(folder)
    return SentenceTransformer(
        _pooling(folder / modules[1][1] / "config.json"),
        "Normalize" in kinds,
        longest,
        EmbeddingSection(lowercase=lowercase, strip=True, **_prompts(folder)),
    )


def _pooling(path: Path) -> Pooling:
    config = dict(read_json_object(path, ConfigError)) if path.is_file() else None
    if config is None:
        raise ConfigError(f"{path}: no such file, and {MODULES} names it")
    for name in _SIZES:
        config.pop(name, None)
    if config.pop("include_prompt", True) is not True:
        raise UnsupportedError(f"{path}: include_prompt = false is not supported: expected true")
    found = config.pop("pooling_mode", None)
    named = [found] if isinstance(found, str) else list(found or ())
    named += [mode for key, mode in _OLD_KEYS.items() if config.pop(key, False)]
    if config:
        raise UnsupportedError(f"{path}: {', '.join(config)} is not supported")
    if len(named) != 1 or named[0] not in POOLING:
        raise UnsupportedError(
            f"{path}: pooling {' and '.join(map(str, named)) or 'of nothing'} is not supported: "
            f"expected one of {', '.join(POOLING)}"
        )
    return POOLING[named[0]]


def _texts(folder: Path) -> tuple[int | None, bool]:
    """The longest text, and whether texts are lower-cased."""
    # Older releases called the file by the model: sentence_roberta_config.json.
    for path in sorted(folder.glob("sentence_*_config.json")):
        config = read_json_object(path, ConfigError)
        longest = config.get("max_seq_length")
        if longest is not None and (not isinstance(longest, int) or longest < 1):
            raise ConfigError(f"{path}: max_seq_length = {longest!r}: expected a number of tokens")
        return longest, bool(config.get("do_lower_case"))
    return None, False


def _prompts(folder: Path) -> dict[str, Any]:
    path = folder / "config_sentence_transformers.json"
    if not path.is_file():
        return {}
    config = read_json_object(path, ConfigError)
    prompts, name = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise ConfigError(f"{path}: prompts = {json.dumps(prompts)}: expected texts by name")
    if name is not None and name not in prompts:
        raise ConfigError(f"{path}: default_prompt_name = {name!r} is none of its prompts")
    return {"prompts": prompts, "default_prompt_name": name}
