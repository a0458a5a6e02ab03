"""Tiny random embedding models as sentence-transformers folders, and what torch makes of texts.

A BERT with mean pooling, and a Qwen3 that pools the last token, which its tokenizer puts behind
every text. Both go through the real pipeline.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from relaxlm.compiler.gen_config import generate_config
from relaxlm.compiler.request import CompileRequest
from relaxlm.models import ignored_sources, load_config, parameter_specs
from relaxlm.quantization.convert import convert_weights
from relaxlm.quantization.schemes import get_scheme
from tests.models import parity

WORDS = "the cat dog sat ran on mat house query : passage hello world and to".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONGEST = 40
PROMPTS = {"query": "query: ", "passage": "passage: "}

BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": parity.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "torch_dtype": "float32",
}
QWEN3 = {
    **parity.tiny_config("qwen3", max_position_embeddings=96, num_hidden_layers=2),
    "architectures": ["Qwen3ForCausalLM"],
    "torch_dtype": "float32",
}


@cache
def tokenizer_json(kind: str) -> str:
    """A WordPiece vocabulary of WORDS and letters, framed as BERT's or as Qwen3-Embedding's."""
    vocab = [*SPECIAL, *dict.fromkeys([*WORDS, *LETTERS]), *(f"##{x}" for x in LETTERS)]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(vocab)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    single = "[CLS] $A [SEP]" if kind == "bert" else "$A [SEP]"
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[(name, vocab.index(name)) for name in ("[CLS]", "[SEP]")]
    )
    return tokenizer.to_str()


def write_modules(folder: Path, pooling: dict[str, Any], normalize: bool, **texts: Any) -> None:
    """The files of sentence-transformers.

    Args:
        pooling: 1_Pooling/config.json.
        texts: sentence_bert_config.json.
    """
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=False))
    ]
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    write = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": 64, **pooling},
        "sentence_bert_config.json": {"max_seq_length": None, "do_lower_case": False, **texts},
        "config_sentence_transformers.json": {"prompts": PROMPTS, "default_prompt_name": None},
    }
    for name, content in write.items():
        (folder / name).write_text(json.dumps(content))


@dataclass(frozen=True)
class TinyEmbedder:
    """`source` is the Hugging Face folder of `model`, `folder` the converted one in q0f32."""

    model: transformers.PreTrainedModel
    source: Path
    folder: Path
    library: Path
    pooling: str
    normalize: bool

    @staticmethod
    def make(place: Path, kind: str) -> "TinyEmbedder":
        raw = BERT if kind == "bert" else QWEN3
        source, model = place / "source", base_model(raw)
        # transformers leaves out the head, and the names that come from it.
        model.save_pretrained(source)
        (source / "config.json").write_text(json.dumps(raw))
        (source / "tokenizer.json").write_text(tokenizer_json(kind))
        settings = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
        if kind == "bert":
            write_modules(source, {"pooling_mode_mean_tokens": True}, False, max_seq_length=LONGEST)
        else:
            write_modules(source, {"pooling_mode_lasttoken": True}, True)
        folder = place / f"tiny-{kind}-q0f32"
        config = load_config(source)
        specs, ignored = parameter_specs(config), ignored_sources(config)
        convert_weights(source, get_scheme("q0f32"), folder, specs, ignored)
        generate_config(source, "q0f32", folder)
        library = place / f"{kind}.so"
        CompileRequest.read(folder, device="cpu", opt="O1").compile().save(library)
        pooling = "mean" if kind == "bert" else "last"
        return TinyEmbedder(model, source, folder, library, pooling, kind != "bert")

    def token_ids(self, text: str) -> list[int]:
        backend = tokenizers.Tokenizer.from_file(str(self.source / "tokenizer.json"))
        return backend.encode(text).ids

    def vectors(self, texts: list[str], pooling: str | None = None) -> np.ndarray:
        """What sentence-transformers computes, one text after the other, before normalization."""
        found = []
        for text in texts:
            with torch.no_grad():
                states = self.model(torch.tensor([self.token_ids(text)])).last_hidden_state[0]
            found.append(pooled(states.numpy(), pooling or self.pooling))
        return np.stack(found)


def base_model(raw: dict) -> transformers.PreTrainedModel:
    """A random model without head, no weight at its default."""
    whole = parity.reference_model(raw)
    return getattr(whole, "model", whole)


def pooled(states: np.ndarray, pooling: str) -> np.ndarray:
    """[n, hidden] to [hidden]."""
    how = {"cls": lambda x: x[0], "last": lambda x: x[-1], "max": lambda x: x.max(0)}
    return how.get(pooling, lambda x: x.mean(0))(states.astype(np.float64)).astype(np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
