import json
from pathlib import Path

import pytest

from relaxlm.errors import CheckpointError
from relaxlm.quantization.prequantized import refuse_by_files, refuse_by_tensors
from relaxlm.quantization.stored_tensor import StoredTensor
from tests.shared_data import SHARED, needs_shared_data

ADVICE = (
    "expected float16, bfloat16, float32 or float64 weights; "
    "convert the model that it was quantized from"
)


@pytest.mark.parametrize(
    "config, found",
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ, 4 bits"),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 4}}, "AWQ, 4 bits"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "bitsandbytes, 4 bits",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "bitsandbytes, 8 bits",
        ),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "fp8"}}, "FP8"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ({"quantization_config": {"quant_method": "brand-new"}}, "brand-new"),
        ({"quantization_config": {"foo": 1}}, "method not named"),
    ],
)
def test_config_json_tells(tmp_path: Path, config: dict, found: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **config}))
    with pytest.raises(CheckpointError) as caught:
        refuse_by_files(tmp_path)
    assert str(caught.value) == (
        f"{path}: quantization_config says that the weights are already quantized ({found}); "
        f"{ADVICE}"
    )


@pytest.mark.parametrize(
    "config, key, found",
    [
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config", ""),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization", "MLX, 4 bits"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, None, "FP8"),
    ],
)
def test_other_places_of_config_json_tell(
    tmp_path: Path, config: dict, key: str | None, found: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        refuse_by_files(tmp_path)
    assert str(caught.value) == (
        f"{path}: {key or 'quantization_config'} says that the weights are already quantized "
        f"({found or 'compressed-tensors'}); {ADVICE}"
    )


@pytest.mark.parametrize(
    "name, method",
    [
        ("hf_quant_config.json", "NVIDIA ModelOpt"),
        ("quantize_config.json", "GPTQ"),
        ("quant_config.json", "AWQ"),
    ],
)
def test_files_beside_it_tell(tmp_path: Path, name: str, method: str) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": null}')
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        refuse_by_files(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / name}: the weights are already quantized ({method}); {ADVICE}"
    )


def test_an_ordinary_folder_passes(tmp_path: Path) -> None:
    refuse_by_files(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "rope_scaling": {"bits": 1}}')
    refuse_by_files(tmp_path)


Q = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "tensors, shown, found",
    [
        (
            {".qweight": ((8, 64), "int32"), ".g_idx": ((64,), "int32")},
            ".qweight",
            "GPTQ",
        ),
        (
            {".qweight": ((8, 64), "int32"), ".scales": ((2, 64), "float16")},
            ".qweight",
            "GPTQ",
        ),
        (
            {".qweight": ((64, 8), "int32"), ".scales": ((2, 64), "float16")},
            ".qweight",
            "AWQ",
        ),
        ({".qweight": ((64, 8), "int32")}, ".qweight", "GPTQ or AWQ"),
        (
            {".weight": ((64, 8), "int8"), ".SCB": ((64,), "float32")},
            ".SCB",
            "bitsandbytes, 8 bits",
        ),
        (
            {".weight": ((99, 1), "uint8"), ".weight.absmax": ((4,), "uint8")},
            ".weight.absmax",
            "bitsandbytes, 4 bits",
        ),
        (
            {".weight.quant_state.bitsandbytes__nf4": ((4,), "uint8")},
            ".weight.quant_state.bitsandbytes__nf4",
            "bitsandbytes, 4 bits",
        ),
        ({".weight_packed": ((8, 8), "int32")}, ".weight_packed", "compressed-tensors"),
        (
            {".weight_scale_inv": ((1, 1), "float32"), ".weight": ((8, 8), "float8_e4m3fn")},
            ".weight_scale_inv",
            "FP8 with a scale per block",
        ),
        ({".weight": ((8, 8), "float8_e4m3fn")}, ".weight", "FP8"),
        ({".weight_scale": ((1,), "float32")}, ".weight_scale", "FP8 or compressed-tensors"),
        ({".weight_scale_2": ((), "float32")}, ".weight_scale_2", "NVFP4"),
        (
            {"_blocks": ((2, 8, 16), "uint8"), "_scales": ((2, 8), "uint8")},
            "_blocks",
            "MXFP4",
        ),
        ({".weight": ((8, 8), "F4")}, ".weight", "number format F4"),
        (
            {".weight": ((8, 8), "uint32"), ".scales": ((8, 1), "float16")},
            ".weight",
            "MLX",
        ),
    ],
)
def test_tensors_tell(tensors: dict, shown: str, found: str) -> None:
    stored = {
        Q + ending: StoredTensor(Q + ending, shape, dtype, Path("m.safetensors"), 0)
        for ending, (shape, dtype) in tensors.items()
    }
    shape, dtype = tensors[shown]
    with pytest.raises(CheckpointError) as caught:
        refuse_by_tensors(stored)
    assert str(caught.value) == (
        f"m.safetensors: tensor {Q}{shown} ({dtype} {list(shape)}) shows weights that are already "
        f"quantized ({found}); {ADVICE}"
    )


def test_ordinary_tensors_pass() -> None:
    names = [
        "a.weight",
        "a.bias",
        "rotary_emb.inv_freq",
        "attn.masked_bias",
        "conv_blocks",
        "x.A_log",
    ]
    file = Path("m.safetensors")
    refuse_by_tensors({name: StoredTensor(name, (2, 2), "float16", file, 0) for name in names})


@needs_shared_data
@pytest.mark.parametrize(
    "name, found",
    [
        ("Llama-3.1-70B-Instruct-FP8.hf_quant_config.json", "NVIDIA ModelOpt"),
    ],
)
def test_real_configurations_tell(tmp_path: Path, name: str, found: str) -> None:
    file = "hf_quant_config.json" if "hf_quant_config" in name else "config.json"
    (tmp_path / file).write_bytes((SHARED / "configs" / name).read_bytes())
    with pytest.raises(CheckpointError, match=rf"already quantized \({found}"):
        refuse_by_files(tmp_path)


@needs_shared_data
@pytest.mark.parametrize(
    "name",
    [
        "Qwen3-0.6B.json",
        "Llama-3.2-1B-Instruct.json",
        "Qwen3-30B-A3B-FP8.json",
        "DeepSeek-V3.json",
        "MiniMax-M2.5.json",
        "gpt-oss-20b.json",
    ],
)
def test_real_configurations_that_are_read_pass(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_bytes((SHARED / "configs" / name).read_bytes())
    refuse_by_files(tmp_path)
