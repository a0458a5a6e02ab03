"""Llama 4's text part gives the logits of transformers, across chunks."""

import pytest

from relaxlm import models
from relaxlm.compiler.build import describe_model
from relaxlm.compiler.options import CompileOptions
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import UnsupportedError
from relaxlm.quantization.schemes import get_scheme
from tests.models import parity
from tests.models.parity import tiny_config


def config(**change) -> dict:
    return tiny_config(
        "llama4_text",
        **{
            "intermediate_size": 40,
            "intermediate_size_mlp": 72,
            "num_local_experts": 5,
            # The second layer has no rotary embedding.
            "no_rope_layer_interval": 2,
            "attention_chunk_size": 23,
            "floor_scale": 16,
            "attn_scale": 0.7,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 16.0,
                "high_freq_factor": 1.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
            },
            **change,
        },
    )


VARIANTS = {
    "scout": config(),
    "maverick": config(
        interleave_moe_layer_step=2,
        num_experts_per_tok=2,
        use_qk_norm=False,
        attention_bias=True,
        attention_chunk_size=None,
        attn_temperature_tuning=False,
    ),
}


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_match_transformers(name: str) -> None:
    parity.check_parity(VARIANTS[name])


@pytest.mark.usefixtures("published")
def test_quantized_logits_match_transformers() -> None:
    parity.check_quantized(VARIANTS["scout"])


def test_the_text_part_of_a_model_that_reads_pictures() -> None:
    parity.check_text_part({"model_type": "llama4", "text_config": VARIANTS["scout"]})


def test_layers_alternate_as_the_configuration_says() -> None:
    raw = {**config(num_hidden_layers=8, interleave_moe_layer_step=2), "no_rope_layer_interval": 4}
    read = models.load_config(raw)
    assert read.windows == (23, 23, 23, 0, 23, 23, 23, 0)
    assert [read.layer_rope(i) is None for i in range(8)] == [i % 4 == 3 for i in range(8)]
    assert read.moe_layers == (1, 3, 5, 7)
    # A text that fits into a chunk sees all of it.
    assert read.for_context(23).windows == (0,) * 8
    assert read.for_context(24).windows == read.windows
    assert models.load_config({"model_type": "llama4", "text_config": raw}).windows == read.windows


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no_rope_layers has 3 entries"):
        models.load_config(config(no_rope_layers=[1, 0, 1]))
    with pytest.raises(UnsupportedError, match=r"layer_types = .*'sliding_attention'"):
        models.load_config(config(layer_types=["sliding_attention", "full_attention"]))
    raw, scheme = config(), get_scheme("q4f16_1")
    read = models.load_config(raw)
    options = CompileOptions.resolve(read, scheme, None, "sliding_window_size=32", "O2")
    with pytest.raises(UnsupportedError, match=r"sliding_window_size = 32 .*attention_chunk_size"):
        describe_model(read, raw, scheme, resolve_device("cpu"), options)
