"""GPT-J, after `transformers/models/gptj/modeling_gptj.py`: attention and MLP read one norm, rotary
embeddings turn neighbouring features, and the head has a bias."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from relaxlm.models import gpt2
from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import MLP, Attention, LayerNorm, ParallelBlock
from relaxlm.models.rope import DefaultRope


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "rotary_dim": 64,
        "tie_word_embeddings": False,
    }
    spelling: ClassVar[dict] = gpt2.Config.spelling
    rope_in_pairs: ClassVar[bool] = True

    model_type: Literal["gptj"]
    rope: DefaultRope
    rotary_dim: PositiveInt
    tie_word_embeddings: Literal[False]

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        return super().read(gpt2.with_sizes(raw), where)

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        turning, size = values["rotary_dim"], values.get("head_dim")
        # Half a feature more: the share times the size, rounded down, is `rotary_dim` again.
        share = min(1.0, (turning + 0.5) / size) if size else 1.0
        return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "model": "transformer",
        "embed_tokens": "wte",
        "layers": "h",
        "norm": "ln_f",
        "input_layernorm": "ln_1",
        "self_attn": "attn",
        "o_proj": "out_proj",
        "up_proj": "fc_in",
        "down_proj": "fc_out",
    }
    published_names: ClassVar[Mapping[str, str]] = {**checkpoint_names, "qkv_proj": "c_attn"}
    # The causal mask, which old files have as a tensor.
    ignored: ClassVar[tuple[str, ...]] = ("*.attn.bias", "*.attn.masked_bias")

    def __init__(self, config: Config) -> None:
        blocks = [
            ParallelBlock(config, Attention(config), MLP(config), LayerNorm)
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, blocks, LayerNorm, head_bias=True)
