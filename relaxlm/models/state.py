"""What recurrent layers keep of a sequence, beside or in place of the paged KV cache.

A layer's state has a fixed size, whatever the length of the text. It lies in *slots*: tensors
[slots, *shape], one per `StateTensor` of a layer. A step reads the state of sequence i from slot
state_sources[i], takes the sequence's new tokens one after the other, and writes what comes out to
slot state_targets[i]; a sequence whose first new token has position 0 starts from zeros, whatever
lies in the slot. A slot that is read and one that is written are the same for a sequence that goes
on alone, and differ where a fork, or a snapshot to go back to, still needs the old state
(`runtime/state_slots.py`).

Models call the operators below. They are abstract: `compiler/passes/lower_state.py` turns them into
kernels for one target. Which tensors a layer has, the configuration says (`layer_states`), and the
lowering checks the two against each other.
"""

from typing import Literal

from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models.base import Step
from relaxlm.models.config import StateTensor

LINEAR_SCAN = "relaxlm.linear_scan"
CAUSAL_CONV = "relaxlm.causal_conv"
PREVIOUS_ROW = "relaxlm.previous_row"


def scan_state(heads: int, key_dim: int, value_dim: int) -> StateTensor:
    """What `linear_scan` keeps."""
    return StateTensor("scan", (heads, key_dim, value_dim))


def conv_state(channels: int, taps: int) -> StateTensor:
    """What `causal_conv` keeps: the last inputs, the oldest first."""
    return StateTensor("conv", (taps - 1, channels))


def row_state(name: str, size: int) -> StateTensor:
    """What `previous_row` keeps under this name: the last input."""
    return StateTensor(name, (size,))


def linear_scan(
    step: Step,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    removal: tuple[Tensor, Tensor] | None = None,
    bonus: Tensor | None = None,
    strength: Tensor | None = None,
) -> Tensor:
    """A linear recurrence over each sequence, with a matrix S [K, V] float32 per head as its state.

        S  <-  diag(decay) S + b (a^T S) + k v^T            o = S^T q

    where a, b are `removal`, and the products with S take its value before the step. With a
    `bonus` u the output comes first, from the old state and the token itself:

        o = S^T q + (sum_i q_i u_i k_i) v,  then S as above.

    With a `strength` beta, the token replaces what the state has for its key (the delta rule):
    beta (v - (diag(decay) S)^T k) takes the place of v.

    Covers Mamba-2 (arXiv:2405.21060; q = C, k = B, v = dt x), RWKV-5 and 6 (arXiv:2404.05892; the
    bonus), RWKV-7 (arXiv:2503.14456; removal) and the gated delta rule (arXiv:2412.06464; decay and
    strength).

    Args:
        q, k: [n, groups, K]; `groups` divides the heads, head h reads group h // (heads / groups).
        v: [n, heads, V].
        decay: float32, what is kept: [n, heads], or [n, heads, K] where every key feature has its
            own.
        removal: a and b, float32, each [n, heads, K].
        bonus: u, float32 [heads, K].
        strength: beta, float32 [n, heads]; without removal and bonus.

    Returns:
        [n, heads, V], in the dtype of v; computed in float32. The state is
        `scan_state(heads, K, V)`.
    """
    assert strength is None or (removal is None and bonus is None)
    flags = [int(part is not None) for part in (removal, strength, bonus)]
    optional = [*(removal or ()), *(part for part in (strength, bonus) if part is not None)]
    return step.with_cache(LINEAR_SCAN, [q, k, v, decay, layer, *flags, *optional], v)


def causal_conv(
    step: Step,
    layer: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["none", "silu"] = "none",
) -> Tensor:
    """A depthwise convolution over each sequence's own past.

        y[t, c] = act(sum_j weight[c, j] x[t - (taps - 1) + j, c] + bias[c])

    with zeros in place of what was before the sequence's first token.

    Args:
        x: [n, channels].
        weight: [channels, 1, taps], as checkpoints have it.
        bias: [channels].

    Returns:
        [n, channels], in the dtype of x; computed in float32. The state is
        `conv_state(channels, taps)`.
    """
    optional = [] if bias is None else [bias]
    channels, _, taps = weight.shape
    weight = op.reshape(weight, (channels, taps))
    return step.with_cache(CAUSAL_CONV, [x, weight, layer, int(activation == "silu"), *optional], x)


def previous_row(step: Step, layer: int, name: str, x: Tensor) -> Tensor:
    """Each token's row of x replaced by that of the token before it in its sequence; zeros first.

    Args:
        name: of the state, `row_state(name, size)`; a layer may have several.
        x: [n, size].

    Returns:
        [n, size], in the dtype of x.
    """
    return step.with_cache(PREVIOUS_ROW, [x, layer, name], x)
