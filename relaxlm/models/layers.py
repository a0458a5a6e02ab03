"""Modules that two or more architectures share unchanged."""

from collections.abc import Sequence
from typing import Protocol

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models.config import DecoderConfig


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        self.weight = nn.Parameter((size,))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return op.rms_norm(x, self.weight, axes=[-1], epsilon=self.eps)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) with gate and up in one matrix (Shazeer 2020, arXiv:2002.05202).

    [n, hidden] -> [n, hidden].
    """

    def __init__(self, config: DecoderConfig, bias: bool = False) -> None:
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = op.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(op.silu(gate) * up)


class Attends(Protocol):
    """An attention module as `Block` calls it: [n, hidden] -> [n, hidden]."""

    def __call__(self, x: Tensor, step, layer: int) -> Tensor: ...


class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, attention: Attends, mlp: GatedMLP) -> None:
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, step, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), step, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The parameters under `model.`: embedding, blocks and final norm. `CausalLM` runs them."""

    def __init__(self, config: DecoderConfig, blocks: Sequence[Block]) -> None:
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(list(blocks))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


def split_heads(x: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor, Tensor]:
    """[n, (q_heads + 2 kv_heads) * head_dim] -> q, k, v as [n, heads, head_dim] each."""
    n = x.shape[0]
    q_heads, kv_heads, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    heads = op.reshape(x, (n, q_heads + 2 * kv_heads, dim))
    q, k, v = op.split(heads, [q_heads, q_heads + kv_heads], axis=1)
    return q, k, v


def merge_heads(x: Tensor) -> Tensor:
    """[n, heads, head_dim] -> [n, heads * head_dim]."""
    n, heads, dim = x.shape
    return op.reshape(x, (n, heads * dim))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, in_pairs: bool = False) -> Tensor:
    """Rotary embedding of the first features of every head; the others stay as they are.

    Feature i is paired with feature i + rotary_dim / 2, as in most Hugging Face checkpoints, or,
    `in_pairs`, feature 2 i with feature 2 i + 1 (GPT-J, GLM, Cohere).

    Args:
        x: [n, heads, head_dim].
        cos, sin: [n, rotary_dim / 2] float32.

    Returns:
        [n, heads, head_dim] in the dtype of x; computed in float32.
    """
    half = int(cos.shape[-1])
    whole = 2 * half == int(x.shape[-1])
    # Kernels are found by this name, and know only one form.
    name = "rotate_pairs" if in_pairs else "rotate" if whole else "rotate_part"

    def compute(x: te.Tensor, cos: te.Tensor, sin: te.Tensor) -> te.Tensor:
        def element(t, h, i):
            first = (i % 2 == 0) if in_pairs else (i < half)
            other = (
                tirx.Select(first, i + 1, i - 1)
                if in_pairs
                else tirx.Select(first, i + half, i - half)
            )
            angle = i // 2 if in_pairs else tirx.Select(first, i, i - half)
            sign = tirx.Select(first, tirx.const(-1.0, "float32"), tirx.const(1.0, "float32"))
            value = (
                x[t, h, i].astype("float32") * cos[t, angle]
                + sign * x[t, h, other].astype("float32") * sin[t, angle]
            )
            return value.astype(x.dtype)

        if whole:
            return te.compute(x.shape, element, name=name)
        return te.compute(
            x.shape,
            lambda t, h, i: tirx.if_then_else(i < 2 * half, element(t, h, i), x[t, h, i]),
            name=name,
        )

    return op.tensor_expr_op(compute, name, [x, cos, sin])


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """[n, size] and row numbers [m] to [m, size]; the caller has checked the numbers."""

    def compute(x: te.Tensor, rows: te.Tensor) -> te.Tensor:
        return te.compute((rows.shape[0], x.shape[1]), lambda i, j: x[rows[i], j], name="take_rows")

    return op.tensor_expr_op(compute, "take_rows", [x, rows])
