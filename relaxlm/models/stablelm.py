"""StableLM 3B to 12B, after `transformers/models/stablelm/modeling_stablelm.py`."""

from typing import ClassVar, Literal

from relaxlm.models import layers
from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Block, GatedMLP, LayerNorm, ParallelBlock
from relaxlm.models.weights import Source


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "num_key_value_heads": 32,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "tie_word_embeddings": False,
    }
    # `norm_eps` is what the first published files call it.
    spelling: ClassVar[dict] = {"layer_norm_eps": "norm_eps"}

    model_type: Literal["stablelm"]
    use_qkv_bias: bool
    qk_layernorm: bool
    use_parallel_residual: bool


class Attention(layers.Attention):
    """With `qk_layernorm`, every query and key head has a norm of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, qkv_bias=config.use_qkv_bias)
        if config.qk_layernorm:
            heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
            self.q_norm = LayerNorm((heads, config.head_dim), config.norm_eps, bias=False)
            self.k_norm = LayerNorm((kv_heads, config.head_dim), config.norm_eps, bias=False)
            self.head_norm = True


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def __init__(self, config: Config) -> None:
        kind = ParallelBlock if config.use_parallel_residual else Block
        super().__init__(
            config,
            [
                kind(config, Attention(config), GatedMLP(config), LayerNorm)
                for _ in range(config.num_hidden_layers)
            ],
            LayerNorm,
        )

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        for part, theirs in (("q_norm", "q_layernorm"), ("k_norm", "k_layernorm")):
            if name.endswith(f".{part}.weight"):
                pattern = name.replace(f"{part}.", f"{theirs}.norms.{{}}.")
                return tuple(Source(pattern.format(i), shape[1:]) for i in range(shape[0]))
        return super()._sources(name, shape)
