"""A llama in NumPy float64, whole sequences at once: what the compiled one is compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.reference import attention, rms_norm


def llama_logits(
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    ids: Sequence[int] | np.ndarray,
    window: int = 0,
    sinks: int = 0,
) -> np.ndarray:
    """Logits behind every token, every key computed anew and masked.

    Args:
        weights: checkpoint tensors by name.
        config: config.json, without rope scaling and biases.
        ids: [n] token ids.

    Returns:
        [n, vocab] float64.
    """
    heads, dim, eps = config["num_attention_heads"], config["head_dim"], config["rms_norm_eps"]
    positions = np.arange(len(ids))

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].astype(np.float64).T

    def rope(x: np.ndarray) -> np.ndarray:
        frequencies = config["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
        angles = positions[:, None, None] * frequencies
        first, second = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    x = weights["model.embed_tokens.weight"][np.asarray(ids)].astype(np.float64)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        normed = rms_norm(x, weights[f"{name}.input_layernorm.weight"], eps)
        q, k, v = (
            linear(normed, f"{name}.self_attn.{part}_proj").reshape(len(x), -1, dim)
            for part in "qkv"
        )
        mixed = attention(rope(q), rope(k), v, positions, dim**-0.5, window, sinks)
        x = x + linear(mixed.reshape(len(x), heads * dim), f"{name}.self_attn.o_proj")
        normed = rms_norm(x, weights[f"{name}.post_attention_layernorm.weight"], eps)
        gate, up = (linear(normed, f"{name}.mlp.{part}_proj") for part in ("gate", "up"))
        x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{name}.mlp.down_proj")
    return linear(rms_norm(x, weights["model.norm.weight"], eps), "lm_head")
