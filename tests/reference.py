"""Slow and obvious versions of what relaxlm computes, in NumPy float64."""

import numpy as np


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    positions: np.ndarray,
    scale: float,
    window: int = 0,
    sinks: int = 0,
    cap: float = 0.0,
    sink_logits: np.ndarray | None = None,
    chunked: bool = False,
    slopes: np.ndarray | None = None,
) -> np.ndarray:
    """Causal grouped-query attention of one sequence.

    Args:
        q: [n, q_heads, dim], the last n tokens.
        k, v: [length, kv_heads, dim], every token of the sequence.
        positions: [n], where the rows of q stand in the sequence.
        cap: scores s become cap tanh(s / cap), unless it is 0.
        sink_logits: [q_heads], of a token without a value that every query of a head sees.
        chunked: whether a window is a chunk of so many tokens, and a query sees those of its own.
        slopes: [q_heads], what scores lose for every token between a key and the query.

    Returns:
        [n, q_heads, dim] float64.
    """
    share = q.shape[1] // k.shape[1]
    keys = np.arange(len(k))
    out = np.empty(q.shape, np.float64)
    for row, position in enumerate(positions):
        seen = keys <= position
        if window > 0:
            near = keys // window == position // window if chunked else position - keys < window
            seen &= near | (keys < sinks)
        for head in range(q.shape[1]):
            scores = k[seen, head // share].astype(np.float64) @ q[row, head] * scale
            if cap:
                scores = cap * np.tanh(scores / cap)
            if slopes is not None:
                scores = scores - float(slopes[head]) * (position - keys[seen])
            logit = -np.inf if sink_logits is None else float(sink_logits[head])
            best = max(scores.max(), logit)
            weights = np.exp(scores - best)
            weights /= weights.sum() + np.exp(logit - best)
            out[row, head] = weights @ v[seen, head // share].astype(np.float64)
    return out


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """[..., size] -> [..., size] float64."""
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||."""
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def linear_scan(
    state: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    decay: np.ndarray,
    removal: tuple[np.ndarray, np.ndarray] | None = None,
    bonus: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`linear_scan` of models/state.py for one sequence, which comes with state [heads, K, V].

    Returns:
        The rows [n, heads, V] and the state behind them, float64.
    """
    state, heads = state.astype(np.float64), v.shape[1]
    q, k = (np.repeat(x, heads // q.shape[1], axis=1).astype(np.float64) for x in (q, k))
    v, out = v.astype(np.float64), np.empty(v.shape, np.float64)
    for t in range(len(v)):
        before = state
        kept = decay[t].astype(np.float64).reshape(heads, -1, 1)
        state = kept * before + k[t][:, :, None] * v[t][:, None, :]
        if removal is not None:
            a, b = (x[t].astype(np.float64) for x in removal)
            state = state + b[:, :, None] * np.einsum("hk,hkv->hv", a, before)[:, None, :]
        if bonus is None:
            out[t] = np.einsum("hk,hkv->hv", q[t], state)
        else:
            own = (q[t] * bonus.astype(np.float64) * k[t]).sum(-1, keepdims=True)
            out[t] = np.einsum("hk,hkv->hv", q[t], before) + own * v[t]
    return out, state


def causal_conv(
    state: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, silu: bool
) -> tuple[np.ndarray, np.ndarray]:
    """`causal_conv` for one sequence, whose earlier inputs are state [taps - 1, channels]."""
    past = np.concatenate([state, x]).astype(np.float64)
    taps = weight.shape[1]
    y = sum(past[j : j + len(x)] * weight[:, j].astype(np.float64) for j in range(taps))
    y = y if bias is None else y + bias.astype(np.float64)
    return y / (1 + np.exp(-y)) if silu else y, past[len(x) :]
