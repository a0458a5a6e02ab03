"""The architectures relaxlm compiles: a table, and the functions that read it.

Importing this package is cheap; an architecture's file, and TVM with it, is imported on use.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.files import read_json_object
from relaxlm.models.task import is_for_embeddings

if TYPE_CHECKING:
    from relaxlm.models.base import CausalLM
    from relaxlm.models.config import DecoderConfig
    from relaxlm.models.weights import ParameterSpec

# model_type of config.json -> module of this package. One line per architecture.
MODELS = {
    "apertus": "apertus",
    "baichuan": "baichuan",
    "bert": "bert",
    "bloom": "bloom",
    "chatglm": "chatglm",
    "cohere": "cohere",
    "cohere2": "cohere2",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "dots1": "dots1",
    "ernie4_5": "ernie4_5",
    "ernie4_5_moe": "ernie4_5_moe",
    "exaone4": "exaone4",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "glm": "glm",
    "glm4": "glm4",
    "glm4_moe": "glm4_moe",
    "gpt2": "gpt2",
    "gpt_bigcode": "gpt_bigcode",
    "gpt_neox": "gpt_neox",
    "gpt_oss": "gpt_oss",
    "gptj": "gptj",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "granitemoehybrid": "granitemoehybrid",
    "hunyuan_v1_dense": "hunyuan_v1_dense",
    "internlm2": "internlm2",
    "kimi_k2": "deepseek_v3",
    "lfm2": "lfm2",
    "llama": "llama",
    "llama4": "llama4",
    "llama4_text": "llama4",
    "mamba2": "mamba2",
    "mimo": "mimo",
    "minicpm": "minicpm",
    "minimax_m2": "minimax_m2",
    "ministral3": "ministral3",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "mpt": "mpt",
    "nemotron": "nemotron",
    "nemotron_h": "nemotron_h",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "olmo3": "olmo3",
    "olmoe": "olmoe",
    "opt": "opt",
    "orion": "orion",
    "phi": "phi",
    "phi3": "phi3",
    "phimoe": "phimoe",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5_moe",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_5_text": "qwen3_5",
    "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "roberta": "roberta",
    "rwkv5": "rwkv5",
    "rwkv6": "rwkv6",
    "rwkv7": "rwkv7",
    "seed_oss": "seed_oss",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "xlm-roberta": "roberta",
}

# Types that people will try, and what keeps them from being compiled.
MISSING_FEATURES = {
    "deepseek_v32": "sparse attention, whose indexer chooses the tokens to attend to (index_topk)",
    "glm_moe_dsa": "sparse attention, whose indexer chooses the tokens to attend to (index_topk)",
}


def load_config(
    source: Path | str | Mapping[str, Any], model_task: str | None = None
) -> "DecoderConfig":
    """Read and check a model's configuration.

    Args:
        source: a folder with config.json, the path of config.json or mlc-chat-config.json, or the
            contents of either.
        model_task: "chat" or "embedding"; what the folder says it is for if None.

    Raises:
        UnsupportedError: an architecture or a value that relaxlm does not implement.
        ConfigError: a file that is missing, malformed or incomplete.
    """
    raw, where = raw_config(source, model_task)
    return _module(raw, where).Config.read(raw, where)


def raw_config(
    source: Path | str | Mapping[str, Any], model_task: str | None = None
) -> tuple[dict[str, Any], str]:
    """The fields of config.json as written, and the name of the file for messages.

    A decoder for embeddings has the field `model_task`, too, which is no field of config.json:
    sentence-transformers' files beside it say so, or mlc-chat-config.json does.
    """
    if isinstance(source, Mapping):
        raw, where = dict(source), "config.json"
    else:
        path = Path(source)
        if path.is_dir():
            found = [path / name for name in ("config.json", "mlc-chat-config.json")]
            path = next((file for file in found if file.is_file()), found[0])
        if not path.is_file():
            raise ConfigError(
                f"{path}: no such file, expected a model folder with config.json in it"
            )
        raw, where = read_json_object(path, ConfigError), str(path)
        if is_for_embeddings(path.parent):
            raw.setdefault("model_task", "embedding")
    if "model_config" in raw:
        if not isinstance(raw["model_config"], dict):
            raise ConfigError(f"{where}: model_config is not a JSON object")
        outer = {key: raw.get(key) for key in ("model_type", "model_task")}
        raw = _without_mlc_spelling({**outer, **raw["model_config"]})
    found = raw.pop("model_task", None)
    if (model_task or found) == "embedding":
        raw["model_task"] = "embedding"
    return raw, where


def _without_mlc_spelling(raw: dict[str, Any]) -> dict[str, Any]:
    """The `model_config` of folders published for MLC and WebLLM, spelled as in config.json.

    Those tools write what their model definition reads: the base of the rotary embedding under
    """
    if "position_embedding_base" not in raw:
        return raw
    raw = dict(raw)
    raw.setdefault("rope_theta", raw.pop("position_embedding_base"))
    if (raw.get("context_window_size") or 0) > 0:
        raw.setdefault("max_position_embeddings", raw["context_window_size"])
    return raw


def create(config: "DecoderConfig", dtype: str = "float32") -> "CausalLM":
    """The model as an `nn.Module` whose parameters and activations have `dtype`."""
    model = import_module(f"relaxlm.models.{MODELS[config.model_type]}").Model(config)
    model.to(dtype)
    return model


def parameter_specs(config: "DecoderConfig") -> "list[ParameterSpec]":
    """Every parameter in model order, with the checkpoint tensors it is made of."""
    return create(config).parameter_specs()


def ignored_sources(config: "DecoderConfig") -> tuple[str, ...]:
    """fnmatch patterns of checkpoint tensors that may stay unused."""
    return create(config).ignored_sources()


def _module(raw: Mapping[str, Any], where: str) -> Any:
    model_type = raw.get("model_type")
    if model_type is None:
        raise ConfigError(
            f"{where}: model_type is missing. Is this the config.json of a Hugging Face model?"
        )
    if model_type not in MODELS:
        missing = MISSING_FEATURES.get(model_type)
        reason = f": it has {missing}" if missing else ""
        raise UnsupportedError(
            f"{where}: model_type {model_type!r} is not supported{reason}. "
            f"Supported: {', '.join(MODELS)}"
        )
    return import_module(f"relaxlm.models.{MODELS[model_type]}")
