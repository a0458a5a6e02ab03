"""Llama 4 Scout and Maverick, the text part, after `transformers/models/llama4/modeling_llama4.py`.

Every fourth layer reads the whole text and has no rotary embedding; its queries are scaled by the
position. The others read the chunk of the text that a token is in. A router's weight multiplies
what its expert reads.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.errors import UnsupportedError
from relaxlm.models.base import CausalLM, Step
from relaxlm.models.config import DecoderConfig, text_fields
from relaxlm.models.layers import Block, GatedMLP, SplitProjections, merge_heads
from relaxlm.models.moe import MoEConfig, MoELM, SparseMLP
from relaxlm.models.routing import choose
from relaxlm.models.weights import Source


class Config(MoEConfig):
    """`windows` are chunks; `no_rope_layers` says 1 for layers that do have a rotary embedding."""

    absent: ClassVar[dict] = {
        "vocab_size": 202048,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        # Of training only.
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }
    spelling: ClassVar[Mapping[str, str]] = {
        **MoEConfig.spelling,
        "num_local_experts": "num_experts",
    }
    rope_in_pairs: ClassVar[bool] = True

    model_type: Literal["llama4", "llama4_text"]
    attention_bias: bool
    intermediate_size_mlp: PositiveInt
    moe_layers: tuple[NonNegativeInt, ...]
    interleave_moe_layer_step: PositiveInt
    use_qk_norm: bool
    no_rope_layers: tuple[bool, ...]
    no_rope_layer_interval: PositiveInt
    attention_chunk_size: NonNegativeInt
    attn_temperature_tuning: bool
    floor_scale: PositiveInt
    attn_scale: NonNegativeFloat

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        raw = text_fields(raw)
        # null turns chunks off; only a field that is not there has the default.
        if "attention_chunk_size" in raw and raw["attention_chunk_size"] is None:
            raw["attention_chunk_size"] = 0
        values = {**cls.absent, **{key: value for key, value in raw.items() if value is not None}}
        layers = values.get("num_hidden_layers")
        if isinstance(layers, int):
            every, step = values["no_rope_layer_interval"], values["interleave_moe_layer_step"]
            turning = [int((i + 1) % every != 0) for i in range(layers)]
            raw["no_rope_layers"] = raw.get("no_rope_layers") or turning
            if raw.get("moe_layers") is None:
                raw["moe_layers"] = list(range(step - 1, layers, step))
        return super().read(raw, where)

    @classmethod
    def _windows(cls, values: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
        if values.get("sliding_window_size", -1) > 0:
            raise UnsupportedError(
                f"{where}: sliding_window_size = {values['sliding_window_size']} is not supported "
                "with attention in chunks (attention_chunk_size); leave it out"
            )
        chunk, turning = values["attention_chunk_size"], values["no_rope_layers"]
        if len(turning) != layers:
            raise UnsupportedError(
                f"{where}: no_rope_layers has {len(turning)} entries, expected one for each of "
                f"num_hidden_layers = {layers}"
            )
        kinds = values.get("layer_types")
        if kinds is None:
            kinds = [
                "chunked_attention" if turns and chunk else "full_attention" for turns in turning
            ]
        unknown = sorted(set(kinds) - {"chunked_attention", "full_attention"})
        if unknown or len(kinds) != layers:
            raise UnsupportedError(
                f"{where}: layer_types = {kinds} is not supported: expected {layers} of "
                "'chunked_attention' and 'full_attention'"
            )
        return tuple(chunk if kind == "chunked_attention" else 0 for kind in kinds)

    @property
    def chunked_attention(self) -> bool:
        return True

    def layer_rope(self, layer: int) -> Any:
        return self.rope if self.no_rope_layers[layer] else None

    def for_context(self, context: int) -> DecoderConfig:
        config = super().for_context(context)
        # A text that fits into a chunk has no other.
        windows = tuple(0 if context <= chunk else chunk for chunk in self.windows)
        return config.model_copy(update={"windows": windows})

    def with_window(self, window: int, sinks: int) -> DecoderConfig:
        if window > 0:
            raise UnsupportedError(
                f"{self.model_type}: sliding_window_size = {window} is not supported with "
                "attention in chunks (attention_chunk_size); leave it out"
            )
        return super().with_window(window, sinks)


class Attention(SplitProjections):
    """Norms of queries and keys come after they have turned, and have no weights."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.attention_bias)
        self.config = config

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        config = self.config
        q, k, v = self.project(x)
        if config.layer_rope(layer) is not None:
            q, k = step.rotary(q, layer), step.rotary(k, layer)
            if config.use_qk_norm:
                q, k = (unit_length(part, config.norm_eps) for part in (q, k))
        elif config.attn_temperature_tuning:
            q = step.scale_by_position(q, config.attn_scale, config.floor_scale, first=1)
        return self.o_proj(merge_heads(step.attention(layer, q, k, v)))


def unit_length(x: Tensor, eps: float) -> Tensor:
    """Heads [n, heads, head_dim] over their root mean square, in float32."""
    size = int(x.shape[-1])

    def compute(x: te.Tensor) -> te.Tensor:
        j = te.reduce_axis((0, size), "j")

        def square(value):
            return value * value

        squares = te.compute(
            x.shape[:2],
            lambda t, h: te.sum(square(x[t, h, j].astype("float32")), axis=j),
            name="squares",
        )

        def element(t, h, i):
            mean = squares[t, h] / tirx.const(size, "float32") + tirx.const(eps, "float32")
            return (x[t, h, i].astype("float32") * tirx.rsqrt(mean)).astype(x.dtype)

        return te.compute(x.shape, element, name="unit_length")

    return op.tensor_expr_op(compute, "unit_length", [x])


class RoutedMLP(SparseMLP):
    """Chosen experts, whose weights multiply what they read, and one that every token passes."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.shared_expert = GatedMLP(config)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, chosen = choose(self.gate(x), self.config.num_experts_per_tok)
        return op.sigmoid(scores), chosen

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.route(x)
        n, each = share.shape
        gate_up = self.moe_gate_up_proj(weighted_rows(x, share), chosen, 1)
        gate, up = op.split(gate_up, 2, axis=-1)
        routed = self.moe_down_proj(self.activation(gate) * up, chosen, 1)
        if each != 1:
            routed = op.sum(op.reshape(routed, (n, each, routed.shape[1])), axis=1)
        return routed + self.shared_expert(x)


def weighted_rows(x: Tensor, share: Tensor) -> Tensor:
    """Every row of [n, size] times its weights [n, each] float32: [n * each, size] like x."""
    each = int(share.shape[1])

    def compute(x: te.Tensor, share: te.Tensor) -> te.Tensor:
        def element(row, j):
            return (x[row // each, j].astype("float32") * share[row // each, row % each]).astype(
                x.dtype
            )

        return te.compute((x.shape[0] * each, x.shape[1]), element, name="weighted_rows")

    return op.tensor_expr_op(compute, "weighted_rows", [x, share])


class Model(MoELM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"gate_up_proj": ("gate_proj", "up_proj")}
    checkpoint_names: ClassVar[Mapping[str, str]] = {"mlp": "feed_forward", "gate": "router"}
    published_names: ClassVar[Mapping[str, str]] = {
        "mlp": "feed_forward",
        "gate": "router.router",
    }
    ignored: ClassVar[tuple[str, ...]] = (
        *CausalLM.ignored,
        *("vision_model.*", "multi_modal_projector.*"),
        *("model.vision_model.*", "model.multi_modal_projector.*"),
    )

    def __init__(self, config: Config) -> None:
        single = config.model_copy(update={"intermediate_size": config.intermediate_size_mlp})
        super().__init__(
            config,
            [
                Block(
                    config,
                    Attention(config),
                    RoutedMLP(config) if i in config.moe_layers else GatedMLP(single),
                )
                for i in range(config.num_hidden_layers)
            ],
        )

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        """Experts are [E, in, out] in one tensor."""
        stem, is_expert, part = name.partition(".moe_")
        if not is_expert:
            return super()._sources(name, shape)
        experts, outputs, inputs = shape
        source = self._checkpoint_name(f"{stem}.experts.{part.removesuffix('.weight')}")
        return tuple(
            Source(source, (experts, inputs, outputs), view=np.transpose, index=i)
            for i in range(experts)
        )
