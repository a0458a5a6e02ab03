"""Nemotron-H and Nemotron 3, after `transformers/models/nemotron_h/modeling_nemotron_h.py`: each
layer is one of Mamba 2, attention without positions, an MLP, and experts without gates."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt, model_validator
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from relaxlm.models.base import Step
from relaxlm.models.biased_router import BiasedConfig, route
from relaxlm.models.config import Activation, DecoderConfig, StateTensor
from relaxlm.models.layers import ACTIVATIONS, MLP, Attention, Float32Parameter, RMSNorm
from relaxlm.models.mamba import Mamba2Mixer, MambaShape, step_limit
from relaxlm.models.moe import Experts, MoELM, weighted_sum
from relaxlm.models.recurrent import HybridConfig
from relaxlm.models.weights import Source

# Letters of `hybrid_override_pattern`, and what transformers called kinds before release 5.
_KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_OLD_KINDS = {"mamba": "linear_attention", "attention": "full_attention"}


class Config(HybridConfig, BiasedConfig):
    recurrent_kinds: ClassVar[tuple[str, ...]] = ("linear_attention", "mlp", "moe")

    absent: ClassVar[dict] = {
        "vocab_size": 131072,
        "hidden_size": 4096,
        "tie_word_embeddings": False,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "intermediate_size": 21504,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "ssm_state_size": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "mamba_hidden_act": "silu",
        "n_groups": 8,
        "conv_kernel": 4,
        "time_step_min": 0.001,
        "use_conv_bias": True,
        "use_bias": False,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": False,
        # Of training only.
        "output_router_logits": False,
    }
    spelling: ClassVar[Mapping[str, str]] = {
        "mlp_hidden_act": "hidden_act",
        "n_routed_experts": "num_experts",
    }
    # How weights were drawn, how the reference computes, positions that it does not use, guesses at
    # further tokens, and names that are given twice.
    without_effect: ClassVar[frozenset[str]] = frozenset(
        """
        attention_head_dim chunk_size expand hybrid_override_pattern layers_block_type
        mamba_ssm_cache_dtype moe_shared_expert_overlap mtp_hybrid_override_pattern
        mtp_layers_block_type norm_eps num_logits_to_keep rescale_prenorm_residual rms_norm_eps
        time_step_floor time_step_max time_step_rank use_mamba_kernels
        """.split()
    )

    model_type: Literal["nemotron_h"]
    rope: None  # type: ignore[assignment]
    hidden_act: Activation
    attention_bias: Literal[False]
    mlp_bias: bool
    mamba_num_heads: PositiveInt
    mamba_head_dim: PositiveInt
    mamba_hidden_act: Literal["silu"]
    mamba_proj_bias: Literal[False] = False
    ssm_state_size: PositiveInt
    n_groups: PositiveInt
    conv_kernel: PositiveInt
    use_bias: bool
    use_conv_bias: bool
    time_step_limit: tuple[float, float]
    residual_in_fp32: Literal[False]
    n_shared_experts: Literal[1]  # type: ignore[assignment]
    moe_intermediate_size: PositiveInt
    moe_shared_expert_intermediate_size: PositiveInt
    moe_latent_size: Literal[None] = None

    @model_validator(mode="after")
    def _is_a_mixer(self) -> "Config":
        if problem := self.mixer.problem():
            raise ValueError(problem)
        return self

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        given = {key: value for key, value in raw.items() if value is not None}
        values = {**cls.absent, **given}
        kinds = given.get("layers_block_type") or given.get("layer_types")
        if kinds is None:
            pattern = given.get("hybrid_override_pattern", "ME*-")  # transformers' default
            kinds = [_KINDS.get(letter, letter) for letter in pattern]
        values["layer_types"] = [_OLD_KINDS.get(kind, kind) for kind in kinds]
        values["num_hidden_layers"] = len(kinds)
        values.setdefault("head_dim", given.get("attention_head_dim", 128))
        values["norm_eps"] = values["layer_norm_epsilon"]
        # transformers limits steps from below where nothing else is said.
        limit = {"time_step_limit": [values["time_step_min"], math.inf], **given}
        values["time_step_limit"] = step_limit(limit)
        values |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        return super().read(values, where)

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> Any:
        return None

    def for_context(self, context: int) -> DecoderConfig:
        return self

    def layer_rope(self, layer: int) -> Any:
        return None

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size

    @property
    def mixer(self) -> MambaShape:
        return MambaShape(
            self.hidden_size,
            self.mamba_num_heads,
            self.mamba_head_dim,
            self.n_groups,
            self.ssm_state_size,
            self.conv_kernel,
            self.use_bias,
            self.use_conv_bias,
            self.time_step_limit,
            self.norm_eps,
        )

    def layer_states(self, layer: int) -> tuple[StateTensor, ...]:
        return self.mixer.states() if self.layer_types[layer] == "linear_attention" else ()


class PlainExperts(nn.Module):
    """Experts down(act(up(x))) that a router with a bias chooses, and one that every token passes:
    [n, hidden] -> [n, hidden]."""

    def __init__(self, config: Config) -> None:
        hidden, experts, inner = config.hidden_size, config.num_experts, config.expert_size
        self.config, self.activation = config, ACTIVATIONS[config.hidden_act]
        self.gate = nn.Linear(hidden, experts, bias=False, out_dtype="float32")
        self.e_score_correction_bias = Float32Parameter((experts,))
        self.moe_up_proj = Experts(experts, hidden, inner)
        self.moe_down_proj = Experts(experts, inner, hidden)
        width = config.moe_shared_expert_intermediate_size
        wide = config.model_copy(update={"intermediate_size": width})
        self.shared_experts = MLP(wide, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = route(self.config, self.gate(x), self.e_score_correction_bias)
        inner = self.activation(self.moe_up_proj(x, chosen, self.config.num_experts_per_tok))
        return weighted_sum(self.moe_down_proj(inner, chosen, 1), share) + self.shared_experts(x)


class Block(nn.Module):
    """One mixer behind a norm, added to the residual stream."""

    def __init__(self, config: Config, layer: int) -> None:
        kind = config.layer_types[layer]
        self.mixes_tokens = kind in ("linear_attention", "full_attention")
        if kind == "linear_attention":
            self.mixer = Mamba2Mixer(config.mixer)
        elif kind == "full_attention":
            self.mixer = Attention(config)
        else:
            self.mixer = PlainExperts(config) if kind == "moe" else MLP(config, config.mlp_bias)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        normed = self.norm(x)
        return x + (self.mixer(normed, step, layer) if self.mixes_tokens else self.mixer(normed))


class Model(MoELM):
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "conv1d_weight": "conv1d.weight",
        "conv1d_bias": "conv1d.bias",
        "e_score_correction_bias": "gate.e_score_correction_bias",
        "model.norm": "backbone.norm_f",
        "model": "backbone",
        "embed_tokens": "embeddings",
    }
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    stacked: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "moe_up_proj": ("up_proj",),
        "moe_down_proj": ("down_proj",),
    }
    ignored: ClassVar[tuple[str, ...]] = (*MoELM.ignored, "mtp.*")

    def __init__(self, config: Config) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(config, [Block(config, layer) for layer in layers])

    def _other_sources(self, name: str, shape: tuple[int, ...]) -> list[tuple[Source, ...]]:
        """transformers holds all experts in one tensor."""
        for part in self.stacked:
            if f".{part}." in name:
                joined = name.replace(part, part.replace("moe_", "experts.", 1))
                checkpoint = self._checkpoint_name(joined.removesuffix(".weight"))
                return [(Source(checkpoint, shape),)]
        return []

    def _other_names(self, name: str) -> tuple[str, ...]:
        """Since release 5, transformers says "model" for what published checkpoints call so."""
        if not name.startswith("backbone."):
            return super()._other_names(name)
        return (*super()._other_names(name), name.replace("backbone.", "model.", 1))
