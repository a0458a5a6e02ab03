"""LFM2, after `transformers/models/lfm2/modeling_lfm2.py`: short convolutions between two gates in
most layers, and attention in the others."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models.base import CausalLM, Step
from relaxlm.models.config import DecoderConfig, StateTensor
from relaxlm.models.layers import Attention, Feeds, GatedMLP, RMSNorm
from relaxlm.models.recurrent import HybridConfig
from relaxlm.models.state import causal_conv, conv_state


class ConvConfig(HybridConfig):
    """`conv_L_cache`: how many tokens a convolution sees, the token itself among them."""

    recurrent_kinds: ClassVar[tuple[str, ...]] = ("conv",)

    absent: ClassVar[dict] = {
        "vocab_size": 65536,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 128000,
        "norm_eps": 1e-5,
        "rope_theta": 1e6,
        "conv_bias": False,
        "conv_L_cache": 3,
        "tie_word_embeddings": True,
    }
    spelling: ClassVar[Mapping[str, str]] = {"tie_embedding": "tie_word_embeddings"}

    conv_bias: bool
    conv_L_cache: PositiveInt

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        raw = {**raw, "hidden_act": "silu"}
        if raw.get("tie_embedding") is not None:
            raw["tie_word_embeddings"] = raw["tie_embedding"]
        return super().read(raw, where)

    def layer_states(self, layer: int) -> tuple[StateTensor, ...]:
        if self.has_pages(layer):
            return ()
        return (conv_state(self.hidden_size, self.conv_L_cache),)


class Config(ConvConfig):
    absent: ClassVar[dict] = {
        **ConvConfig.absent,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    }
    # How weights were drawn, and sizes that are given twice.
    without_effect: ClassVar[frozenset[str]] = frozenset(
        """
        block_dim block_ff_dim block_mlp_init_scale block_norm_eps block_out_init_scale
        block_use_xavier_init conv_dim conv_dim_out conv_use_xavier_init num_heads theta
        """.split()
    )

    model_type: Literal["lfm2"]
    full_attn_idxs: tuple[int, ...] | None = None
    block_use_swiglu: Literal[True] = True
    use_pos_enc: Literal[True] = True

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        values = {**cls.absent, **{key: value for key, value in raw.items() if value is not None}}
        inner = values.get("block_ff_dim", values["intermediate_size"])
        if values["block_auto_adjust_ff_dim"] and isinstance(inner, int):
            inner = int(values["block_ffn_dim_multiplier"] * int(2 * inner / 3))
            inner = -(-inner // values["block_multiple_of"]) * values["block_multiple_of"]
        return super().read({**raw, "intermediate_size": inner}, where)

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        attending = values.get("full_attn_idxs")
        return [
            "full_attention" if attending is None or layer in attending else "conv"
            for layer in range(layers)
        ]


class ShortConv(nn.Module):
    """A convolution of what one gate lets in, and another one behind it: [n, hidden] each."""

    def __init__(self, config: ConvConfig) -> None:
        hidden, bias = config.hidden_size, config.conv_bias
        self.in_proj = nn.Linear(hidden, 3 * hidden, bias=bias)
        self.conv_weight = nn.Parameter((hidden, 1, config.conv_L_cache))
        self.conv_bias = nn.Parameter((hidden,)) if bias else None
        self.out_proj = nn.Linear(hidden, hidden, bias=bias)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        before, behind, x = op.split(self.in_proj(x), 3, axis=-1)
        mixed = causal_conv(step, layer, before * x, self.conv_weight, self.conv_bias)
        return self.out_proj(behind * mixed)


class Block(nn.Module):
    """A convolution or attention, then an MLP, each behind a norm."""

    def __init__(self, config: ConvConfig, layer: int, mlp: Feeds) -> None:
        self.attends = config.has_pages(layer)
        if self.attends:
            self.self_attn = Attention(config, head_norm=RMSNorm)
        else:
            self.conv = ShortConv(config)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        mix = self.self_attn if self.attends else self.conv
        x = x + mix(self.input_layernorm(x), step, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


NAMES: Mapping[str, str] = {
    "model.norm": "model.embedding_norm",
    "input_layernorm": "operator_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp": "feed_forward",
    "o_proj": "out_proj",
    "q_norm": "q_layernorm",
    "k_norm": "k_layernorm",
    "conv_weight": "conv.weight",
    "conv_bias": "conv.bias",
    "down_proj": "w2",
}
FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("w1", "w3"),
}


class Model(CausalLM):
    checkpoint_names: ClassVar[Mapping[str, str]] = NAMES
    fused: ClassVar[dict[str, tuple[str, ...]]] = FUSED

    def __init__(self, config: Config) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(config, [Block(config, layer, GatedMLP(config)) for layer in layers])
