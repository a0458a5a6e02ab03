"""Every preset and every cache format computes what transformers computes with the same values.

The reference is transformers in float32 on the weights that a preset keeps, dequantized by the
NumPy reference of the scheme. So the damage of quantization is on both sides, and what is left is
how exactly the compiled model computes.
"""

import numpy as np
import pytest
import torch
from transformers.models.llama import modeling_llama

from relaxlm.quantization.kv_cache import KV_FORMATS
from relaxlm.quantization.schemes import SCHEMES
from tests.models import parity
from tests.models.parity import compiled_and_reference, tiny_config

# Rows of 72 and 64 elements: neither is a multiple of a group of 40, one is of 32. Kernels take
# most of the time to compile, and these sizes give four matrices of two shapes in every layer.
SIZES = {"hidden_size": 72, "intermediate_size": 64}
MODELS = {
    "llama": tiny_config("llama", **SIZES),
    # Biases, and an embedding that doubles as head.
    "qwen2": tiny_config("qwen2", **SIZES, tie_word_embeddings=True),
}


# With a tied embedding: quantized along rows while the other matrices are not, not quantized at
# all, with a rest; and biases in bfloat16.
TIED = ("q4f16_0", "q4f16_2", "q3f16_1", "q0bf16")


@pytest.mark.parametrize(
    ("name", "scheme"),
    [*(("llama", scheme) for scheme in SCHEMES), *(("qwen2", scheme) for scheme in TIED)],
)
def test_a_preset_computes_with_the_values_it_keeps(name: str, scheme: str) -> None:
    parity.check_quantized(MODELS[name], scheme)


# Largest error of a logit, as a share of the largest logit: against an exact cache, and against a
# cache that rounds in the same way. Measured 4e-4, 2.4e-3, 3.3e-2 and 2e-5, 8e-7, 8e-4. The second
# is not that of float32 everywhere because a key that differs in its last bit may be rounded to
# another neighbour, which is 2**-10 (float16) or 1/8 (e4m3) away.
CACHES = {"float16": (2e-3, 2e-4), "bfloat16": (1e-2, 1e-3), "float8_e4m3": (1e-1, 1e-2)}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_format_costs_its_rounding_and_nothing_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    format = KV_FORMATS[name]
    compiled, model = compiled_and_reference(MODELS["llama"], "q4f16_1", f"kv_cache_dtype={name}")
    ids = np.random.default_rng(8).integers(0, parity.VOCAB, 70)
    exact = parity.reference_logits(model, ids)
    attention = modeling_llama.eager_attention_forward

    def through_the_cache(module, query, key, value, *arguments, **options):
        kept = [
            torch.from_numpy(format.dequantize(*format.quantize(x.numpy()))) for x in (key, value)
        ]
        return attention(module, query, *kept, *arguments, **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", through_the_cache)
    rounded = parity.reference_logits(model, ids)
    (logits,) = compiled.run([ids], [33, 1, 36])
    for expected, share in zip((exact, rounded), CACHES[name], strict=True):
        error = np.abs(logits - expected).max() / np.abs(expected).max()
        assert error < share, f"{error:.1e} of the largest logit"
    # The rounding is in effect: a library that ignored the format would fail here.
    assert np.abs(logits - exact).max() / np.abs(exact).max() > CACHES[name][0] / 20
