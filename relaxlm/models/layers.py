"""Modules that two or more architectures share unchanged."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models.config import Activation, DecoderConfig


def _tanh_gelu(x: Tensor) -> Tensor:
    return op.gelu(x, approximate="tanh")


# Under the names of config.json, which has four for the same approximation.
ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": op.silu,
    "gelu": op.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": op.relu,
    "relu2": lambda x: op.square(op.relu(x)),
}

# What says of a loop nest that it is a layer norm: eps, shift, whether it has a weight and a bias.
LAYER_NORM = "relaxlm.layer_norm"

# Makes a norm from a size and an epsilon.
Norm = Callable[[int, float], nn.Module]


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        self.weight = nn.Parameter((size,))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return op.rms_norm(x, self.weight, axes=[-1], epsilon=self.eps)


class LayerNorm(nn.Module):
    """Layer norm over the last axis (Ba, Kiros and Hinton 2016, arXiv:1607.06450), in float32.

    Args:
        size: of the last axis, or of the last axes, where heads have a weight each.
        weight, bias: whether there are such parameters.
        shift: added to the weight.
    """

    def __init__(
        self,
        size: int | tuple[int, ...],
        eps: float,
        weight: bool = True,
        bias: bool = True,
        shift: float = 0.0,
    ) -> None:
        shape = size if isinstance(size, tuple) else (size,)
        self.weight = nn.Parameter(shape) if weight else None
        self.bias = nn.Parameter(shape) if bias else None
        self.eps, self.shift = eps, shift

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, self.shift)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, shift: float = 0.0
) -> Tensor:
    """`LayerNorm` with given parameters, each of the shape of the last axes of x."""
    given = [parameter for parameter in (weight, bias) if parameter is not None]

    def compute(x: te.Tensor, *parameters: te.Tensor) -> te.Tensor:
        *rows, size = x.shape

        def mean(values: Callable, name: str) -> te.Tensor:
            j = te.reduce_axis((0, size), "j")
            total = te.compute(rows, lambda *i: te.sum(values(*i, j), axis=j), name=name)
            return lambda *i: total(*i) / tirx.Cast("float32", size)

        def value(*index):
            return x(*index).astype("float32")

        # Two passes: the mean of squares minus the squared mean loses digits.
        centre = mean(value, "centre")
        spread = mean(lambda *i: _square(value(*i) - centre(*i[:-1])), "spread")

        def element(*i):
            result = (value(*i) - centre(*i[:-1])) * tirx.rsqrt(
                spread(*i[:-1]) + tirx.const(eps, "float32")
            )
            own = [p(*i[-len(p.shape) :]).astype("float32") for p in parameters]
            if weight is not None:
                result = result * (own[0] + tirx.const(shift, "float32"))
            if bias is not None:
                result = result + own[-1]
            return result.astype(x.dtype)

        return te.compute(x.shape, element, name="layer_norm")

    attributes = {LAYER_NORM: f"{eps} {shift} {int(weight is not None)} {int(bias is not None)}"}
    return op.tensor_expr_op(compute, "layer_norm", [x, *given], attrs=attributes)


def _square(value):
    return value * value


class Float32Parameter(nn.Parameter):
    """A parameter that is float32 in whatever dtype the model computes, and is stored so."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape, "float32")

    def to(self, dtype: str | None = None) -> None:
        """Stays as it is."""


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), [n, hidden] -> [n, hidden] (Shazeer 2020, arXiv:2002.05202).

    Args:
        joined: whether gate and up are one matrix. It is faster, and a family does without only
            where published folders do.
    """

    def __init__(self, config: DecoderConfig, bias: bool = False, joined: bool = True) -> None:
        self.activation, self.joined = ACTIVATIONS[config.hidden_act], joined
        hidden, inner = config.hidden_size, config.intermediate_size
        if joined:
            self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=bias)
        else:
            self.gate_proj = nn.Linear(hidden, inner, bias=bias)
            self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.joined:
            gate, up = op.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.activation(gate) * up)


class MLP(nn.Module):
    """down(act(up(x))), [n, hidden] -> [n, hidden]."""

    def __init__(self, config: DecoderConfig, bias: bool = True) -> None:
        self.activation = ACTIVATIONS[config.hidden_act]
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings and one matrix for q, k and v.

    Args:
        qkv_bias, out_bias: whether the projections have biases.
        head_norm: makes the norm of every query and key head, before they turn.
    """

    def __init__(
        self,
        config: DecoderConfig,
        qkv_bias: bool = False,
        out_bias: bool = False,
        head_norm: Norm | None = None,
    ) -> None:
        self.config = config
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        width = config.num_attention_heads * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, heads * config.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=out_bias)
        if head_norm is not None:
            self.q_norm = head_norm(config.head_dim, config.norm_eps)
            self.k_norm = head_norm(config.head_dim, config.norm_eps)
        self.head_norm = head_norm is not None

    def project(self, x: Tensor, step) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [n, heads, head_dim] before they turn."""
        q, k, v = split_heads(self.qkv_proj(x), self.config)
        if self.head_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def forward(self, x: Tensor, step, layer: int) -> Tensor:
        q, k, v = self.project(x, step)
        out = step.attention(layer, step.rotary(q, layer), step.rotary(k, layer), v)
        return self.o_proj(merge_heads(out))


class JointNormAttention(Attention):
    """With one norm over all query heads, and one over all key heads."""

    def __init__(
        self, config: DecoderConfig, qkv_bias: bool = False, out_bias: bool = False
    ) -> None:
        super().__init__(config, qkv_bias, out_bias)
        self.q_norm = RMSNorm(config.num_attention_heads * config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.num_key_value_heads * config.head_dim, config.norm_eps)

    def project(self, x: Tensor, step) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(self.qkv_proj(x), self.config)
        normed_q, normed_k = self.q_norm(merge_heads(q)), self.k_norm(merge_heads(k))
        return op.reshape(normed_q, q.shape), op.reshape(normed_k, k.shape), v


class SplitProjections(nn.Module):
    """Attention's matrices, one each for queries, keys and values, as some published folders have
    them."""

    def __init__(self, config: DecoderConfig, bias: bool) -> None:
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [n, heads, head_dim]."""
        q, k, v = (self._heads(part(x)) for part in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        n, width = x.shape
        return op.reshape(x, (n, width // self.head_dim, self.head_dim))


class Attends(Protocol):
    """An attention module as `Block` calls it: [n, hidden] -> [n, hidden]."""

    def __call__(self, x: Tensor, step, layer: int) -> Tensor: ...


class Feeds(Protocol):
    """A feed-forward module as `Block` calls it: [n, hidden] -> [n, hidden]."""

    def __call__(self, x: Tensor) -> Tensor: ...


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and added to the residual stream."""

    def __init__(
        self, config: DecoderConfig, attention: Attends, mlp: Feeds, norm: Norm = RMSNorm
    ) -> None:
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = norm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = norm(config.hidden_size, config.norm_eps)
        self.scale = config.residual_scale

    def forward(self, x: Tensor, step, layer: int) -> Tensor:
        x = x + scaled(self.self_attn(self.input_layernorm(x), step, layer), self.scale)
        return x + scaled(self.mlp(self.post_attention_layernorm(x)), self.scale)


class ParallelBlock(nn.Module):
    """Attention and an MLP that read the same residual stream, both added to it.

    Args:
        norms: 1, read by both, or one for each (GPT-NeoX).
    """

    def __init__(
        self,
        config: DecoderConfig,
        attention: Attends,
        mlp: Feeds,
        norm: Norm = RMSNorm,
        norms: int = 1,
    ) -> None:
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = norm(config.hidden_size, config.norm_eps)
        if norms == 2:
            self.post_attention_layernorm = norm(config.hidden_size, config.norm_eps)
        self.norms = norms

    def forward(self, x: Tensor, step, layer: int) -> Tensor:
        normed = self.input_layernorm(x)
        attended = self.self_attn(normed, step, layer)
        if self.norms == 2:
            normed = self.post_attention_layernorm(x)
        return x + (attended + self.mlp(normed))


class Decoder(nn.Module):
    """The parameters under `model.`: embedding, blocks and final norm. `CausalLM` runs them."""

    def __init__(
        self, config: DecoderConfig, blocks: Sequence[nn.Module], norm: Norm = RMSNorm
    ) -> None:
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(list(blocks))
        self.norm = norm(config.hidden_size, config.norm_eps)


class Float32Linear(nn.Module):
    """[m, inputs] -> [m, outputs] in float32, whatever the model computes in: heads and routers."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        self.weight = nn.Parameter((outputs, inputs))
        self.bias = nn.Parameter((outputs,)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        logits = op.matmul(x, op.permute_dims(self.weight), out_dtype="float32")
        return logits if self.bias is None else logits + op.astype(self.bias, "float32")


def scaled(x: Tensor, scale: float) -> Tensor:
    """x times a constant of the configuration, which mostly is 1."""
    return x if scale == 1 else x * scale


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
