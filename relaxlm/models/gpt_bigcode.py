"""StarCoder 1 and SantaCoder, after `transformers/models/gpt_bigcode/modeling_gpt_bigcode.py`:
GPT-2 with one key and value head."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from relaxlm.models import gpt2
from relaxlm.models.config import DecoderConfig
from relaxlm.models.gpt_neox import by_kind
from relaxlm.models.layers import Attention
from relaxlm.models.weights import Source


class Config(gpt2.Config):
    absent: ClassVar[dict] = {
        **gpt2.Config.absent,
        "activation_function": "gelu_pytorch_tanh",
        "multi_query": True,
    }

    model_type: Literal["gpt_bigcode"]  # type: ignore[assignment]
    scale_attn_by_inverse_layer_idx: Literal[False]
    multi_query: bool

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        one = raw.get("multi_query") in (True, None)
        return super().read({**raw, **({"num_key_value_heads": 1} if one else {})}, where)


class Model(gpt2.GPT2Like):
    def __init__(self, config: Config) -> None:
        super().__init__(config, Attention)
        self.head_by_head = not config.multi_query

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        (source,) = super()._sources(name, shape)
        if ".qkv_proj." not in name or not self.head_by_head:
            return (source,)
        return (Source(source.name, shape, view=by_kind(self.config.num_attention_heads)),)
