"""Qwen3-Next, after `transformers/models/qwen3_next/modeling_qwen3_next.py`: three layers of the
gated delta rule for each that attends, whose output has a gate."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models import qwen2_moe
from relaxlm.models.base import Step
from relaxlm.models.gated_delta import GatedDeltaConfig, GatedDeltaNet
from relaxlm.models.layers import Feeds, GatedMLP, RMSNorm, merge_heads
from relaxlm.models.moe import MoELM
from relaxlm.models.weights import Source


class Interleaved(GatedDeltaConfig):
    """Every `full_attention_interval`-th layer attends, where `layer_types` is not given."""

    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "head_dim": 256,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "full_attention_interval": 4,
    }

    hidden_act: Literal["silu"]
    attention_bias: bool

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        every = values["full_attention_interval"]
        return [
            "linear_attention" if layer % every else "full_attention"
            for layer in range(1, layers + 1)
        ]


class Config(Interleaved, qwen2_moe.SomeLayers, qwen2_moe.SharedExpert):
    absent: ClassVar[dict] = {
        **Interleaved.absent,
        "num_key_value_heads": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 10,
        "num_experts": 512,
        "norm_topk_prob": True,
        # Of training only.
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }

    model_type: Literal["qwen3_next"]


class GatedAttention(nn.Module):
    """Grouped-query attention with norms of heads, whose output passes a gate of its own."""

    def __init__(self, config: Interleaved) -> None:
        self.config = config
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        width, bias = heads * config.head_dim, config.attention_bias
        rows = 2 * width + 2 * shared * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        config, n = self.config, x.shape[0]
        q_heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        dim = config.head_dim
        heads = op.reshape(self.qkv_proj(x), (n, 2 * q_heads + 2 * kv_heads, dim))
        gated, k, v = op.split(heads, [2 * q_heads, 2 * q_heads + kv_heads], axis=1)
        # A head's query, then its gate.
        q, gate = op.split(op.reshape(gated, (n, q_heads, 2 * dim)), 2, axis=-1)
        q, k = step.rotary(self.q_norm(q), layer), step.rotary(self.k_norm(k), layer)
        out = step.attention(layer, q, k, v) * op.sigmoid(gate)
        return self.o_proj(merge_heads(out))


class Block(nn.Module):
    """A layer that attends or one of the delta rule, then an MLP, each behind a norm."""

    def __init__(self, config: Interleaved, layer: int, mlp: Feeds) -> None:
        self.attends = config.has_pages(layer)
        if self.attends:
            self.self_attn = GatedAttention(config)
        else:
            self.linear_attn = GatedDeltaNet(config)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        mix = self.self_attn if self.attends else self.linear_attn
        x = x + mix(self.input_layernorm(x), step, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class InterleavedLM(MoELM):
    """The names that this family's models share."""

    fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    checkpoint_names: ClassVar[Mapping[str, str]] = {"conv1d_weight": "conv1d.weight"}
    published_names: ClassVar[Mapping[str, str]] = {"qkv_proj": "c_attn"}
    ignored: ClassVar[tuple[str, ...]] = (*MoELM.ignored, "mtp.*")
    norm_shift: ClassVar[float] = 1.0

    def __init__(self, config: Interleaved, mlp: Callable[[int], Feeds]) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(config, [Block(config, layer, mlp(layer)) for layer in layers])

    def fused_rows(self, part: str) -> tuple[int, ...]:
        rows = super().fused_rows(part)
        return (2 * rows[0], *rows[1:]) if part == "qkv_proj" else rows

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        sources = super()._sources(name, shape)
        if name.endswith("linear_attn.norm.weight"):  # stored as it is
            return tuple(replace(source, shift=0.0) for source in sources)
        return sources


class Model(InterleavedLM):
    config: Config

    def __init__(self, config: Config) -> None:
        def mlp(layer: int) -> Feeds:
            has_experts = config.has_experts(layer)
            return qwen2_moe.SharedMLP(config) if has_experts else GatedMLP(config)

        super().__init__(config, mlp)

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        """The checkpoint has q, k, v and z of each key head together, and so b and a."""
        *start, part, _ = name.split(".") if "." in name else ("", "")
        config = self.config
        groups = config.linear_num_key_heads
        each = config.linear_num_value_heads // groups
        key_dim, values = config.linear_key_head_dim, each * config.linear_value_head_dim
        pieces = {
            "in_proj_qkv": ("in_proj_qkvz", (0, key_dim, 2 * key_dim, 2 * key_dim + values)),
            "in_proj_z": ("in_proj_qkvz", (2 * key_dim + values, 2 * (key_dim + values))),
            "in_proj_b": ("in_proj_ba", (0, each)),
            "in_proj_a": ("in_proj_ba", (each, 2 * each)),
        }
        if part not in pieces:
            return super()._sources(name, shape)
        joined, ends = pieces[part]
        rows = 2 * (key_dim + values) if joined == "in_proj_qkvz" else 2 * each
        checkpoint = self._checkpoint_name(".".join([*start, joined, "weight"]))
        return tuple(
            Source(
                checkpoint,
                (groups * rows, shape[1]),
                view=_rows_of_heads(groups, first, last),
            )
            for first, last in pairwise(ends)
        )


def _rows_of_heads(groups: int, first: int, last: int) -> Callable[[np.ndarray], np.ndarray]:
    """Rows first .. last of each of `groups` equal parts: [groups, last - first, in]."""

    def view(matrix: np.ndarray) -> np.ndarray:
        return matrix.reshape(groups, -1, matrix.shape[-1])[:, first:last]

    return view
