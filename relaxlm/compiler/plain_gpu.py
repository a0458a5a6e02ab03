"""What plain kernels for GPUs cannot do: those of WebGPU, Metal, OpenCL and ROCm.

They are loop nests that TVM schedules for any GPU, and those of `kernels/gpu_*.py`.
"""

from relaxlm.compiler.kernels.gpu_attention import CACHE_DTYPES, MAX_HEAD_DIM
from relaxlm.errors import UnsupportedError
from relaxlm.models.config import DecoderConfig
from relaxlm.quantization.kv_cache import KVFormat
from relaxlm.quantization.schemes import Scheme


def refuse_for_plain_gpu(
    config: DecoderConfig, scheme: Scheme, cache: KVFormat, device: str
) -> None:
    """Refuse models, presets and caches that there are no plain kernels for.

    Args:
        device: its kind, for messages.

    Raises:
        UnsupportedError: says why, and what to do instead.
    """
    cpu = "--device wasm in browsers, --device cpu elsewhere"
    cpu = cpu if device == "webgpu" else "--device cpu"
    if config.head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"{config.model_type}: head_dim = {config.head_dim} is not supported on {device}: "
            f"its kernels go up to {MAX_HEAD_DIM}. Compile for the CPU: {cpu}"
        )
    if scheme.dtype == "bfloat16":
        raise UnsupportedError(
            f"quantization {scheme.name} is not supported on {device}, for which there are no "
            "kernels in bfloat16. Use a preset in float16 or float32, such as q4f16_1"
        )
    if not config.is_encoder and cache.dtype not in CACHE_DTYPES:
        raise UnsupportedError(
            f"kv_cache_dtype = {cache.name} is not supported on {device}: its kernels have float16 "
            'and float32. Use --overrides "kv_cache_dtype=float16"'
        )
