"""Mamba 2 and Codestral Mamba, after `transformers/models/mamba2/modeling_mamba2.py`."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt, model_validator
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models.base import CacheHandle, CausalLM, Step
from relaxlm.models.config import DecoderConfig, StateTensor
from relaxlm.models.layers import RMSNorm
from relaxlm.models.mamba import Mamba2Mixer, MambaShape, step_limit
from relaxlm.models.recurrent import RecurrentConfig


class Config(RecurrentConfig):
    """`num_attention_heads` and `head_dim` are those of the mixer."""

    absent: ClassVar[dict] = {
        "vocab_size": 32768,
        "hidden_size": 4096,
        "num_hidden_layers": 64,
        "num_heads": 128,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 8,
        "conv_kernel": 4,
        "expand": 2,
        "layer_norm_epsilon": 1e-5,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "time_step_limit": (0.0, float("inf")),
        "tie_word_embeddings": False,
    }
    spelling: ClassVar[Mapping[str, str]] = {
        "num_heads": "num_attention_heads",
        "layer_norm_epsilon": "norm_eps",
    }
    # How weights were drawn, how the reference cuts texts, and what it has in only one way.
    without_effect: ClassVar[frozenset[str]] = frozenset(
        """
        chunk_size norm_before_gate rescale_prenorm_residual time_step_floor time_step_init_scheme
        time_step_max time_step_min time_step_rank time_step_scale
        """.split()
    )

    model_type: Literal["mamba2"]
    hidden_act: Literal["silu"]
    state_size: PositiveInt
    n_groups: PositiveInt
    conv_kernel: PositiveInt
    expand: PositiveInt
    use_bias: bool
    use_conv_bias: bool
    residual_in_fp32: bool
    time_step_limit: tuple[float, float]
    rms_norm: Literal[True] = True

    @model_validator(mode="after")
    def _is_a_mixer(self) -> "Config":
        shape = self.mixer
        if self.hidden_size * self.expand != shape.width:
            raise ValueError(
                f"{shape.heads} heads of {shape.head_dim} features: expected expand = "
                f"{self.expand} times hidden_size = {self.hidden_size} features"
            )
        if problem := shape.problem():
            raise ValueError(problem)
        return self

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        values = {**cls.absent, **{key: value for key, value in raw.items() if value is not None}}
        width = values["num_heads"] * values["head_dim"]
        return super().read(
            {**raw, "time_step_limit": step_limit(values), "intermediate_size": width}, where
        )

    @property
    def mixer(self) -> MambaShape:
        return MambaShape(
            self.hidden_size,
            self.num_attention_heads,
            self.head_dim,
            self.n_groups,
            self.state_size,
            self.conv_kernel,
            self.use_bias,
            self.use_conv_bias,
            self.time_step_limit,
            self.norm_eps,
        )

    def layer_states(self, layer: int) -> tuple[StateTensor, ...]:
        return self.mixer.states()


class Block(nn.Module):
    """A mixer behind a norm, added to the residual stream, which may be wider than the rest."""

    def __init__(self, config: Config) -> None:
        self.mixer = Mamba2Mixer(config.mixer)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.wide = config.residual_in_fp32

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        mixed = self.mixer(self.norm(op.astype(x, self.norm.weight.dtype)), step, layer)
        if self.wide:
            x, mixed = op.astype(x, "float32"), op.astype(mixed, "float32")
        return x + mixed


class Model(CausalLM):
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "conv1d_weight": "conv1d.weight",
        "conv1d_bias": "conv1d.bias",
        "model.norm": "backbone.norm_f",
        "model": "backbone",
        "embed_tokens": "embeddings",
    }

    def __init__(self, config: Config) -> None:
        super().__init__(config, [Block(config) for _ in range(config.num_hidden_layers)])

    def _layers(self, x: Tensor, positions: Tensor, cache: CacheHandle) -> Iterator[Tensor]:
        for wide in super()._layers(x, positions, cache):
            yield op.astype(wide, x.dtype)
