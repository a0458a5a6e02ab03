"""Sink logits from a parameter to the kernels: Llama with the attention of gpt-oss."""

import pytest
import torch
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from relaxlm.models import llama
from relaxlm.models.base import Step
from relaxlm.models.layers import merge_heads, split_heads
from tests.models import parity
from tests.models.parity import tiny_config


class Attention(llama.Attention):
    def __init__(self, config: llama.Config) -> None:
        super().__init__(config)
        self.sinks = nn.Parameter((config.num_attention_heads,))

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        q, k, v = split_heads(self.qkv_proj(x), self.config)
        q, k = step.rotary(q, layer), step.rotary(k, layer)
        return self.o_proj(merge_heads(step.attention(layer, q, k, v, sink_logits=self.sinks)))


class ReferenceAttention(modeling_llama.LlamaAttention):
    def __init__(self, config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.sinks = torch.nn.Parameter(torch.zeros(config.num_attention_heads))


@pytest.fixture(autouse=True)
def llama_with_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "Attention", Attention)
    monkeypatch.setattr(modeling_llama, "LlamaAttention", ReferenceAttention)
    attend = modeling_gpt_oss.eager_attention_forward
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attend)


def test_logits_match_transformers() -> None:
    parity.check_parity(tiny_config("llama"))


def test_quantized() -> None:
    parity.check_quantized(tiny_config("llama"))
