"""OLMo 1, after `transformers/models/olmo/modeling_olmo.py`: layer norms without parameters."""

from functools import partial
from typing import ClassVar, Literal

from pydantic import PositiveFloat
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models import layers
from relaxlm.models.base import CausalLM, Step
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Block, GatedMLP, LayerNorm


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "clip_qkv": None,
        "tie_word_embeddings": False,
    }

    model_type: Literal["olmo"]
    norm_eps: Literal[1e-5]  # type: ignore[valid-type]
    attention_bias: bool
    clip_qkv: PositiveFloat | None


class ClippedAttention(layers.Attention):
    """Queries, keys and values stay between -clip and clip, unless that is None."""

    def __init__(self, config: DecoderConfig, clip: float | None, bias: bool = False) -> None:
        super().__init__(config, bias, bias)
        self.clip = clip

    def project(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, step)
        if self.clip is None:
            return q, k, v
        return _clip(q, self.clip), _clip(k, self.clip), _clip(v, self.clip)


def _clip(x: Tensor, limit: float) -> Tensor:
    low, high = Tensor.from_scalar(-limit, x.dtype), Tensor.from_scalar(limit, x.dtype)
    return op.minimum(op.maximum(x, low), high)


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def __init__(self, config: Config) -> None:
        norm = partial(LayerNorm, weight=False, bias=False)

        def attention() -> ClippedAttention:
            return ClippedAttention(config, config.clip_qkv, config.attention_bias)

        super().__init__(
            config,
            [
                Block(config, attention(), GatedMLP(config), norm)
                for _ in range(config.num_hidden_layers)
            ],
            norm,
        )
