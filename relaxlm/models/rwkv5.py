"""RWKV 5.2 (Eagle; Peng et al. 2024, arXiv:2404.05892), after `modeling_rwkv5.py` of
RWKV/rwkv-5-world-1b5 on Hugging Face."""

from typing import ClassVar, Literal

import numpy as np
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models import rwkv
from relaxlm.models.base import Step
from relaxlm.models.layers import Float32Parameter
from relaxlm.models.recurrent import GroupNorm
from relaxlm.models.rwkv import TIME_MIX, as_row, row
from relaxlm.models.state import linear_scan, previous_row
from relaxlm.models.weights import Elementwise, Source

# Of the norm of what heads have read: the reference calls torch's function with its default.
_HEAD_EPSILON = 1e-5

# What checkpoints store of a decay, and folders for MLC what follows from it.
DECAY = Elementwise(lambda w: np.exp(-np.exp(w)), lambda decay: np.log(-np.log(decay)))


class Config(rwkv.Config):
    absent: ClassVar[dict] = {**rwkv.Config.absent, "model_version": "5_2"}

    model_type: Literal["rwkv5"]
    model_version: Literal["5_2"]


def _mixed(x: Tensor, before: Tensor, share: Tensor) -> Tensor:
    share = as_row(share)
    return x * share + before * (1.0 - share)


class ChannelMix(rwkv.ChannelMix):
    def __init__(self, config: rwkv.Config) -> None:
        super().__init__(config)
        self.time_mix_key = row(config.hidden_size)
        self.time_mix_receptance = row(config.hidden_size)

    def mixtures(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        shares = (self.time_mix_key, self.time_mix_receptance)
        key, receptance = (_mixed(x, before, share) for share in shares)
        return key, receptance


class TimeMix(nn.Module):
    """Heads whose state fades at a rate of each key feature's own, [n, hidden] -> [n, hidden]."""

    def __init__(self, config: rwkv.Config) -> None:
        size = config.hidden_size
        self.heads = (config.num_attention_heads, config.head_dim)
        self.time_decay, self.time_faaaa = (
            Float32Parameter(self.heads),
            Float32Parameter(self.heads),
        )
        self.time_mix_gate, self.time_mix_key = row(size), row(size)
        self.time_mix_value, self.time_mix_receptance = row(size), row(size)
        self.key = nn.Linear(size, size, bias=False)
        self.value = nn.Linear(size, size, bias=False)
        self.receptance = nn.Linear(size, size, bias=False)
        self.gate = nn.Linear(size, size, bias=False)
        self.output = nn.Linear(size, size, bias=False)
        self.ln_x = GroupNorm(config.num_attention_heads, size, _HEAD_EPSILON)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        n, size = x.shape
        before = previous_row(step, layer, TIME_MIX, x)

        def heads(project: nn.Linear, share: Tensor) -> Tensor:
            return op.reshape(project(_mixed(x, before, share)), (n, *self.heads))

        decay = op.broadcast_to(op.reshape(self.time_decay, (1, *self.heads)), (n, *self.heads))
        out = linear_scan(
            step,
            layer,
            heads(self.receptance, self.time_mix_receptance),
            heads(self.key, self.time_mix_key),
            heads(self.value, self.time_mix_value),
            decay,
            bonus=self.time_faaaa,
        )
        gate = op.silu(self.gate(_mixed(x, before, self.time_mix_gate)))
        return self.output(self.ln_x(op.reshape(out, (n, size))) * gate)


class Model(rwkv.Model):
    def __init__(self, config: Config) -> None:
        super().__init__(config, lambda: TimeMix(config), lambda: ChannelMix(config))

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        (source,) = super()._sources(name, shape)
        if name.endswith("time_decay"):
            return (Source(source.name, shape, function=DECAY),)
        return (source,)
