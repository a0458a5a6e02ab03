"""RWKV 5, 6 and 7 give the logits of a transcription of the published code, and RWKV 5 those that
are published with a trained model."""

import json
from pathlib import Path

import numpy as np
import pytest

from relaxlm import models
from relaxlm.compiler.options import CompileOptions
from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.models.config import unknown_fields
from relaxlm.quantization.convert import convert_weights
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.params import WeightFolder
from tests.models import numpy_rwkv, stateful
from tests.models.parity import VOCAB, Compiled
from tests.shared_data import SHARED, needs_shared_data

SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3}
VARIANTS = {
    "rwkv5": {
        "model_type": "rwkv5",
        "model_version": "5_2",
        **SIZES,
        "head_size": 16,
        "num_attention_heads": 64,  # as in published files, where it means nothing
        "layer_norm_epsilon": 1e-4,
        "rescale_every": 2,
    },
    "rwkv6": {
        "model_type": "rwkv6",
        **SIZES,
        "head_size": 16,
        "head_size_divisor": 3,
        "intermediate_size": 96,
        "layer_norm_epsilon": 1e-4,
        "rescale_every": 1,
    },
    "rwkv7": {
        "model_type": "rwkv7",
        **SIZES,
        "head_dim": 16,
        "hidden_ratio": 2.5,
        "decay_low_rank_dim": 8,
        "gate_low_rank_dim": 12,
        "a_low_rank_dim": 6,
        "v_low_rank_dim": 10,
        "norm_eps": 1e-4,
        "norm_first": True,
        "fuse_norm": True,
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_match_the_published_code(name: str) -> None:
    stateful.check_transcription(VARIANTS[name], getattr(numpy_rwkv, name))


@needs_shared_data
def test_a_trained_model_gives_its_published_logits_and_bytes(tmp_path: Path) -> None:
    source = SHARED / "rwkv5-tiny-730k"
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config, scheme = models.load_config(source), get_scheme("q0f32")
    assert unknown_fields(config, raw) == []
    specs, ignored = models.parameter_specs(config), models.ignored_sources(config)
    convert_weights(source, scheme, tmp_path / "out", specs, ignored)
    weights = WeightFolder(tmp_path / "out")
    compiled = Compiled(raw, {name: weights.load(name).copy() for name in weights.records}, "q0f32")

    (logits,) = compiled.run([np.frombuffer(b'"in', np.uint8)], [3])
    published = np.frombuffer((source / "expected-logits-5v2-730K.bin").read_bytes(), np.float32)
    np.testing.assert_allclose(logits[-1], published, rtol=1e-6, atol=5e-6)

    expected = json.loads((source / "expected.json").read_text(encoding="utf-8"))
    for reply in expected["greedy"]:
        seq, ids = compiled.sequences.add(), np.array(reply["prompt_ids"])
        (rows,) = stateful.run_step(compiled, {seq: ids})
        np.testing.assert_allclose(rows[-1], reply["last_prompt_logits"], atol=2e-5)
        found = [int(rows[-1].argmax())]
        while len(found) < len(reply["greedy_ids"]):
            (rows,) = stateful.run_step(compiled, {seq: np.array(found[-1:])})
            found.append(int(rows[-1].argmax()))
        assert found == reply["greedy_ids"]


def test_parameters_are_called_and_stored_as_in_folders_for_mlc() -> None:
    five, six = (stateful.stored_dtypes(VARIANTS[name]) for name in ("rwkv5", "rwkv6"))
    for stored in (five, six):
        layer = {
            name.removeprefix("model.blocks.0."): dtype
            for name, dtype in stored.items()
            if ".0." in name
        }
        assert {name for name, dtype in layer.items() if dtype == "float32"} == {
            "attention.time_decay",
            "attention.time_faaaa",
            "attention.ln_x.weight",
            "attention.ln_x.bias",
        }
        quantized = {name for name, dtype in layer.items() if dtype == "uint32"}
        assert quantized == {
            *(f"attention.{part}.q_weight" for part in ("key", "value", "receptance")),
            *("attention.gate.q_weight", "attention.output.q_weight"),
            *(f"feed_forward.{part}.q_weight" for part in ("key", "value", "receptance")),
        }
        assert {"pre_ln.weight", "pre_ln.bias", "ln1.weight", "ln2.bias"} <= layer.keys()
        names = {"model.embeddings.q_weight", "model.ln_out.weight", "head.q_weight"}
        assert names <= stored.keys()
    specs = models.parameter_specs(models.load_config(VARIANTS["rwkv6"]))
    shapes = {spec.name.removeprefix("model.blocks.0.attention."): spec.shape for spec in specs}
    assert shapes["time_maa_w1"] == (64, 160) and shapes["time_maa_w2"] == (5, 32, 64)
    assert shapes["time_decay_w1"] == (64, 64) and shapes["time_maa_x"] == (1, 1, 64)


def test_adapters_of_rwkv7_are_not_quantized_and_layers_but_the_first_mix_values() -> None:
    roles = stateful.roles(VARIANTS["rwkv7"])
    adapters = {name: role for name, role in roles.items() if "_lora." in name}
    assert set(adapters.values()) == {"vector"}
    assert {name.split(".")[2] for name in adapters if "v_lora" in name} == {"1", "2"}
    assert roles["model.layers.0.attn.r_proj.weight"] == "linear"
    assert roles["model.layers.0.attn.g_norm.weight"] == "float32"


def test_early_checkpoints_of_rwkv7_have_one_tensor_of_weights_to_mix_by() -> None:
    raw = VARIANTS["rwkv7"]
    specs = {spec.name: spec for spec in models.parameter_specs(models.load_config(raw))}
    spec = specs["model.layers.1.attn.x_k"]
    early = np.arange(6 * 64, dtype=np.float32).reshape(6, 64)
    (source,) = spec.found_in({"model.layers.1.attn.x_x"}).sources
    assert source.name == "model.layers.1.attn.x_x" and source.shape == (6, 64)
    np.testing.assert_array_equal(source.values(early).reshape(-1), early[2])
    (source,) = spec.found_in({"model.layers.1.attn.x_k"}).sources
    assert source.shape == (1, 1, 64)


REFUSED = {
    "version": ("rwkv5", {"model_version": "5_1"}, UnsupportedError, "model_version = '5_1'"),
    "attention": (
        "rwkv5",
        {"attention_hidden_size": 32},
        ConfigError,
        "attention_hidden_size = 32: expected hidden_size = 64",
    ),
    "heads": ("rwkv6", {"head_size": 24}, ConfigError, "is not a multiple of head_size = 24"),
    "activation": ("rwkv7", {"hidden_act": "silu"}, UnsupportedError, "hidden_act = 'silu'"),
    "hybrid": ("rwkv7", {"attn": {"layers": [1]}}, UnsupportedError, "attn = .* is not supported"),
    "values": ("rwkv7", {"value_dim": 128}, ConfigError, r"value_dim = \[128, 128, 128\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case: str) -> None:
    name, change, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        models.load_config({**VARIANTS[name], **change})


def test_sizes_follow_as_in_the_published_code() -> None:
    five = models.load_config({**VARIANTS["rwkv5"], "intermediate_size": None})
    assert (five.num_attention_heads, five.head_dim) == (4, 16)
    assert five.intermediate_size == 224  # 3.5 times as wide, in multiples of 32
    seven = models.load_config(VARIANTS["rwkv7"])
    assert seven.intermediate_size == 160
    six = models.load_config({**VARIANTS["rwkv6"], "hidden_size": 4096})
    assert six.ranks == (64, 128)


def test_texts_have_no_longest_length_and_no_window() -> None:
    config, scheme = models.load_config(VARIANTS["rwkv7"]), get_scheme("q0f32")
    assert CompileOptions.resolve(config, scheme).context_window_size == 2**20
    with pytest.raises(ConfigError) as error:
        config.with_window(32, 0)
    assert str(error.value) == (
        "sliding_window_size = 32: no layer of this model attends to earlier tokens, so there is "
        "nothing to limit. Leave it out"
    )
    assert not any(map(config.has_pages, range(3)))
