"""What there are no shaders for."""

from relaxlm.errors import UnsupportedError
from relaxlm.models.config import DecoderConfig
from relaxlm.quantization.schemes import Scheme


def refuse_for_webgpu(config: DecoderConfig, scheme: Scheme) -> None:
    """Refuse models and presets that cannot be compiled for WebGPU.

    Raises:
        UnsupportedError: says why, and what to do instead.
    """
    for what, found in (
        ("an encoder's attention", config.is_encoder),
        ("mixtures of experts", getattr(config, "num_experts", None)),
        ("latent attention", config.latent_cache is not None),
    ):
        if found:
            raise UnsupportedError(
                f"{config.model_type}: {what} is not supported on webgpu. Compile for the CPU: "
                "--device wasm in browsers, --device cpu elsewhere"
            )
    if scheme.dtype == "bfloat16":
        raise UnsupportedError(
            f"quantization {scheme.name} is not supported on webgpu, whose shaders have no "
            "bfloat16. Use a preset in float16 or float32, such as q4f16_1"
        )
