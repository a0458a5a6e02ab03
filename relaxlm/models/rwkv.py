"""What RWKV 5 and 6 share (Peng et al. 2024, arXiv:2404.05892), after `modeling_rwkv5.py` and
`modeling_rwkv6.py` of the RWKV team's Hugging Face folders."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import model_validator
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models.base import CausalLM, Step
from relaxlm.models.config import DecoderConfig, StateTensor
from relaxlm.models.layers import LayerNorm
from relaxlm.models.recurrent import RecurrentConfig
from relaxlm.models.state import previous_row, row_state, scan_state
from relaxlm.models.weights import Elementwise, Source

# Of the norm behind the last block, whatever the configuration says of the others.
_LAST_EPSILON = 1e-5

# Names of a layer's two previous rows.
TIME_MIX, CHANNEL_MIX = "time_mix", "channel_mix"


class Config(RecurrentConfig):
    """`rescale_every`: so many blocks later, the residual stream is halved, for half precision's
    sake; what is added to it is smaller from the start. 0 or less for never.
    """

    absent: ClassVar[dict] = {
        "vocab_size": 65536,
        "hidden_size": 768,
        "num_hidden_layers": 24,
        "head_size": 64,
        "layer_norm_epsilon": 1e-5,
        "rescale_every": 6,
        "tie_word_embeddings": False,
    }
    spelling: ClassVar[Mapping[str, str]] = {
        "layer_norm_epsilon": "norm_eps",
        "head_size": "head_dim",
    }
    without_effect: ClassVar[frozenset[str]] = frozenset({"context_length"})

    attention_hidden_size: int
    rescale_every: int

    @model_validator(mode="after")
    def _heads_fit(self) -> "Config":
        if self.attention_hidden_size != self.hidden_size:
            raise ValueError(
                f"attention_hidden_size = {self.attention_hidden_size}: expected hidden_size = "
                f"{self.hidden_size}"
            )
        if self.num_attention_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not a multiple of head_size = {self.head_dim}"
            )
        return self

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        values = {**cls.absent, **{key: value for key, value in raw.items() if value is not None}}
        hidden, size = values["hidden_size"], values["head_size"]
        if isinstance(hidden, int) and isinstance(size, int) and size > 0:
            values.setdefault("intermediate_size", int(hidden * 3.5) // 32 * 32)
            # What files call so is not the number of heads.
            values["num_attention_heads"] = values["num_key_value_heads"] = hidden // size
        values.setdefault("attention_hidden_size", hidden)
        return super().read({**values, "hidden_act": "relu2"}, where)

    def layer_states(self, layer: int) -> tuple[StateTensor, ...]:
        heads, size = self.num_attention_heads, self.head_dim
        return (
            row_state(TIME_MIX, self.hidden_size),
            scan_state(heads, size, size),
            row_state(CHANNEL_MIX, self.hidden_size),
        )


def row(size: int) -> nn.Parameter:
    """A weight for every feature, in the shape that checkpoints have."""
    return nn.Parameter((1, 1, size))


def as_row(parameter: Tensor) -> Tensor:
    """[1, 1, size] -> [1, size]."""
    return op.reshape(parameter, (1, parameter.shape[-1]))


class ChannelMix(nn.Module):
    """A feed-forward network with a gate, [n, hidden] -> [n, hidden]."""

    def __init__(self, config: Config) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.key = nn.Linear(hidden, inner, bias=False)
        self.receptance = nn.Linear(hidden, hidden, bias=False)
        self.value = nn.Linear(inner, hidden, bias=False)

    def mixtures(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """What key and receptance read of a token and the one before it."""
        raise NotImplementedError

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        key, receptance = self.mixtures(x, previous_row(step, layer, CHANNEL_MIX, x))
        inner = op.square(op.relu(self.key(key)))
        return op.sigmoid(self.receptance(receptance)) * self.value(inner)


class Block(nn.Module):
    """Time mix and channel mix, each behind a norm and added to the residual stream."""

    def __init__(
        self, config: Config, layer: int, attention: nn.Module, feed_forward: ChannelMix
    ) -> None:
        def norm() -> LayerNorm:
            return LayerNorm(config.hidden_size, config.norm_eps)

        self.pre_ln = norm() if layer == 0 else None
        self.ln1, self.ln2 = norm(), norm()
        self.attention, self.feed_forward = attention, feed_forward
        every = config.rescale_every
        self.halve = every > 0 and (layer + 1) % every == 0

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        if self.pre_ln is not None:
            x = self.pre_ln(x)
        x = x + self.attention(self.ln1(x), step, layer)
        x = x + self.feed_forward(self.ln2(x), step, layer)
        return x * 0.5 if self.halve else x


class Model(CausalLM):
    config: Config
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "model.norm": "rwkv.ln_out",
        "model": "rwkv",
        "embed_tokens": "embeddings",
        "layers": "blocks",
        "lm_head": "head",
    }
    published_names: ClassVar[Mapping[str, str]] = {
        "model.norm": "model.ln_out",
        "embed_tokens": "embeddings",
        "layers": "blocks",
        "lm_head": "head",
    }

    def __init__(
        self,
        config: Config,
        attention: Callable[[], nn.Module],
        feed_forward: Callable[[], ChannelMix],
    ) -> None:
        blocks = [
            Block(config, layer, attention(), feed_forward())
            for layer in range(config.num_hidden_layers)
        ]
        super().__init__(config, blocks, lambda size, eps: LayerNorm(size, _LAST_EPSILON))

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        (source,) = super()._sources(name, shape)
        every = self.config.rescale_every
        if every > 0 and name.endswith(("attention.output.weight", "feed_forward.value.weight")):
            layer = int(name.removeprefix("model.layers.").partition(".")[0])
            if layer >= every:
                return (Source(source.name, shape, function=halvings(layer // every)),)
        return (source,)


def halvings(count: int) -> Elementwise:
    """Division by two, so often. It is exact."""
    scale = np.float32(2.0**-count)
    return Elementwise(lambda values: values * scale, lambda values: values / scale)
