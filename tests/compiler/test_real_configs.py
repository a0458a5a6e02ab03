"""Real configurations export, quantize and lower, at their full width and with two layers.

Depth only repeats kernels; `relaxlm estimate` on the full configuration was run by hand.
"""

import json

import pytest

from relaxlm import models
from relaxlm.compiler.build import describe_model
from relaxlm.compiler.options import CompileOptions
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.schemes import get_scheme
from tests.shared_data import SHARED, needs_shared_data


def real_configs() -> dict[str, dict]:
    """Name -> config.json of every supported architecture, one of each shape."""
    found: dict[str, dict] = {}
    for path in sorted((SHARED / "configs").glob("*.json")) if SHARED.is_dir() else []:
        raw = json.loads(path.read_text())
        if isinstance(raw, dict) and raw.get("model_type") in models.MODELS:
            raw["num_hidden_layers"] = 2
            raw.pop("layer_types", None)
            if models.load_config(raw) not in [
                models.load_config(other) for other in found.values()
            ]:
                found[path.stem] = raw
    return found


CONFIGS = real_configs()


@needs_shared_data
@pytest.mark.parametrize("name", CONFIGS)
def test_real_configuration_lowers(name: str) -> None:
    raw, scheme = CONFIGS[name], get_scheme("q4f16_1")
    config = models.load_config(raw)
    options = CompileOptions.resolve(config, scheme)
    info = describe_model(config, raw, scheme, resolve_device("cpu"), options)
    hidden, layers, vocab = config.hidden_size, config.num_hidden_layers, config.vocab_size
    width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    matrices = layers * (
        hidden * (width + 2 * kv_width) + width * hidden + 3 * hidden * config.intermediate_size
    ) + vocab * hidden * (1 if config.tie_word_embeddings else 2)
    vectors = sum(p.shape[0] for p in info.params if len(p.shape) == 1)
    # 4 bits and a 16-bit scale for every 32 weights; norms and biases in 16 bits.
    assert info.memory.params == matrices * 4.5 / 8 + vectors * 2
    assert info.kv_cache.bytes_per_token == layers * 2 * kv_width * 2
