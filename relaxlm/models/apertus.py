"""Apertus, after `transformers/models/apertus/modeling_apertus.py`: an MLP without gate whose
activation is learned, and a norm on every query and key head."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Attention, Block, Float32Parameter, RMSNorm
from relaxlm.models.weights import Elementwise, Source

SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "xielu",
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5,
        "rope_theta": 12000000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        # Of the files that are published, beside what transformers reads.
        "mlp_bias": False,
        "post_norm": False,
        "qk_norm": True,
    }

    model_type: Literal["apertus"]
    hidden_act: Literal["xielu"]  # type: ignore[assignment]
    attention_bias: bool
    mlp_bias: Literal[False]
    post_norm: Literal[False]
    qk_norm: Literal[True]

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        if not (values.get("rope_parameters") or values.get("rope_scaling")):
            values = {**values, "rope_scaling": SCALING}
        return super()._rope(values)


class Xielu(nn.Module):
    """alpha_p x^2 + beta x above 0, alpha_n (exp(min(x, eps)) - 1 - x) + beta x below
    (Huang and Schlag 2024, arXiv:2411.13010); alpha_n is `beta` more than the parameter."""

    def __init__(self) -> None:
        self.alpha_p, self.alpha_n = Float32Parameter((1,)), Float32Parameter((1,))
        self.beta, self.eps = Float32Parameter((1,)), Float32Parameter((1,))

    def forward(self, x: Tensor) -> Tensor:
        def compute(
            x: te.Tensor, alpha_p: te.Tensor, alpha_n: te.Tensor, beta: te.Tensor, eps: te.Tensor
        ) -> te.Tensor:
            def element(*index):
                value, one = x(*index).astype("float32"), tirx.const(1, "float32")
                above = alpha_p[0] * value * value
                below = tirx.exp(tirx.min(value, eps[0])) - one - value
                below = (alpha_n[0] + beta[0]) * below
                branch = tirx.Select(value > 0, above, below)
                return (branch + beta[0] * value).astype(x.dtype)

            return te.compute(x.shape, element, name="xielu")

        given = [x, self.alpha_p, self.alpha_n, self.beta, self.eps]
        return op.tensor_expr_op(compute, "xielu", given)


class XieluMLP(nn.Module):
    """down(act(up(x))), [n, hidden] -> [n, hidden]."""

    def __init__(self, config: Config) -> None:
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = Xielu()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))


# Alphas are stored as what gives them.
_SOFTPLUS = Elementwise(
    lambda x: np.logaddexp(np.float32(0), x).astype(np.float32),
    lambda y: np.log(np.expm1(y)).astype(np.float32),
)


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "input_layernorm": "attention_layernorm",
        "post_attention_layernorm": "feedforward_layernorm",
    }

    def __init__(self, config: Config) -> None:
        def block() -> Block:
            bias = config.attention_bias
            return Block(config, Attention(config, bias, bias, RMSNorm), XieluMLP(config))

        super().__init__(config, [block() for _ in range(config.num_hidden_layers)])

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        if ".act_fn." not in name:
            return super()._sources(name, shape)
        checkpoint = self._checkpoint_name(name)
        if ".alpha_" in name:
            return (Source(checkpoint, shape, function=_SOFTPLUS),)
        return (Source(checkpoint, (), view=lambda value: value.reshape(1)),)
