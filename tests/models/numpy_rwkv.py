"""RWKV 5, 6 and 7 in float64 NumPy, after the code that is published with their weights:
transformers has none of them. Slow and plain: one text at a time, one token after the other."""

from collections.abc import Mapping
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _layer_norm(x: np.ndarray, w: Tensors, at: str, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return normed * w[f"{at}.weight"] + w.get(f"{at}.bias", 0)


def _group_norm(x: np.ndarray, w: Tensors, at: str, eps: float) -> np.ndarray:
    """[n, heads, size] -> [n, heads * size]: heads by themselves, features each their weight."""
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return normed.reshape(len(x), -1) * w[f"{at}.weight"] + w[f"{at}.bias"]


def _shifted(x: np.ndarray) -> np.ndarray:
    """Every row replaced by the one before it, the first by zeros."""
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def _heads(x: np.ndarray, count: int) -> np.ndarray:
    return x.reshape(len(x), count, -1)


def _scan(
    r: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray, bonus: np.ndarray
) -> np.ndarray:
    """What receptances read of the states before each token, and of the token itself."""
    out = np.empty_like(v)
    state = np.zeros((v.shape[1], k.shape[2], v.shape[2]))
    for t in range(len(v)):
        added = k[t][:, :, None] * v[t][:, None, :]
        out[t] = np.einsum("hk,hkv->hv", r[t], state + bonus[:, :, None] * added)
        state = decay[t][:, :, None] * state + added
    return out


def rwkv5(raw: Mapping[str, Any], tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    """RWKV/rwkv-5-world-1b5: `modeling_rwkv5.py`. Logits [n, vocab]."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    count = raw["hidden_size"] // raw["head_size"]

    def time_mix(x: np.ndarray, at: str) -> np.ndarray:
        def mixed(part: str) -> np.ndarray:
            share = w[f"{at}.time_mix_{part}"].reshape(-1)
            return (x * share + _shifted(x) * (1 - share)) @ w[f"{at}.{part}.weight"].T

        r, k, v = (_heads(mixed(part), count) for part in ("receptance", "key", "value"))
        decay = np.exp(-np.exp(w[f"{at}.time_decay"]))
        out = _scan(r, k, v, np.broadcast_to(decay, k.shape), w[f"{at}.time_faaaa"])
        gate = mixed("gate")
        out = _group_norm(out, w, f"{at}.ln_x", 1e-5) * gate * sigmoid(gate)
        return out @ w[f"{at}.output.weight"].T

    def channel_mix(x: np.ndarray, at: str) -> np.ndarray:
        def mixed(part: str) -> np.ndarray:
            share = w[f"{at}.time_mix_{part}"].reshape(-1)
            return (x * share + _shifted(x) * (1 - share)) @ w[f"{at}.{part}.weight"].T

        inner = np.maximum(mixed("key"), 0) ** 2
        return sigmoid(mixed("receptance")) * (inner @ w[f"{at}.value.weight"].T)

    return _blocks(raw, w, ids, time_mix, channel_mix)


def rwkv6(raw: Mapping[str, Any], tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    """RWKV/v6-Finch-1B6-HF: `modeling_rwkv6.py`. Logits [n, vocab]."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    count = raw["hidden_size"] // raw["head_size"]
    eps = 1e-5 * raw["head_size_divisor"] ** 2

    def time_mix(x: np.ndarray, at: str) -> np.ndarray:
        change = _shifted(x) - x
        inner = np.tanh((x + change * w[f"{at}.time_maa_x"][0]) @ w[f"{at}.time_maa_w1"])
        rank = inner.shape[1] // 5
        mixed = {}
        for place, part in enumerate("wkvrg"):
            own = inner[:, place * rank : (place + 1) * rank] @ w[f"{at}.time_maa_w2"][place]
            mixed[part] = x + change * (w[f"{at}.time_maa_{part}"][0] + own)
        r, k, v = (
            _heads(mixed[part] @ w[f"{at}.{name}.weight"].T, count)
            for part, name in (("r", "receptance"), ("k", "key"), ("v", "value"))
        )
        speed = w[f"{at}.time_decay"][0] + (
            np.tanh(mixed["w"] @ w[f"{at}.time_decay_w1"]) @ w[f"{at}.time_decay_w2"]
        )
        decay = _heads(np.exp(-np.exp(speed)), count)
        out = _group_norm(_scan(r, k, v, decay, w[f"{at}.time_faaaa"]), w, f"{at}.ln_x", eps)
        gate = mixed["g"] @ w[f"{at}.gate.weight"].T
        return (out * gate * sigmoid(gate)) @ w[f"{at}.output.weight"].T

    def channel_mix(x: np.ndarray, at: str) -> np.ndarray:
        change = _shifted(x) - x
        k = (x + change * w[f"{at}.time_maa_k"][0]) @ w[f"{at}.key.weight"].T
        r = (x + change * w[f"{at}.time_maa_r"][0]) @ w[f"{at}.receptance.weight"].T
        return sigmoid(r) * (np.maximum(k, 0) ** 2 @ w[f"{at}.value.weight"].T)

    return _blocks(raw, w, ids, time_mix, channel_mix)


def _blocks(raw: Mapping[str, Any], w: Tensors, ids: np.ndarray, time_mix, channel_mix):
    """Without the halving of `rescale_every`, which norms undo but for their epsilon."""
    eps = raw["layer_norm_epsilon"]
    x = _layer_norm(w["rwkv.embeddings.weight"][ids], w, "rwkv.blocks.0.pre_ln", eps)
    for layer in range(raw["num_hidden_layers"]):
        at = f"rwkv.blocks.{layer}"
        every = raw["rescale_every"]
        # What halving leaves: in a norm, an epsilon that is larger by the square of the scale.
        own = eps * 4.0 ** (layer // every) if every > 0 else eps
        x = x + time_mix(_layer_norm(x, w, f"{at}.ln1", own), f"{at}.attention")
        x = x + channel_mix(_layer_norm(x, w, f"{at}.ln2", own), f"{at}.feed_forward")
    every = raw["rescale_every"]
    last = 1e-5 * (4.0 ** (raw["num_hidden_layers"] // every) if every > 0 else 1)
    return _layer_norm(x, w, "rwkv.ln_out", last) @ w["head.weight"].T


def rwkv7(raw: Mapping[str, Any], tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    """fla-hub/rwkv7-1.5B-world: `fla/layers/rwkv7.py`, `fla/models/rwkv7/modeling_rwkv7.py`.
    Logits [n, vocab]."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    eps, size = raw["norm_eps"], raw["head_dim"]
    count = raw["hidden_size"] // size

    def adapter(x: np.ndarray, at: str, between=lambda x: x) -> np.ndarray:
        inner = between(x @ w[f"{at}.lora.0.weight"].T)
        return inner @ w[f"{at}.lora.2.weight"].T + w.get(f"{at}.lora.2.bias", 0)

    def time_mix(x: np.ndarray, at: str, first: np.ndarray | None):
        change = _shifted(x) - x
        mixed = {part: x + change * w[f"{at}.x_{part}"].reshape(-1) for part in "rwkvag"}
        r, k, v = (mixed[part] @ w[f"{at}.{part}_proj.weight"].T for part in "rkv")
        if first is None:
            first = v
        else:
            v = v + (first - v) * sigmoid(adapter(mixed["v"], f"{at}.v_lora"))
        decay = np.exp(-np.exp(-0.5) * sigmoid(adapter(mixed["w"], f"{at}.w_lora", np.tanh)))
        a = sigmoid(adapter(mixed["a"], f"{at}.a_lora"))
        gate = adapter(mixed["g"], f"{at}.g_lora", sigmoid)
        kk = _heads(k * w[f"{at}.k_k"], count)
        length = (kk**2).sum(-1, keepdims=True)
        kk = kk / (np.sqrt(length + 1e-6) if raw["fuse_norm"] else np.sqrt(length))
        k = k * (1 + (a - 1) * w[f"{at}.k_a"])
        r, k, v, a, decay = (_heads(part, count) for part in (r, k, v, a, decay))
        out, state = np.empty_like(v), np.zeros((count, size, size))
        for t in range(len(x)):
            held = np.einsum("hk,hkv->hv", kk[t], state)
            state = decay[t][:, :, None] * state - (kk[t] * a[t])[:, :, None] * held[:, None, :]
            state = state + k[t][:, :, None] * v[t][:, None, :]
            out[t] = np.einsum("hk,hkv->hv", r[t], state)
        normed = _heads(_group_norm(out, w, f"{at}.g_norm", size * eps), count)
        own = (r * k * w[f"{at}.r_k"]).sum(-1, keepdims=True) * v
        return ((normed + own).reshape(len(x), -1) * gate) @ w[f"{at}.o_proj.weight"].T, first

    x, first = w["model.embeddings.weight"][ids], None
    if raw["norm_first"]:
        x = _layer_norm(x, w, "model.layers.0.pre_norm", eps)
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        mixed, first = time_mix(_layer_norm(x, w, f"{at}.attn_norm", eps), f"{at}.attn", first)
        x = x + mixed
        y = _layer_norm(x, w, f"{at}.ffn_norm", eps)
        y = (y + (_shifted(y) - y) * w[f"{at}.ffn.x_k"]) @ w[f"{at}.ffn.key.weight"].T
        x = x + np.maximum(y, 0) ** 2 @ w[f"{at}.ffn.value.weight"].T
    return _layer_norm(x, w, "model.norm", eps) @ w["lm_head.weight"].T
