"""gpt-oss gives the logits of transformers, from float checkpoints and from MXFP4 ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from relaxlm import models
from relaxlm.quantization.convert import open_float_checkpoint
from tests.models import parity
from tests.models.conftest import converted
from tests.models.parity import tiny_config


def config(**change) -> dict:
    return tiny_config(
        "gpt_oss",
        **{
            "intermediate_size": 32,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": 19,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 32,
            },
            **change,
        },
    )


VARIANTS = {
    # Values beyond the limit are common.
    "clamped": config(swiglu_limit=0.4, swiglu_alpha=1.3),
    "no-attention-bias": config(attention_bias=False, layer_types=["full_attention"] * 2),
}


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_match_transformers(name: str) -> None:
    parity.check_parity(VARIANTS[name])


@pytest.mark.usefixtures("published")
def test_quantized_logits_match_transformers() -> None:
    parity.check_quantized(VARIANTS["clamped"])


def test_mxfp4_checkpoints_convert_like_the_values_they_stand_for(tmp_path: Path) -> None:
    raw = config(hidden_size=64, num_hidden_layers=1, layer_types=["full_attention"])
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    parity.reference_model(raw).save_pretrained(plain)
    tensors = load_file(plain / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, tensor in list(tensors.items()):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            groups = (experts, outputs, inputs // 32)
            del tensors[name]
            blocks = rng.integers(0, 256, (*groups, 16), dtype=np.uint8)
            tensors[f"{name}_blocks"] = torch.from_numpy(blocks)
            scales = rng.integers(118, 124, groups, dtype=np.uint8)
            tensors[f"{name}_scales"] = torch.from_numpy(scales)
    packed.mkdir()
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    written = json.loads((plain / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**written, "quantization_config": settings}))
    save_file(tensors, packed / "model.safetensors")
    assert models.load_config(packed) == models.load_config(plain)

    opened = open_float_checkpoint(packed)
    values = {
        name: torch.from_numpy(opened.read(name).astype(np.float32)) for name in opened.tensors
    }
    save_file(values, plain / "model.safetensors")
    for scheme in ("q0bf16", "q8f16_1"):
        ours = converted(raw, packed, scheme, tmp_path / f"ours-{scheme}")
        expected = converted(raw, plain, scheme, tmp_path / f"expected-{scheme}")
        assert ours.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(ours[name], array, err_msg=name)
