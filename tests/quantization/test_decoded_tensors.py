"""FP8 and MXFP4 tensors stand for the values that their formats define, for every code."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from relaxlm.errors import CheckpointError
from relaxlm.models.weights import ParameterSpec, Source
from relaxlm.quantization.convert import convert_weights, open_float_checkpoint
from relaxlm.quantization.decoded_tensors import E2M1, E4M3, E8M0
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.params import WeightFolder

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}


def checkpoint(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def small_float(code: int) -> float:
    """A code e2m1 by its bits: sign, two of the exponent, whose bias is 1, one of the fraction."""
    sign, exponent, fraction = code >> 3, code >> 1 & 3, code & 1
    magnitude = (1 + fraction / 2) * 2.0 ** (exponent - 1) if exponent else fraction / 2
    return -magnitude if sign else magnitude


def test_every_code_has_the_value_of_its_bits() -> None:
    np.testing.assert_array_equal(E2M1, [small_float(code) for code in range(16)])
    assert str(E2M1[8]) == "-0.0"
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(E8M0, expected)
    assert np.isnan(expected[255]) and expected[127] == 1
    fp8 = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    np.testing.assert_array_equal(E4M3, fp8.numpy())


def test_mxfp4_matrices_are_the_transposed_ones_of_float_checkpoints(tmp_path: Path) -> None:
    """Every byte under many scales, exactly; and the same tensor as transformers makes of it."""
    experts, rows, groups = 3, 40, 4
    rng = np.random.default_rng(0)
    # Each byte comes many times, a group has different ones.
    bytes_ = np.stack([rng.permutation(256) for _ in range(experts * rows * groups // 16)])
    blocks = bytes_.astype(np.uint8).reshape(experts, rows, groups, 16)
    scales = rng.integers(0, 253, (experts, rows, groups), dtype=np.uint8)
    tensors = {
        "a_blocks": torch.from_numpy(blocks),
        "a_scales": torch.from_numpy(scales),
        "b": torch.ones(2, dtype=torch.bfloat16),
    }
    opened = open_float_checkpoint(checkpoint(tmp_path, MXFP4, tensors))
    assert opened.names() == {"a": ((3, 128, 40), "float32"), "b": ((2,), "bfloat16")}
    expected = np.empty((experts, groups * 32, rows), np.float64)
    for e, n, g, byte in np.ndindex(blocks.shape):
        code, power = int(blocks[e, n, g, byte]), 2.0 ** (int(scales[e, n, g]) - 127)
        for i, half in enumerate((code & 15, code >> 4)):
            expected[e, g * 32 + byte * 2 + i, n] = small_float(half) * power
    found = opened.read("a")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)  # exactly: NumPy compares in float64
    np.testing.assert_array_equal(opened.tensors["a"].part(2), expected[2])
    np.testing.assert_array_equal(
        opened.tensors["a"].read(5000, 5300), found.reshape(-1)[5000:5300]
    )
    theirs = convert_moe_packed_tensors(
        tensors["a_blocks"], tensors["a_scales"], dtype=torch.float32
    )
    np.testing.assert_array_equal(found, theirs.numpy())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_blocks(scale_dtype: torch.dtype, tmp_path: Path) -> None:
    """Blocks of rows and columns, the last of each partly filled, in matrices and in stacks."""
    rng = np.random.default_rng(0)
    codes = rng.permutation(np.arange(300 * 200, dtype=np.uint32) % 256).astype(np.uint8)
    codes[codes & 127 == 127] = 1  # NaN
    codes = codes.reshape(300, 200)
    scale = torch.from_numpy(rng.uniform(0.5, 2, (3, 2)).astype(np.float32)).to(scale_dtype)
    stack, more = codes.reshape(2, 150, 200), torch.from_numpy(rng.uniform(0.5, 2, (2, 2, 2)))
    tensors = {
        "w": torch.from_numpy(codes).view(torch.float8_e4m3fn),
        "w_scale_inv": scale,
        "s": torch.from_numpy(stack.copy()).view(torch.float8_e4m3fn),
        "s_scale_inv": more,
    }
    opened = open_float_checkpoint(checkpoint(tmp_path, FP8, tensors))
    assert opened.names() == {"w": ((300, 200), "float32"), "s": ((2, 150, 200), "float32")}

    def expected(codes: np.ndarray, scale: torch.Tensor) -> np.ndarray:
        values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        factor = scale.float().numpy()
        for n, k in np.ndindex(values.shape):
            values[n, k] *= factor[n // 128, k // 128]
        return values

    whole = expected(codes, scale)
    np.testing.assert_array_equal(opened.read("w"), whole)
    np.testing.assert_array_equal(
        opened.tensors["w"].read(130, 51_234), whole.reshape(-1)[130:51_234]
    )
    np.testing.assert_array_equal(opened.read("s"), [expected(stack[i], more[i]) for i in range(2)])
    np.testing.assert_array_equal(opened.tensors["s"].part(1), expected(stack[1], more[1]))


def test_conversion_reads_one_expert_at_a_time(tmp_path: Path) -> None:
    """A parameter of an expert each from one tensor, transposed or as it is."""
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (2, 6, 2, 16), dtype=np.uint8)
    scales = rng.integers(120, 130, (2, 6, 2), dtype=np.uint8)
    plain = rng.uniform(1, 2, (2, 6, 64)).astype(np.float32)
    folder = checkpoint(
        tmp_path / "in",
        MXFP4,
        {
            "m_blocks": torch.from_numpy(blocks),
            "m_scales": torch.from_numpy(scales),
            "p": torch.from_numpy(plain),
        },
    )

    def spec(name: str, shape: tuple[int, ...], view=None) -> ParameterSpec:
        sources = tuple(Source(name, shape, view=view, index=i) for i in range(2))
        return ParameterSpec(f"{name}.weight", (2, 6, 64), "expert", sources)

    specs = [spec("m", (2, 64, 6), np.transpose), spec("p", (2, 6, 64))]
    progress: list[tuple[int, int]] = []
    convert_weights(
        folder, get_scheme("q0f32"), tmp_path / "out", specs,
        progress=lambda done, total, name: progress.append((done, total)),
    )  # fmt: skip
    weights, opened = WeightFolder(tmp_path / "out"), open_float_checkpoint(folder)
    np.testing.assert_array_equal(weights.load("m.weight"), opened.read("m").transpose(0, 2, 1))
    np.testing.assert_array_equal(weights.load("p.weight"), plain)
    assert progress[-1] == (blocks.nbytes + plain.nbytes,) * 2


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (
            FP8,
            {"w": ((300, 200), torch.float8_e4m3fn), "w_scale_inv": ((3, 1), torch.float32)},
            r"tensor w_scale_inv has shape \[3, 1\], expected \[3, 2\]: a scale for every "
            r"128 x 128 weights of w \[300, 200\]",
        ),
        (
            FP8,
            {"w": ((300,), torch.float8_e4m3fn), "w_scale_inv": ((3,), torch.float32)},
            r"tensor w_scale_inv has shape \[3\]",
        ),
        ({}, {"w": ((8, 8), torch.float8_e4m3fn), "w_scale_inv": ((1, 1), torch.float32)}, "FP8"),
        (FP8, {"w": ((8, 8), torch.float8_e4m3fn)}, "tensor w .* shows weights .*FP8"),
        (
            MXFP4,
            {"w_blocks": ((2, 8, 3, 16), torch.uint8), "w_scales": ((2, 8), torch.uint8)},
            r"tensors w_blocks \[2, 8, 3, 16\] and w_scales uint8 \[2, 8\] do not fit each other",
        ),
    ],
)
def test_what_does_not_fit_is_refused(config, tensors, message, tmp_path: Path) -> None:
    made = {name: torch.zeros(shape).to(dtype) for name, (shape, dtype) in tensors.items()}
    with pytest.raises(CheckpointError, match=message):
        open_float_checkpoint(checkpoint(tmp_path, config, made))
