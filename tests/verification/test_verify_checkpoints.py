"""Checkpoints that transformers does not load by itself: FP8, MXFP4, and Kimi K2, which it knows by
another name. The first test also has latents as cache."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from relaxlm.verification.reference import Reference
from relaxlm.verification.verify import Thresholds
from tests.models import parity, test_deepseek, test_gpt_oss
from tests.verification.test_verify import convert, save_checkpoint, verify

BLOCK = 32


def change(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict) -> None:
    """Give a folder other tensors, which this configuration describes."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": quantization}))


def to_fp8(folder: Path) -> None:
    """Store every projection in FP8 with a scale for each block."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name]
        rows, columns = (-(-size // BLOCK) for size in weight.shape)
        scales = torch.zeros(rows, columns)
        for i in range(rows):
            for j in range(columns):
                place = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
                scales[i, j] = weight[place].abs().max() / 448
                weight[place] /= scales[i, j]
        tensors[name] = weight.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    change(folder, tensors, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})


def test_a_kimi_k2_in_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAXLM_CACHE", str(tmp_path / "cache"))
    original = parity.reference_model
    monkeypatch.setattr(
        parity, "reference_model", lambda raw: original(test_deepseek.reference_config(raw))
    )
    raw = dict(test_deepseek.VARIANTS["kimi"], num_nextn_predict_layers=0)
    del raw["head_dim"]
    (tmp_path / "kimi").mkdir()
    source = save_checkpoint(tmp_path / "kimi", raw)
    to_fp8(source)
    folder = convert(source, tmp_path / "q4f16_1", "q4f16_1")
    found = verify(source, folder, Thresholds(top1=0, kl=9), opt="act_quant=0")
    found.check()
    floats, stored = found.comparisons
    # The cache has latents in float16, the reference keys and values.
    assert stored.total.relative_error < 3e-3 and floats.total.relative_error > 0.1
    assert not found.weights


def test_a_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    raw = test_gpt_oss.config(hidden_size=64, num_hidden_layers=1, layer_types=["full_attention"])
    folders = [tmp_path / "packed", tmp_path / "plain"]
    packed, plain = (save_checkpoint(made, {**raw}) for made in folders if not made.mkdir())
    tensors = load_file(plain / "model.safetensors")
    codes = dict(tensors)
    rng = np.random.default_rng(0)
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors[name].shape
        groups = (experts, outputs, inputs // 32)
        blocks = rng.integers(0, 256, (*groups, 16), dtype=np.uint8)
        scales = rng.integers(118, 124, groups, dtype=np.uint8)
        del codes[name]
        codes[f"{name}_blocks"], codes[f"{name}_scales"] = map(torch.from_numpy, (blocks, scales))
        # The earlier value is in the low half of a byte.
        values = e2m1[np.stack([blocks & 15, blocks >> 4], -1)].reshape(*groups, 32)
        values *= np.float32(2.0) ** (scales.astype(np.float32) - 127)[..., None]
        matrices = values.reshape(experts, outputs, inputs).transpose(0, 2, 1)
        tensors[name] = torch.from_numpy(matrices.copy())
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    change(packed, codes, {"quant_method": "mxfp4"})
    (ours, _), (expected, _) = (Reference(made, 1).run([1, 2, 3]) for made in (packed, plain))
    np.testing.assert_array_equal(ours, expected)
