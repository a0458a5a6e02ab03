"""A tiny random llama with a tokenizer and a chat template, as a Hugging Face folder and compiled.

Everything goes through the real pipeline. The model has more rows than the tokenizer has tokens, as
real ones do; its replies are random bytes, so that characters are cut apart in every way.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from relaxlm.compiler.gen_config import generate_config
from relaxlm.compiler.request import CompileRequest
from relaxlm.models import ignored_sources, load_config, parameter_specs
from relaxlm.quantization.convert import convert_weights
from relaxlm.quantization.schemes import get_scheme

VOCAB, TOKENS = 320, 300
CONTEXT = 256

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "float32",
}
# Models with recurrent layers: one that attends in its other layer, and one that never does.
HYBRID = {
    **{name: CONFIG[name] for name in CONFIG if name not in ("mlp_bias", "rope_theta")},
    "model_type": "qwen3_5_text",
    "architectures": ["Qwen3_5ForCausalLM"],
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    "tie_word_embeddings": True,
}
RECURRENT = {
    "architectures": ["Mamba2ForCausalLM"],
    "model_type": "mamba2",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 16,
    "state_size": 24,
    "n_groups": 2,
    "expand": 2,
    "conv_kernel": 3,
    "layer_norm_epsilon": 1e-5,
    "chunk_size": 16,
    "use_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = [
    "the cat sat on the mat and the dog ran to the house",
    "system user assistant message answer question hello world",
    "naïve café, größer, 日本語 and 🙂 too",
] * 4


@dataclass(frozen=True)
class TinyModel:
    """`source` is the Hugging Face folder with `weights`, `folder` the converted one in q0f32."""

    weights: dict[str, np.ndarray]
    source: Path
    folder: Path
    library: Path

    @staticmethod
    def make(place: Path, config: Mapping[str, Any] = CONFIG) -> "TinyModel":
        weights = checkpoint_weights(config=config)
        source = write_checkpoint(place / "source", weights, config=config)
        folder = convert(source, place / "tiny-q0f32")
        return TinyModel(weights, source, folder, compile_library(folder, place / "tiny.so"))


def checkpoint_weights(seed: int = 0, config: Mapping[str, Any] = CONFIG) -> dict[str, np.ndarray]:
    """Checkpoint tensors by name, float32, none of them at a default."""
    rng = np.random.default_rng(seed)
    return {
        source.name: rng.uniform(0.5, 1.5, source.shape).astype(np.float32)
        if spec.role == "vector"
        else rng.normal(0, 0.15, source.shape).astype(np.float32)
        for spec in parameter_specs(load_config(config))
        for source in spec.sources
    }


def write_checkpoint(
    folder: Path,
    weights: Mapping[str, np.ndarray],
    template: str | None = TEMPLATE,
    config: Mapping[str, Any] = CONFIG,
) -> Path:
    """A Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    save_file(dict(weights), folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(tokenizer_json())
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@cache
def tokenizer_json() -> str:
    """A byte-level BPE of TOKENS tokens, the first three of them special."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=TOKENS,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    assert tokenizer.get_vocab_size() == TOKENS
    return tokenizer.to_str()


def convert(source: Path, output: Path, quantization: str = "q0f32", **sizes: int) -> Path:
    """A folder of weights and mlc-chat-config.json, ready to compile and run."""
    config = load_config(source)
    convert_weights(
        source, get_scheme(quantization), output, parameter_specs(config), ignored_sources(config)
    )
    generate_config(source, quantization, output, **sizes)
    return output


def compile_library(folder: Path, library: Path, overrides: str | None = None) -> Path:
    """A library for the CPU, optimised little: the model is small and the compiler slow."""
    request = CompileRequest.read(folder, device="cpu", overrides=overrides, opt="O1")
    request.compile().save(library)
    return library
