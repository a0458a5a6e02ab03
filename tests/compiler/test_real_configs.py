"""Real configurations export, quantize and lower, or are refused by name.

They keep their full width and have two layers, or one of each kind: depth only repeats kernels.
`relaxlm estimate` on the full configuration was run by hand. `pytest -s` prints the table.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import get_args

import pytest

from relaxlm import models
from relaxlm.compiler.build import describe_model
from relaxlm.compiler.options import CompileOptions
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import UnsupportedError
from relaxlm.files import format_bytes
from relaxlm.models.weights import Role
from relaxlm.quantization.schemes import get_scheme
from tests.shared_data import SHARED, needs_shared_data

# What the depth is called.
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# One entry per layer.
PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")
# Families whose only matrices are q, k, v, o, gate, up, down, embedding and head.
PLAIN = {"llama", "mistral", "qwen2", "qwen3"}
# Whose kernels are there for CPUs only, so far.
NOT_ON_CUDA: set[str] = set()


def shallow(raw: Mapping) -> dict:
    """A configuration with one layer of each kind, and at least two."""
    raw = {
        key: shallow(value) if key == "text_config" else value
        for key, value in raw.items()
        if value is not None
    }
    columns = [raw[key] for key in PER_LAYER if isinstance(raw.get(key), list)]
    kinds = list(zip(*columns, strict=False)) if columns else []
    kept = sorted({kinds.index(kind) for kind in kinds})
    if len(kept) < 2:
        kept = [0, 1]
    for key in PER_LAYER:
        if isinstance(raw.get(key), list):
            raw[key] = [raw[key][i] for i in kept]
    for key in DEPTHS:
        if key in raw:
            raw[key] = len(kept)
    if raw.get("first_k_dense_replace"):  # one layer without experts, and one with
        raw["first_k_dense_replace"] = 1
    return raw


def real_configs() -> dict[str, dict]:
    """Name -> config.json, of files that are one."""
    found: dict[str, dict] = {}
    for path in sorted((SHARED / "configs").glob("*.json")) if SHARED.is_dir() else []:
        raw = json.loads(path.read_text())
        if isinstance(raw, dict) and "model_type" in raw:
            found[path.stem] = shallow(raw)
    return found


CONFIGS = real_configs()
# One configuration per family is lowered for CUDA, too.
FIRST = {raw["model_type"]: name for name, raw in reversed(CONFIGS.items())}


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Rows that are printed when all configurations are done."""
    rows: list[str] = []
    yield rows
    print("", f"{'configuration':44} {'model_type':16} two layers in q4f16_1", *rows, sep="\n")


def weights(raw: Mapping) -> int:
    """How many weights the matrices of a plain model have."""
    config = models.load_config(raw)
    hidden, layers, vocab = config.hidden_size, config.num_hidden_layers, config.vocab_size
    width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    return layers * (
        hidden * (width + 2 * kv_width) + width * hidden + 3 * hidden * config.intermediate_size
    ) + vocab * hidden * (1 if config.tie_word_embeddings else 2)


@needs_shared_data
@pytest.mark.parametrize("name", CONFIGS)
def test_real_configuration_lowers_or_is_refused_by_name(name: str, table: list[str]) -> None:
    raw, scheme = CONFIGS[name], get_scheme("q4f16_1")
    row = f"{name:44} {raw['model_type']:16}"
    try:
        config = models.load_config(raw)
    except UnsupportedError as error:
        message = str(error)
        table.append(f"{row} refused: {message.split(' Supported:')[0]}")
        assert raw["model_type"] not in models.MODELS or names_a_field(message, raw), message
        assert raw["model_type"] in models.MODELS or repr(raw["model_type"]) in message, message
        return
    options = CompileOptions.resolve(config, scheme)
    info = describe_model(config, raw, scheme, resolve_device("cpu"), options)
    table.append(
        f"{row} weights {format_bytes(info.memory.params)}, step "
        f"{format_bytes(info.memory.temporary['forward'])}, cpu"
    )
    # Every matrix is stored in 4 bits and a 16-bit scale for 32 weights; norms and biases, and
    # what the scheme leaves alone, in 16 bits.
    specs = models.parameter_specs(config)
    counts = dict.fromkeys(get_args(Role), 0)
    for spec in specs:
        counts[spec.role] += math.prod(spec.shape)
    whole = counts.pop("vector") * 2 + counts.pop("float32") * 4
    assert info.memory.params == pytest.approx(sum(counts.values()) * 4.5 / 8 + whole, rel=0.02)
    if raw["model_type"] in PLAIN:
        assert sum(counts.values()) == weights(raw)
        kv_width = config.num_key_value_heads * config.head_dim
        assert info.kv_cache.bytes_per_token == config.num_hidden_layers * 2 * kv_width * 2
    if FIRST[raw["model_type"]] == name:
        try:
            cuda = describe_model(config, raw, scheme, resolve_device("cuda", "sm_90"), options)
        except UnsupportedError as error:
            assert raw["model_type"] in NOT_ON_CUDA, error
            table[-1] += f"; cuda: {error}"
            return
        assert raw["model_type"] not in NOT_ON_CUDA
        assert cuda.target.kind == "cuda"
        assert cuda.memory.params == info.memory.params
        table[-1] += " and cuda sm_90"


def names_a_field(message: str, raw: Mapping) -> bool:
    """Whether a message says which field of config.json is in the way."""
    inner = raw.get("text_config") or {}
    return any(key in message for key in (*raw, *inner) if key != "model_type")


def test_one_layer_of_each_kind_is_kept() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    raw = shallow({"text_config": {"num_hidden_layers": 12, "layer_types": kinds * 2}})
    assert raw["text_config"] == {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    assert shallow({"n_layer": 24, "n_head": 2}) == {"n_layer": 2, "n_head": 2}
