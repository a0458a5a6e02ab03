"""Makes a tokenizer.json from byte-level BPE vocabularies in other files.

    vocab.json, merges.txt       GPT-2's files, also Qwen's
    tokenizer.model, *.tiktoken  tiktoken's: a line per token with base64 and rank; no merges
    tekken.json                  Mistral's: tokens in base64, the pattern, and the special tokens

How a text is cut into words before the merges is a regular expression. tekken.json has it; for
the other two it is known by tokenizer class or by the number of ranks, and anything unknown is
refused: a wrong pattern gives wrong ids without any error.
"""

import base64
import binascii
from typing import Any

from relaxlm.compiler.sentencepiece import post_processor
from relaxlm.errors import TokenizerError
from relaxlm.runtime.token_decoding import byte_letters
from relaxlm.runtime.tokenizer import special_token_names

_SHARED = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"

LLAMA3_PATTERN = _WORDS + r"|\p{N}{1,3}" + _PUNCTUATION + _SHARED
QWEN_PATTERN = _WORDS + r"|\p{N}" + _PUNCTUATION + _SHARED

# tokenizer_class without "Fast" -> pattern (None: GPT-2's own, which the ByteLevel step has)
# and NFC.
_CLASSES: dict[str, tuple[str | None, bool]] = {
    "GPT2Tokenizer": (None, False),
    "CodeGenTokenizer": (None, False),
    "Qwen2Tokenizer": (QWEN_PATTERN, True),
    "Qwen3Tokenizer": (QWEN_PATTERN, True),
}
_MODEL_TYPES = {
    "gpt2": "GPT2Tokenizer",
    "gpt_bigcode": "GPT2Tokenizer",
    "phi": "CodeGenTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
}
# Number of ranks of a tiktoken file -> pattern, NFC, and whether a text starts with BOS by default.
_RANKS: dict[int, tuple[str, bool, bool]] = {
    128000: (LLAMA3_PATTERN, False, True),  # Llama 3 to 3.3
    100256: (LLAMA3_PATTERN, False, False),  # cl100k_base, whose pattern Llama 3 took over
    151643: (QWEN_PATTERN, True, False),  # Qwen
}

# What tokenizer_config.json says of the models with a tekken.json.
TEKKEN_SETTINGS = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}

_LETTERS = {byte: letter for letter, byte in byte_letters().items()}


def from_vocab_and_merges(
    vocab: dict[str, Any],
    merges: str,
    settings: dict[str, Any],
    model_type: str,
    where: str,
    extra: dict[str, int] | None = None,
) -> dict[str, Any]:
    """tokenizer.json from the contents of vocab.json and merges.txt.

    Args:
        settings: tokenizer_config.json, for tokenizer_class, add_prefix_space and the added tokens.
        model_type: of config.json, where there is no tokenizer_class.
        extra: the content of added_tokens.json.

    Raises:
        TokenizerError: an unknown tokenizer class, or files that do not fit each other.
    """
    name = str(settings.get("tokenizer_class") or _MODEL_TYPES.get(model_type, ""))
    if name.removesuffix("Fast") not in _CLASSES:
        model = name or f"model_type {model_type!r}"
        raise TokenizerError(
            f"{where}: how {model} cuts texts into words is not known, so vocab.json and "
            "merges.txt "
            f"cannot be converted (known are {', '.join(_CLASSES)}). Save a tokenizer.json with "
            "transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    pattern, nfc = _CLASSES[name.removesuffix("Fast")]
    pairs = []
    for number, line in enumerate(merges.splitlines(), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or pair[0] + pair[1] not in vocab:
            raise TokenizerError(
                f"{where}: merges.txt, line {number}: {line!r} is not two tokens whose union is in "
                "vocab.json. Are the two files from the same revision?"
            )
        pairs.append(pair)
    prefix = bool(settings.get("add_prefix_space"))
    added = _declared(settings, vocab, extra)
    return _tokenizer_json(vocab, pairs, pattern, nfc, added, settings, prefix)


def parse_ranks(content: bytes, where: str) -> dict[bytes, int] | None:
    """The tokens of a tiktoken file by rank, or None if it is no such file.

    Raises:
        TokenizerError: a line that is not base64 and a number, or a rank that is there twice.
    """
    lines = content.split(b"\n")
    if not _rank(lines[0]):
        return None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        entry = _rank(line)
        if entry is None:
            raise TokenizerError(f"{where}: line {number} is not a token in base64 and its rank")
        ranks[entry[0]] = entry[1]
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{where}: ranks are missing or doubled: is the file complete?")
    return ranks


def _rank(line: bytes) -> tuple[bytes, int] | None:
    parts = line.split()
    if len(parts) != 2 or not parts[1].isdigit():
        return None
    try:
        return base64.b64decode(parts[0], validate=True), int(parts[1])
    except binascii.Error:
        return None


def from_ranks(ranks: dict[bytes, int], settings: dict[str, Any], where: str) -> dict[str, Any]:
    """tokenizer.json from tiktoken ranks. The special tokens come from tokenizer_config.json.

    Raises:
        TokenizerError: a number of ranks whose pattern is not known, or no special tokens.
    """
    if len(ranks) not in _RANKS:
        raise TokenizerError(
            f"{where}: a tiktoken file of {len(ranks)} ranks, whose way to cut texts into words is "
            f"not known (known are those of {', '.join(map(str, _RANKS))} ranks). Save a "
            "tokenizer.json with transformers."
        )
    declared = _declared(settings)
    if not declared:
        raise TokenizerError(
            f"{where}: a tiktoken file has no special tokens, and there is no "
            "tokenizer_config.json beside it with added_tokens_decoder. Copy it from the model's "
            "Hugging Face folder."
        )
    pattern, nfc, bos = _RANKS[len(ranks)]
    settings = {"add_bos_token": bos} | settings
    vocab = {_spelled(token): rank for token, rank in ranks.items()}
    merges = merges_from_ranks(ranks)
    # Ranks are the merges' order; a word that is a token needs no merges at all.
    description = _tokenizer_json(vocab, merges, pattern, nfc, declared, settings, False)
    description["model"]["ignore_merges"] = True
    return description


def from_tekken(content: dict[str, Any], where: str) -> dict[str, Any]:
    """tokenizer.json from the content of Mistral's tekken.json.

    Raises:
        TokenizerError: keys that are missing, or a file without its special tokens.
    """
    try:
        config, special = content["config"], content.get("special_tokens")
        total, reserved = config["default_vocab_size"], config["default_num_special_tokens"]
        ranks = {
            base64.b64decode(entry["token_bytes"]): entry["rank"]
            for entry in content["vocab"][: total - reserved]
        }
        pattern = config["pattern"]
        if not special:
            raise TokenizerError(
                f"{where}: this early tekken.json does not list its special tokens. Use the "
                "tokenizer.json of the model's Hugging Face folder."
            )
        declared = {
            entry["rank"]: {"content": entry["token_str"], "special": entry.get("is_control", True)}
            for entry in special
        }
    except (KeyError, TypeError, binascii.Error) as reason:
        raise TokenizerError(f"{where}: not a tekken.json: {reason!r}") from reason
    for i in range(reserved):
        declared.setdefault(i, {"content": f"<SPECIAL_{i}>", "special": True})
    vocab = {_spelled(token): rank + reserved for token, rank in ranks.items()}
    description = _tokenizer_json(
        vocab, merges_from_ranks(ranks), pattern, False, declared, TEKKEN_SETTINGS, False
    )
    description["model"]["ignore_merges"] = True
    return description


def merges_from_ranks(ranks: dict[bytes, int]) -> list[list[str]]:
    """Every way to cut a token in two tokens, in order of the token's rank.

    tiktoken joins the neighbours whose union has the lowest rank, however the two came about, so
    that a token needs all its cuts as merges and not only the one that made it in training.
    """
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [
            (ranks[left], ranks[right], left, right)
            for left, right in cuts
            if left in ranks and right in ranks
        ]
        merges += [[_spelled(left), _spelled(right)] for _, _, left, right in sorted(known)]
    return merges


def _spelled(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)


def _declared(
    settings: dict[str, Any],
    vocab: dict[str, Any] | None = None,
    extra: dict[str, int] | None = None,
) -> dict[int, dict[str, Any]]:
    """id -> added token: those of tokenizer_config.json and of added_tokens.json, and the tokens
    of the vocabulary that have a role.
    """
    declared = {
        int(token_id): entry
        for token_id, entry in (settings.get("added_tokens_decoder") or {}).items()
    }
    roles = {*special_token_names(settings).values(), "<|endoftext|>"}
    for token, token_id in (extra or {}).items():
        declared.setdefault(token_id, {"content": token, "special": token in roles})
    for token in roles & (vocab or {}).keys():
        declared.setdefault((vocab or {})[token], {"content": token})
    return declared


def _tokenizer_json(
    vocab: dict[str, Any],
    merges: list[list[str]],
    pattern: str | None,
    nfc: bool,
    added: dict[int, dict[str, Any]],
    settings: dict[str, Any],
    add_prefix_space: bool,
) -> dict[str, Any]:
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": pattern is None,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    # The library numbers added tokens from the end of the vocabulary on, whatever the file says.
    new = [token_id for token_id in sorted(added) if added[token_id]["content"] not in vocab]
    if new != list(range(len(vocab), len(vocab) + len(new))):
        vocab = vocab | {added[token_id]["content"]: token_id for token_id in new}
    first = _frame_token(settings, "bos_token", "add_bos_token", vocab, added)
    last = _frame_token(settings, "eos_token", "add_eos_token", vocab, added)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": entry["content"],
                "single_word": bool(entry.get("single_word", False)),
                "lstrip": bool(entry.get("lstrip", False)),
                "rstrip": bool(entry.get("rstrip", False)),
                "normalized": bool(entry.get("normalized", False)),
                "special": bool(entry.get("special", True)),
            }
            for token_id, entry in sorted(added.items())
        ],
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": byte_level
        if pattern is None
        else {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": post_processor(first, last) if first or last else None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _frame_token(
    settings: dict[str, Any],
    role: str,
    flag: str,
    vocab: dict[str, Any],
    added: dict[int, dict[str, Any]],
) -> tuple[str, int] | None:
    """The special token that goes in front of a text or behind it, if the settings ask for one."""
    token = special_token_names(settings).get(role)
    if token is None or not settings.get(flag):
        return None
    ids = {entry["content"]: token_id for token_id, entry in added.items()}
    token_id = ids.get(token, vocab.get(token))
    return None if token_id is None else (token, token_id)
