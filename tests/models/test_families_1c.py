"""InternLM2 and Orion, which transformers does not have.

The reference is float64 NumPy, written after the code that is published with InternLM2's weights
(`internlm/internlm2-7b/modeling_internlm2.py`); for Orion, whose file was not at hand, after
descriptions of it: Llama with LayerNorm.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from relaxlm import models
from tests.models import numpy_decoders as plain
from tests.models import parity
from tests.models.parity import VOCAB, tiny_config


def internlm2(raw: Mapping[str, Any], w: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    eps, heads, groups = raw["rms_norm_eps"], raw["num_attention_heads"], raw["num_key_value_heads"]
    dim, size = raw["hidden_size"] // heads, heads // groups + 2
    x = w["model.tok_embeddings.weight"][ids]
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = plain._rms_norm(x, w[f"{at}.attention_norm.weight"], eps)
        mixed = y @ w[f"{at}.attention.wqkv.weight"].T + w.get(f"{at}.attention.wqkv.bias", 0)
        mixed = mixed.reshape(len(ids), groups, size, dim)
        q, k, v = mixed[:, :, :-2], mixed[:, :, -2], mixed[:, :, -1]
        q, k, v = (part.reshape(len(ids), -1) for part in (q, k, v))
        y = plain._attention(q, k, v, heads, lambda part: plain.rotate_halves(part, 5000.0))
        x = x + y @ w[f"{at}.attention.wo.weight"].T + w.get(f"{at}.attention.wo.bias", 0)
        y = plain._rms_norm(x, w[f"{at}.ffn_norm.weight"], eps)
        gate, up = (y @ w[f"{at}.feed_forward.{part}.weight"].T for part in ("w1", "w3"))
        x = x + plain._silu(gate) * up @ w[f"{at}.feed_forward.w2.weight"].T
    return plain._rms_norm(x, w["model.norm.weight"], eps) @ w["output.weight"].T


def orion(raw: Mapping[str, Any], w: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        spread = np.sqrt((centred**2).mean(-1, keepdims=True) + raw["rms_norm_eps"])
        return centred / spread * w[f"{name}.weight"] + w[f"{name}.bias"]

    heads = raw["num_attention_heads"]
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = norm(x, f"{at}.input_layernorm")
        q, k, v = (y @ w[f"{at}.self_attn.{part}_proj.weight"].T for part in "qkv")
        y = plain._attention(q, k, v, heads, lambda part: plain.rotate_halves(part, 5000.0))
        x = x + y @ w[f"{at}.self_attn.o_proj.weight"].T
        y = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (y @ w[f"{at}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + plain._silu(gate) * up @ w[f"{at}.mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ w["lm_head.weight"].T


REFERENCES = {"internlm2": internlm2, "orion": orion}
VARIANTS = {
    "internlm2": tiny_config("internlm2", bias=False),
    "internlm2-bias": tiny_config("internlm2", bias=True, num_key_value_heads=1),
    "orion": tiny_config("orion"),
}


def random_state(raw: dict) -> dict[str, torch.Tensor]:
    """A checkpoint with the tensors and shapes that the reference reads."""
    hidden, inner = raw["hidden_size"], raw["intermediate_size"]
    kv_width = raw["num_key_value_heads"] * hidden // raw["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    if raw["model_type"] == "internlm2":
        shapes |= {
            name: (VOCAB, hidden) for name in ("model.tok_embeddings.weight", "output.weight")
        }
        in_block = {
            "attention.wqkv.weight": (hidden + 2 * kv_width, hidden),
            "attention.wo.weight": (hidden, hidden),
            "feed_forward.w1.weight": (inner, hidden),
            "feed_forward.w2.weight": (hidden, inner),
            "feed_forward.w3.weight": (inner, hidden),
            "attention_norm.weight": (hidden,),
            "ffn_norm.weight": (hidden,),
        }
        if raw["bias"]:
            in_block |= {"attention.wqkv.bias": (hidden + 2 * kv_width,)}
            in_block |= {"attention.wo.bias": (hidden,)}
    else:
        shapes |= {
            name: (VOCAB, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")
        }
        shapes["model.norm.bias"] = (hidden,)
        in_block = {
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.k_proj.weight": (kv_width, hidden),
            "self_attn.v_proj.weight": (kv_width, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "input_layernorm.weight": (hidden,),
            "input_layernorm.bias": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "post_attention_layernorm.bias": (hidden,),
        }
    for layer in range(raw["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in in_block.items()}
    rng = np.random.default_rng(2)
    values = {
        name: rng.uniform(0.5, 1.5, shape)
        if "norm" in name
        else rng.normal(0, 0.3 if name.endswith("bias") else 0.08, shape)
        for name, shape in shapes.items()
    }
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}


def reference(raw: dict, state: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    exact = {name: array.astype(np.float64) for name, array in state.items()}
    return REFERENCES[raw["model_type"]](raw, exact, ids)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_the_published_code(variant: str) -> None:
    raw = VARIANTS[variant]
    state = random_state(raw)
    specs = models.parameter_specs(models.load_config(raw))
    assert {source.name for spec in specs for source in spec.sources} == set(state)
    parity.check_transcription(raw, state, reference)


@pytest.mark.parametrize("model_type", REFERENCES)
def test_quantized(model_type: str) -> None:
    raw = VARIANTS[model_type]
    parity.check_transcription(raw, random_state(raw), reference, "q4f16_1")
