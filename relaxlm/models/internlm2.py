"""InternLM2 and 2.5, after the `modeling_internlm2.py` that is published with their weights: Llama
under other names, with q, k and v in one matrix by groups of heads."""

from typing import ClassVar, Literal

from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Attention, Block, GatedMLP
from relaxlm.models.weights import Source


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bias": True,
        "tie_word_embeddings": False,
    }

    model_type: Literal["internlm2"]
    bias: bool


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"gate_up_proj": ("gate_proj", "up_proj")}
    checkpoint_names: ClassVar[dict[str, str]] = {
        "model.embed_tokens": "model.tok_embeddings",
        "self_attn.qkv_proj": "attention.wqkv",
        "self_attn.o_proj": "attention.wo",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "lm_head": "output",
    }
    published_names: ClassVar[dict[str, str]] = {**checkpoint_names, "mlp": "feed_forward"}

    def __init__(self, config: Config) -> None:
        def block() -> Block:
            attention = Attention(config, qkv_bias=config.bias, out_bias=config.bias)
            return Block(config, attention, GatedMLP(config))

        super().__init__(config, [block() for _ in range(config.num_hidden_layers)])

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        if ".qkv_proj." not in name:
            return super()._sources(name, shape)
        return (by_group(Source(self._checkpoint_name(name), shape), self.config),)


def by_group(source: Source, config: DecoderConfig) -> Source:
    """q, k and v out of a checkpoint that has a key head and a value head behind the query heads
    that read them."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = heads // groups + 2
    places = range(heads + 2 * groups)
    order = (
        *(place for place in places if place % size < size - 2),
        *(place for place in places if place % size == size - 2),
        *(place for place in places if place % size == size - 1),
    )
    by_head = (len(places), config.head_dim, *source.shape[1:])
    return Source(source.name, source.shape, view=lambda x: x.reshape(by_head), order=order)
