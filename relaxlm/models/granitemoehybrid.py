"""Granite 4, after `transformers/models/granitemoehybrid/modeling_granitemoehybrid.py`: layers of
Mamba 2 and a few that attend, each followed by an MLP and, in larger models, experts beside it."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from relaxlm.models.base import Step
from relaxlm.models.config import DecoderConfig, StateTensor
from relaxlm.models.granite import Constants
from relaxlm.models.layers import Attention, GatedMLP, RMSNorm, scaled
from relaxlm.models.mamba import Mamba2Mixer, MambaShape, step_limit
from relaxlm.models.moe import MoEConfig, MoELM, SparseMLP
from relaxlm.models.recurrent import HybridConfig
from relaxlm.models.weights import Source


class Config(HybridConfig, Constants, MoEConfig):
    """`intermediate_size` is that of an expert, `shared_intermediate_size` that of the MLP."""

    absent: ClassVar[dict] = {
        **Constants.absent,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 1024,
        "position_embedding_type": None,
        "mamba_n_heads": 128,
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "time_step_limit": (0.0, float("inf")),
        # Of training only.
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    spelling: ClassVar[Mapping[str, str]] = {
        **DecoderConfig.spelling,
        "num_local_experts": "num_experts",
        "layers_block_type": "layer_types",
    }
    # How the reference cuts texts, and what it does not read.
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"init_method", "mamba_chunk_size", "normalization_function"}
    )

    model_type: Literal["granitemoehybrid"]
    hidden_act: Literal["silu"]
    attention_bias: bool
    # 0 for models without any.
    num_experts: NonNegativeInt
    num_experts_per_tok: NonNegativeInt
    shared_intermediate_size: PositiveInt
    position_embedding_type: Literal["rope", "nope"] | None
    mamba_n_heads: PositiveInt
    mamba_n_groups: PositiveInt
    mamba_d_state: PositiveInt
    mamba_d_head: PositiveInt
    mamba_d_conv: PositiveInt
    mamba_expand: PositiveInt
    mamba_conv_bias: bool
    mamba_proj_bias: bool
    time_step_limit: tuple[float, float]

    @model_validator(mode="after")
    def _is_a_mixer(self) -> "Config":
        shape = self.mixer
        if self.hidden_size * self.mamba_expand != shape.width:
            raise ValueError(
                f"{shape.heads} heads of {shape.head_dim} features: expected mamba_expand = "
                f"{self.mamba_expand} times hidden_size = {self.hidden_size} features"
            )
        if problem := shape.problem():
            raise ValueError(problem)
        return self

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        raw = with_today_kinds(raw)
        values = {**cls.absent, **{key: value for key, value in raw.items() if value is not None}}
        raw["time_step_limit"] = step_limit(values)
        hidden, heads = values["hidden_size"], values["mamba_n_heads"]
        given = values.get("mamba_d_head", "auto")
        if given == "auto" and isinstance(heads, int) and heads > 0:
            raw["mamba_d_head"] = values["mamba_expand"] * hidden // heads
        return super().read(raw, where)

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        return ["linear_attention"] * layers

    @property
    def mixer(self) -> MambaShape:
        return MambaShape(
            self.hidden_size,
            self.mamba_n_heads,
            self.mamba_d_head,
            self.mamba_n_groups,
            self.mamba_d_state,
            self.mamba_d_conv,
            self.mamba_proj_bias,
            self.mamba_conv_bias,
            self.time_step_limit,
            self.norm_eps,
        )

    def layer_states(self, layer: int) -> tuple[StateTensor, ...]:
        return () if self.has_pages(layer) else self.mixer.states()

    def layer_rope(self, layer: int) -> Any:
        return self.rope if self.position_embedding_type == "rope" else None


def with_today_kinds(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with `layer_types` as transformers calls them since release 5."""
    raw = dict(raw)
    kinds = raw.get("layer_types") or raw.get("layers_block_type")
    if isinstance(kinds, list):
        today = {"mamba": "linear_attention", "attention": "full_attention"}
        raw["layer_types"] = [today.get(kind, kind) for kind in kinds]
    return raw


class Block(nn.Module):
    """Mamba 2 or attention, then an MLP and experts, each behind a norm."""

    def __init__(self, config: Config, layer: int) -> None:
        self.attends = config.has_pages(layer)
        if self.attends:
            self.self_attn = Attention(config, config.attention_bias, config.attention_bias)
        else:
            self.mamba = Mamba2Mixer(config.mixer)
        width = config.shared_intermediate_size
        self.shared_mlp = GatedMLP(config.model_copy(update={"intermediate_size": width}))
        self.block_sparse_moe = SparseMLP(config) if config.num_experts else None
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.scale = config.residual_scale

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        mix = self.self_attn if self.attends else self.mamba
        x = x + scaled(mix(self.input_layernorm(x), step, layer), self.scale)
        normed = self.post_attention_layernorm(x)
        fed = self.shared_mlp(normed)
        if self.block_sparse_moe is not None:
            fed = self.block_sparse_moe(normed) + fed
        return x + scaled(fed, self.scale)


class Model(MoELM):
    """Whose checkpoints have all experts in one tensor, and gate and up of the MLP in another."""

    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "conv1d_weight": "conv1d.weight",
        "conv1d_bias": "conv1d.bias",
        "gate": "router.layer",
        "moe_gate_up_proj": "input_linear",
        "moe_down_proj": "output_linear",
        "gate_up_proj": "input_linear",
        "down_proj": "output_linear",
    }
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: Config) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(config, [Block(config, layer) for layer in layers])

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        if ".shared_mlp." in name or ".block_sparse_moe." in name:
            return (Source(self._checkpoint_name(name), shape),)
        return super()._sources(name, shape)
