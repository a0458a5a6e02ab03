"""Decoders that transformers does not have, in float64 NumPy, after the code that is published with
their weights. Slow and plain: one text at a time, no cache, one loop over heads."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _angles(positions: int, dim: int, base: float) -> np.ndarray:
    """[positions, dim / 2]: radians."""
    return np.arange(positions)[:, None] * base ** (-np.arange(0, dim, 2) / dim)


def rotate_halves(x: np.ndarray, base: float) -> np.ndarray:
    """Llama's: feature i of a head turns with feature i + dim / 2."""
    angles = _angles(len(x), x.shape[-1], base)
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotate_pairs_of_first_half(x: np.ndarray, base: float) -> np.ndarray:
    """ChatGLM's: neighbours turn, in the first half of a head."""
    turning, rest = np.split(x, 2, axis=-1)
    turned = np.empty_like(turning)
    angles = _angles(len(x), turning.shape[-1], base)
    for pair in range(turning.shape[-1] // 2):
        a, b = turning[:, 2 * pair], turning[:, 2 * pair + 1]
        cos, sin = np.cos(angles[:, pair]), np.sin(angles[:, pair])
        turned[:, 2 * pair], turned[:, 2 * pair + 1] = a * cos - b * sin, b * cos + a * sin
    return np.concatenate([turned, rest], axis=-1)


def _attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    heads: int,
    turn: Callable[[np.ndarray], np.ndarray],
    slopes: list[float] | None = None,
) -> np.ndarray:
    """q [n, heads * dim], k and v [n, kv_heads * dim] -> [n, heads * dim]."""
    n, dim = len(q), q.shape[1] // heads
    group = heads // (k.shape[1] // dim)
    result = np.empty_like(q)
    for head in range(heads):
        own = slice(head * dim, (head + 1) * dim)
        shared = slice(head // group * dim, (head // group + 1) * dim)
        scores = turn(q[:, own]) @ turn(k[:, shared]).T / np.sqrt(dim)
        if slopes is not None:
            scores += slopes[head] * (np.arange(n) - np.arange(n)[:, None])
        scores[np.triu_indices(n, 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        result[:, own] = weights / weights.sum(-1, keepdims=True) @ v[:, shared]
    return result


def interleaved_slopes(heads: int) -> list[float]:
    """ALiBi's, as Baichuan 13B's `_get_interleave` has them."""
    if heads & (heads - 1) == 0:
        start = 2.0 ** (-8 / heads)
        return [start ** (i + 1) for i in range(heads)]
    fewer = 1 << (heads.bit_length() - 1)
    return interleaved_slopes(fewer) + interleaved_slopes(2 * fewer)[::2][: heads - fewer]


def chatglm(raw: Mapping[str, Any], tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    """ChatGLM3-6B and GLM-4-9B: `THUDM/chatglm3-6b/modeling_chatglm.py`. Logits [n, vocab]."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    eps, width = raw["layernorm_epsilon"], raw["kv_channels"]
    base = 10000 * raw.get("rope_ratio", 1)
    heads, groups = raw["num_attention_heads"], raw["multi_query_group_num"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    x = w["transformer.embedding.word_embeddings.weight"][ids]
    for layer in range(raw["num_layers"]):
        at = f"transformer.encoder.layers.{layer}"
        y = _rms_norm(x, w[f"{at}.input_layernorm.weight"], eps)
        mixed = linear(y, f"{at}.self_attention.query_key_value")
        q, k, v = np.split(mixed, [heads * width, (heads + groups) * width], axis=1)
        y = _attention(q, k, v, heads, lambda part: rotate_pairs_of_first_half(part, base))
        x = x + linear(y, f"{at}.self_attention.dense")
        y = _rms_norm(x, w[f"{at}.post_attention_layernorm.weight"], eps)
        gate, up = np.split(linear(y, f"{at}.mlp.dense_h_to_4h"), 2, axis=1)
        x = x + linear(_silu(gate) * up, f"{at}.mlp.dense_4h_to_h")
    x = _rms_norm(x, w["transformer.encoder.final_layernorm.weight"], eps)
    return x @ w["transformer.output_layer.weight"].T


def baichuan(raw: Mapping[str, Any], tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    """Baichuan 2 7B: `baichuan-inc/Baichuan2-7B-Base/modeling_baichuan.py`; the first generation
    where the vocabulary is not that of the second, 13B where there is no `max_position_embeddings`.
    Logits [n, vocab]."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    head = w["lm_head.weight"]
    if raw["vocab_size"] == 125696:
        head = head / np.linalg.norm(head, axis=1, keepdims=True)

    def mix(y: np.ndarray, at: str) -> list[np.ndarray]:
        return np.split(y @ w[f"{at}.W_pack.weight"].T, 3, axis=1)

    slopes = None
    if raw.get("max_position_embeddings") is None:
        slopes = interleaved_slopes(raw["num_attention_heads"])
    x = _llama_like(raw, w, w["model.embed_tokens.weight"][ids], mix, slopes=slopes)
    return x @ head.T


def minicpm(raw: Mapping[str, Any], tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    """MiniCPM-2B: `openbmb/MiniCPM-2B-sft-bf16/modeling_minicpm.py`. Logits [n, vocab]."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def mix(y: np.ndarray, at: str) -> list[np.ndarray]:
        return [y @ w[f"{at}.{part}_proj.weight"].T for part in "qkv"]

    x = w["model.embed_tokens.weight"][ids] * raw["scale_emb"]
    share = raw["scale_depth"] / np.sqrt(raw["num_hidden_layers"])
    x = _llama_like(raw, w, x, mix, share)
    head = w["model.embed_tokens.weight" if raw["tie_word_embeddings"] else "lm_head.weight"]
    return x / (raw["hidden_size"] / raw["dim_model_base"]) @ head.T


def _llama_like(
    raw: Mapping[str, Any],
    w: Tensors,
    x: np.ndarray,
    mix: Callable[[np.ndarray, str], list[np.ndarray]],
    share: float = 1.0,
    slopes: list[float] | None = None,
) -> np.ndarray:
    eps, base = raw["rms_norm_eps"], raw.get("rope_theta", 10000.0)

    def turn(part: np.ndarray) -> np.ndarray:
        return rotate_halves(part, base) if slopes is None else part

    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = _rms_norm(x, w[f"{at}.input_layernorm.weight"], eps)
        q, k, v = mix(y, f"{at}.self_attn")
        y = _attention(q, k, v, raw["num_attention_heads"], turn, slopes)
        x = x + y @ w[f"{at}.self_attn.o_proj.weight"].T * share
        y = _rms_norm(x, w[f"{at}.post_attention_layernorm.weight"], eps)
        y = _silu(y @ w[f"{at}.mlp.gate_proj.weight"].T) * (y @ w[f"{at}.mlp.up_proj.weight"].T)
        x = x + y @ w[f"{at}.mlp.down_proj.weight"].T * share
    return _rms_norm(x, w["model.norm.weight"], eps)
