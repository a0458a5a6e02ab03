"""RWKV 7 (Goose; Peng et al. 2025, arXiv:2503.14456), after `fla/models/rwkv7/modeling_rwkv7.py`
and `fla/layers/rwkv7.py` of flash-linear-attention: states out of which what a key has is taken
before anything is added, and values that are mixed with those of the first layer."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import PositiveInt, model_validator
from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models.base import CacheHandle, CausalLM, Step
from relaxlm.models.config import DecoderConfig, StateTensor
from relaxlm.models.layers import LayerNorm
from relaxlm.models.recurrent import GroupNorm, RecurrentConfig, root_norm
from relaxlm.models.rwkv import CHANNEL_MIX, TIME_MIX, as_row, row
from relaxlm.models.state import linear_scan, previous_row, row_state, scan_state
from relaxlm.models.weights import Source

# The fastest that a state fades: at least exp of minus this is kept.
_FASTEST = math.exp(-0.5)
# Under the root of the norm of what is removed, with fused norms; without, the norm is at least
# the other.
_FUSED_EPSILON, _LEAST_NORM = 1e-6, 1e-12
# What time mix reads mixtures for, in the order in which early checkpoints have their weights.
_PARTS = ("r", "w", "k", "v", "a", "g")


class Config(RecurrentConfig):
    absent: ClassVar[dict] = {
        "hidden_size": 2048,
        "hidden_ratio": 4.0,
        "num_hidden_layers": 24,
        "head_dim": 64,
        "decay_low_rank_dim": 64,
        "gate_low_rank_dim": 128,
        "a_low_rank_dim": 64,
        "v_low_rank_dim": 16,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "attn": None,
        "tie_word_embeddings": False,
        "fuse_norm": True,
        "vocab_size": 32000,
    }
    spelling: ClassVar[Mapping[str, str]] = {"num_heads": "num_attention_heads"}
    # Of training, and which kernels the reference uses.
    without_effect: ClassVar[frozenset[str]] = frozenset(
        "attn_mode fuse_cross_entropy fuse_linear_cross_entropy use_l2warp".split()
    )

    model_type: Literal["rwkv7"]
    hidden_act: Literal["relu2"]
    decay_low_rank_dim: PositiveInt
    gate_low_rank_dim: PositiveInt
    a_low_rank_dim: PositiveInt
    v_low_rank_dim: PositiveInt
    norm_first: bool
    norm_bias: bool
    fuse_norm: bool
    attn: Literal[None]
    value_dim: tuple[int, ...]

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Config":
        if self.num_attention_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                f"{self.num_attention_heads} heads of {self.head_dim} features: expected "
                f"hidden_size = {self.hidden_size} features"
            )
        if set(self.value_dim) != {self.hidden_size}:
            raise ValueError(
                f"value_dim = {list(self.value_dim)}: expected hidden_size = {self.hidden_size} "
                "for every layer"
            )
        return self

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        values = {**cls.absent, **{key: value for key, value in raw.items() if value is not None}}
        hidden, size, layers = (
            values[name] for name in ("hidden_size", "head_dim", "num_hidden_layers")
        )
        if all(isinstance(number, int) and number > 0 for number in (hidden, size, layers)):
            heads = values.setdefault("num_heads", hidden // size)
            values["num_attention_heads"] = values["num_key_value_heads"] = heads
            inner = int(hidden * values["hidden_ratio"])
            values.setdefault("intermediate_size", -(-inner // 32) * 32)
            given = values.get("value_dim", hidden)
            values["value_dim"] = [given] * layers if isinstance(given, int) else given
        if values["hidden_act"] in ("sqrelu", "relu2"):
            values["hidden_act"] = "relu2"
        return super().read(values, where)

    def layer_states(self, layer: int) -> tuple[StateTensor, ...]:
        heads, size = self.num_attention_heads, self.head_dim
        return (
            row_state(TIME_MIX, self.hidden_size),
            scan_state(heads, size, size),
            row_state(CHANNEL_MIX, self.hidden_size),
        )


class Adapter(nn.Module):
    """A product of two matrices of low rank, with something in between: [n, in] -> [n, out].

    It moves what decides how a state changes, and is small: it is never quantized.
    """

    def __init__(self, size: int, rank: int, bias: bool = True) -> None:
        self.inner, self.outer = nn.Parameter((rank, size)), nn.Parameter((size, rank))
        self.bias = nn.Parameter((size,)) if bias else None

    def forward(self, x: Tensor, between=lambda x: x) -> Tensor:
        inner = between(op.matmul(x, op.permute_dims(self.inner)))
        out = op.matmul(inner, op.permute_dims(self.outer))
        return out if self.bias is None else out + self.bias


class TimeMix(nn.Module):
    """[n, hidden], and the values of the first layer -> [n, hidden], and the values."""

    def __init__(self, config: Config, layer: int) -> None:
        size = config.hidden_size
        self.heads = (config.num_attention_heads, config.head_dim)
        self.fused = config.fuse_norm
        self.x_r, self.x_w, self.x_k = row(size), row(size), row(size)
        self.x_v, self.x_a, self.x_g = row(size), row(size), row(size)
        self.k_k, self.k_a = nn.Parameter((size,)), nn.Parameter((size,))
        self.r_k = nn.Parameter(self.heads)
        self.r_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.w_lora = Adapter(size, config.decay_low_rank_dim)
        self.v_lora = Adapter(size, config.v_low_rank_dim) if layer else None
        self.a_lora = Adapter(size, config.a_low_rank_dim)
        self.g_lora = Adapter(size, config.gate_low_rank_dim, bias=False)
        self.g_norm = GroupNorm(self.heads[0], size, config.head_dim * config.norm_eps)

    def forward(
        self, x: Tensor, first: Tensor | None, step: Step, layer: int
    ) -> tuple[Tensor, Tensor]:
        n, size = x.shape
        change = previous_row(step, layer, TIME_MIX, x) - x
        xr, xw, xk, xv, xa, xg = (
            x + change * as_row(getattr(self, f"x_{part}")) for part in _PARTS
        )

        def heads(rows: Tensor) -> Tensor:
            return op.reshape(rows, (n, *self.heads))

        r, k, v = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv)
        if self.v_lora is not None:
            assert first is not None
            v = v + (first - v) * op.sigmoid(self.v_lora(xv))
        else:
            first = v
        speed = op.sigmoid(op.astype(self.w_lora(xw, op.tanh), "float32")) * _FASTEST
        a = op.sigmoid(op.astype(self.a_lora(xa), "float32"))
        removed = self.normed(heads(k * self.k_k))
        k = k * (1.0 + op.astype(a - 1.0, k.dtype) * self.k_a)
        r, k, v = heads(r), heads(k), heads(v)
        out = linear_scan(
            step,
            layer,
            r,
            k,
            v,
            heads(op.exp(op.negative(speed))),
            removal=(op.negative(removed), removed * heads(a)),
        )
        out = heads(self.g_norm(op.reshape(out, (n, size))))
        own = op.sum(r * k * op.reshape(self.r_k, (1, *self.heads)), axis=-1, keepdims=True)
        out = op.reshape(out + own * v, (n, size))
        return self.o_proj(out * self.g_lora(xg, op.sigmoid)), first

    def normed(self, x: Tensor) -> Tensor:
        """Every head's features over their norm, float32."""
        return root_norm(x, _FUSED_EPSILON, mean=False) if self.fused else _over_norm(x)


def _over_norm(x: Tensor) -> Tensor:
    """[n, heads, size] over the norms of the last axis, or over `_LEAST_NORM`; float32."""

    def compute(x: te.Tensor) -> te.Tensor:
        *rows, size = x.shape
        j = te.reduce_axis((0, size), "j")

        def value(*index):
            return x(*index).astype("float32")

        total = te.compute(
            rows, lambda *i: te.sum(value(*i, j) * value(*i, j), axis=j), name="squares"
        )
        least = tirx.const(np.float32(_LEAST_NORM), "float32")
        return te.compute(
            x.shape,
            lambda *i: value(*i) / tirx.Max(tirx.sqrt(total(*i[:-1])), least),
            name="over_norm",
        )

    return op.tensor_expr_op(compute, "over_norm", [x])


class ChannelMix(nn.Module):
    """A feed-forward network, [n, hidden] -> [n, hidden]."""

    def __init__(self, config: Config) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.x_k = nn.Parameter((hidden,))
        self.key = nn.Linear(hidden, inner, bias=False)
        self.value = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        change = previous_row(step, layer, CHANNEL_MIX, x) - x
        return self.value(op.square(op.relu(self.key(x + change * self.x_k))))


class Block(nn.Module):
    """Time mix and channel mix, each behind a norm and added to the residual stream."""

    def __init__(self, config: Config, layer: int) -> None:
        def norm() -> LayerNorm:
            return LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)

        self.pre_norm = norm() if config.norm_first and layer == 0 else None
        self.attn_norm, self.ffn_norm = norm(), norm()
        self.attn, self.ffn = TimeMix(config, layer), ChannelMix(config)

    def forward(
        self, x: Tensor, first: Tensor | None, step: Step, layer: int
    ) -> tuple[Tensor, Tensor]:
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        mixed, first = self.attn(self.attn_norm(x), first, step, layer)
        x = x + mixed
        return x + self.ffn(self.ffn_norm(x), step, layer), first


class Model(CausalLM):
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "embed_tokens": "embeddings",
        "inner": "lora.0.weight",
        "outer": "lora.2.weight",
        **{f"{part}_lora.bias": f"{part}_lora.lora.2.bias" for part in "wva"},
    }

    def __init__(self, config: Config) -> None:
        blocks = [Block(config, layer) for layer in range(config.num_hidden_layers)]
        super().__init__(
            config, blocks, lambda size, eps: LayerNorm(size, eps, bias=config.norm_bias)
        )

    def _layers(self, x: Tensor, positions: Tensor, cache: CacheHandle) -> Iterator[Tensor]:
        step, first = Step(self.config, positions, cache), None
        for index, layer in enumerate(self.model.layers):
            x, first = layer(x, first, step, index)
            yield x

    def _other_sources(self, name: str, shape: tuple[int, ...]) -> list[tuple[Source, ...]]:
        """Early checkpoints have what tokens are mixed by in one tensor, a row for each part."""
        start, _, last = name.rpartition(".")
        if not start.endswith(".attn") or last not in {f"x_{part}" for part in _PARTS}:
            return []
        place = _PARTS.index(last.removeprefix("x_"))
        joined = self._checkpoint_name(f"{start}.x_x")
        rows = (len(_PARTS), shape[-1])
        return [(Source(joined, rows, view=lambda tensor: tensor[place : place + 1]),)]
