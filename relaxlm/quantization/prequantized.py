"""Recognise checkpoints that somebody has quantized already, and refuse them by name.

Quantizing such weights again would store their packed integers as if they were values. Formats that
`decoded_tensors` reads pass: FP8 with a scale per block, and MXFP4.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relaxlm.errors import CheckpointError
from relaxlm.files import read_json_object
from relaxlm.quantization.stored_tensor import StoredTensor

_ADVICE = (
    "expected float16, bfloat16, float32 or float64 weights; "
    "convert the model that it was quantized from"
)

_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "finegrained_fp8": "FP8",
    "modelopt": "NVIDIA ModelOpt",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "aqlm": "AQLM",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "quanto": "Quanto",
    "quark": "AMD Quark",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}

# Endings of tensor names that only one kind of quantized checkpoint has. The first that fits wins.
_ENDINGS = (
    (".g_idx", "GPTQ"),
    (".qweight", "GPTQ or AWQ"),
    (".SCB", "bitsandbytes, 8 bits"),
    (".absmax", "bitsandbytes, 4 bits"),
    (".quant_map", "bitsandbytes, 4 bits"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_inv", "FP8 with a scale per block"),
    (".weight_scale_2", "NVFP4"),
    (".weight_scale", "FP8 or compressed-tensors"),
    ("_blocks", "MXFP4"),
    (".codebooks", "AQLM"),
    (".W_q", "HQQ"),
)


def refuse_by_files(folder: Path) -> None:
    """Raise CheckpointError if config.json or a file beside it says that weights are quantized."""
    _check_config(folder / "config.json")
    for name, method in (
        ("hf_quant_config.json", "NVIDIA ModelOpt"),
        ("quantize_config.json", "GPTQ"),
        ("quant_config.json", "AWQ"),
    ):
        if (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name}: the weights are already quantized ({method}); {_ADVICE}"
            )


def refuse_by_tensors(tensors: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError if names or dtypes of a checkpoint's tensors show quantized weights."""
    for tensor in tensors.values():
        found = _kind_of(tensor, tensors)
        if found:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} ({tensor.dtype} {list(tensor.shape)}) "
                f"shows weights that are already quantized ({found}); {_ADVICE}"
            )


def _check_config(path: Path) -> None:
    if not path.is_file():
        return
    config = read_json_object(path, CheckpointError)
    nested = [value for value in config.values() if isinstance(value, dict)]
    for fields in (config, *nested):  # a multimodal model keeps its text model's in text_config
        for key in ("quantization_config", "compression_config", "quantization"):
            settings = fields.get(key)
            if isinstance(settings, dict) and settings and not _is_decoded(settings):
                raise CheckpointError(
                    f"{path}: {key} says that the weights are already quantized "
                    f"({_describe(key, settings)}); {_ADVICE}"
                )


def _is_decoded(settings: dict[str, Any]) -> bool:
    """Whether the weights are in a format that is read; their tensors have to show it, too."""
    method = settings.get("quant_method")
    return method == "mxfp4" or (method == "fp8" and bool(settings.get("weight_block_size")))


def _describe(key: str, settings: dict[str, Any]) -> str:
    method = settings.get("quant_method") or settings.get("quant_algo")
    if method is None and key == "quantization":
        method = "MLX"
    name = "method not named" if method is None else _METHODS.get(str(method).lower(), str(method))
    bits = settings.get("bits", settings.get("w_bit"))
    if settings.get("load_in_4bit"):
        bits = 4
    elif settings.get("load_in_8bit"):
        bits = 8
    return name if bits is None else f"{name}, {bits} bits"


def _kind_of(tensor: StoredTensor, tensors: Mapping[str, StoredTensor]) -> str | None:
    name = tensor.name
    if name.endswith(".qweight"):
        return _gptq_or_awq(tensor, tensors)
    if ".quant_state." in name:
        return "bitsandbytes, 4 bits"
    if tensor.dtype.startswith("float8_"):
        return "FP8"
    if tensor.dtype.startswith(("F4", "F6", "F8")):
        return f"number format {tensor.dtype}"
    if name.endswith(".weight") and tensor.dtype == "uint32":
        stem = name.removesuffix("weight")
        if f"{stem}scales" in tensors:
            return "MLX"
    for ending, method in _ENDINGS:
        if name.endswith(ending):
            if ending == "_blocks" and f"{name.removesuffix(ending)}_scales" not in tensors:
                continue
            return method
    return None


def _gptq_or_awq(weight: StoredTensor, tensors: Mapping[str, StoredTensor]) -> str:
    """GPTQ packs along the input, AWQ along the output; the scales have one column per output."""
    stem = weight.name.removesuffix("qweight")
    scales = tensors.get(f"{stem}scales")
    if f"{stem}g_idx" in tensors:
        return "GPTQ"
    if scales is None or len(scales.shape) != 2 or len(weight.shape) != 2:
        return "GPTQ or AWQ"
    return "GPTQ" if weight.shape[1] == scales.shape[1] else "AWQ"
