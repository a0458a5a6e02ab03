"""RWKV 6 (Finch; Peng et al. 2024, arXiv:2404.05892), after `modeling_rwkv6.py` of
RWKV/v6-Finch-1B6-HF on Hugging Face: how tokens are mixed with those before them, and how the state
fades, depends on the token."""

from typing import ClassVar, Literal

from pydantic import PositiveFloat
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models import rwkv
from relaxlm.models.base import Step
from relaxlm.models.layers import Float32Parameter
from relaxlm.models.recurrent import GroupNorm
from relaxlm.models.rwkv import TIME_MIX, as_row, row
from relaxlm.models.state import linear_scan, previous_row

# Of the norm of what heads have read, before the divisor.
_HEAD_EPSILON = 1e-5
# What is mixed, in the order of the adapters.
_PARTS = ("w", "k", "v", "r", "g")


class Config(rwkv.Config):
    absent: ClassVar[dict] = {
        **rwkv.Config.absent,
        "head_size_divisor": 8,
        "model_version": "6_0",
    }

    model_type: Literal["rwkv6"]
    model_version: Literal["6_0"]
    head_size_divisor: PositiveFloat

    @property
    def ranks(self) -> tuple[int, int]:
        """Of the adapters of mixtures and of the decay. The reference knows them by the width."""
        return (64, 128) if self.hidden_size == 4096 else (32, 64)


class ChannelMix(rwkv.ChannelMix):
    def __init__(self, config: rwkv.Config) -> None:
        super().__init__(config)
        self.time_maa_k, self.time_maa_r = row(config.hidden_size), row(config.hidden_size)

    def mixtures(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        change = before - x
        return x + change * as_row(self.time_maa_k), x + change * as_row(self.time_maa_r)


class TimeMix(nn.Module):
    """Heads whose state fades as each token says, [n, hidden] -> [n, hidden]."""

    def __init__(self, config: Config) -> None:
        size, (mixing, fading) = config.hidden_size, config.ranks
        self.heads = (config.num_attention_heads, config.head_dim)
        self.time_maa_x = row(size)
        self.time_maa_w, self.time_maa_k, self.time_maa_v = row(size), row(size), row(size)
        self.time_maa_r, self.time_maa_g = row(size), row(size)
        self.time_maa_w1 = nn.Parameter((size, len(_PARTS) * mixing))
        self.time_maa_w2 = nn.Parameter((len(_PARTS), mixing, size))
        self.time_decay = Float32Parameter((1, 1, size))
        self.time_decay_w1 = nn.Parameter((size, fading))
        self.time_decay_w2 = nn.Parameter((fading, size))
        self.time_faaaa = Float32Parameter(self.heads)
        self.receptance = nn.Linear(size, size, bias=False)
        self.key = nn.Linear(size, size, bias=False)
        self.value = nn.Linear(size, size, bias=False)
        self.gate = nn.Linear(size, size, bias=False)
        self.output = nn.Linear(size, size, bias=False)
        eps = _HEAD_EPSILON * config.head_size_divisor**2
        self.ln_x = GroupNorm(config.num_attention_heads, size, eps)

    def mixtures(self, x: Tensor, before: Tensor) -> list[Tensor]:
        """What decay, key, value, receptance and gate read of a token and the one before it."""
        n, size = x.shape
        change = before - x
        inner = op.tanh(op.matmul(x + change * as_row(self.time_maa_x), self.time_maa_w1))
        parts = len(_PARTS)
        rank = int(self.time_maa_w2.shape[1])
        inner = op.permute_dims(op.reshape(inner, (n, parts, rank)), [1, 0, 2])
        shares = op.split(op.matmul(inner, self.time_maa_w2), parts, axis=0)
        fixed = [getattr(self, f"time_maa_{part}") for part in _PARTS]
        return [
            x + change * (as_row(own) + op.reshape(share, (n, size)))
            for own, share in zip(fixed, shares, strict=True)
        ]

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        n, size = x.shape
        before = previous_row(step, layer, TIME_MIX, x)
        for_decay, for_key, for_value, for_receptance, for_gate = self.mixtures(x, before)

        def heads(rows: Tensor) -> Tensor:
            return op.reshape(rows, (n, *self.heads))

        speed = op.matmul(op.tanh(op.matmul(for_decay, self.time_decay_w1)), self.time_decay_w2)
        speed = op.exp(as_row(self.time_decay) + op.astype(speed, "float32"))
        out = linear_scan(
            step,
            layer,
            heads(self.receptance(for_receptance)),
            heads(self.key(for_key)),
            heads(self.value(for_value)),
            heads(op.exp(op.negative(speed))),
            bonus=self.time_faaaa,
        )
        gate = op.silu(self.gate(for_gate))
        return self.output(self.ln_x(op.reshape(out, (n, size))) * gate)


class Model(rwkv.Model):
    def __init__(self, config: Config) -> None:
        super().__init__(config, lambda: TimeMix(config), lambda: ChannelMix(config))
