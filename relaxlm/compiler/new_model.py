"""Draft a model from a Hugging Face configuration: which family is nearest, and what is left open.

A draft is a start for a person, not a model: what could not be inferred is named, and the drafted
file refuses it until somebody has settled it.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from relaxlm import models
from relaxlm.errors import ConfigError, RelaxLMError
from relaxlm.models.config import WITHOUT_EFFECT, DecoderConfig
from relaxlm.models.weights import ParameterSpec, found_in

# Other names of our fields, besides those that some family of relaxlm spells so.
FIELDS = {
    "d_model": "hidden_size",
    "dim": "hidden_size",
    "model_dim": "hidden_size",
    "n_embd": "hidden_size",
    "d_ff": "intermediate_size",
    "ffn_dim": "intermediate_size",
    "ffn_hidden_size": "intermediate_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "n_head_kv": "num_key_value_heads",
    "n_kv_heads": "num_key_value_heads",
    "num_kv_heads": "num_key_value_heads",
    "kv_channels": "head_dim",
    "d_head": "head_dim",
    "head_size": "head_dim",
    "activation": "hidden_act",
    "activation_function": "hidden_act",
    "hidden_activation": "hidden_act",
    "layer_norm_eps": "norm_eps",
    "layer_norm_epsilon": "norm_eps",
    "norm_epsilon": "norm_eps",
    "rms_norm_eps": "norm_eps",
    "rms_norm_epsilon": "norm_eps",
    "max_seq_len": "max_position_embeddings",
    "max_sequence_length": "max_position_embeddings",
    "n_ctx": "max_position_embeddings",
    "n_positions": "max_position_embeddings",
    "seq_length": "max_position_embeddings",
    "rope_base": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
    "tie_embeddings": "tie_word_embeddings",
    "padded_vocab_size": "vocab_size",
}
# Names that checkpoints have for parts of our parameters' names.
PARTS = {
    "attn": "self_attn",
    "attention": "self_attn",
    "blocks": "layers",
    "h": "layers",
    "transformer": "model",
    "backbone": "model",
    "feed_forward": "mlp",
    "ffn": "mlp",
    "tok_embeddings": "embed_tokens",
    "word_embeddings": "embed_tokens",
    "wte": "embed_tokens",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "ln_f": "norm",
    "final_layernorm": "norm",
    "final_norm": "norm",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "out_proj": "o_proj",
    "dense": "o_proj",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
    "fc1": "up_proj",
    "fc2": "down_proj",
}
# For values that no field gives, or that a family refuses, while families are compared.
_STAND_INS = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
# Fields that are not without effect where a family fills them in.
_READ_WITH_OTHERS = {"partial_rotary_factor", "rope_theta", "sliding_window"}
# More than any likeness is worth.
_UNREADABLE = 1e6
# Layers whose tensors are compared.
_COMPARED_LAYERS = 4

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Comparison:
    """A configuration as one family reads it.

    Attributes:
        spelling: field of config.json -> our field, where the family does not know the name.
        unknown: fields that the family does not know, and that are not without effect.
        assumed: what the family fills in for fields that config.json does not have.
        refused: what the family says of values that it does not implement or does not find.
        renamed: part of a tensor's name in the family -> in the checkpoint.
        absent_tensors, unused_tensors: names, with `*` for layers, that do not meet.
        score: how near the family is; more is nearer.
    """

    family: str
    config: DecoderConfig | None
    spelling: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    absent_tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unused_tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    score: float = 0.0


def nearest_family(raw: Mapping[str, Any], where: str, tensors: Shapes | None) -> Comparison:
    """The family that a configuration of another type, and its tensors, resemble most."""
    found = [compare(family, raw, where, tensors) for family in models.MODELS]
    return max(found, key=lambda one: one.score)


def compare(
    family: str, raw: Mapping[str, Any], where: str, tensors: Shapes | None = None
) -> Comparison:
    """Read a configuration as if its model_type were `family`.

    Args:
        raw: config.json.
        where: its name, for messages.
        tensors: name -> shape of every tensor of the checkpoint.
    """
    module = import_module(f"relaxlm.models.{models.MODELS[family]}")
    kind: type[DecoderConfig] = module.Config
    result = Comparison(family, None)
    given = {kind.spelling.get(key, key) for key, value in raw.items() if value is not None}
    known = WITHOUT_EFFECT | set(kind.model_fields) | set(kind.absent) | set(kind.spelling)
    given |= set(raw.get("rope_parameters") or ())
    # Null is a value where a family has a default of its own (`q_lora_rank`).
    values = {
        key: value
        for key, value in raw.items()
        if value is not None or hasattr(kind, f"absent_{key}")
    }
    for key in values:
        ours = FIELDS.get(key)
        takes = ours in kind.model_fields or ours in known
        if key not in known | {"n_ctx"} and ours and takes and ours not in given:
            result.spelling[key] = ours
            given.add(ours)
    result.unknown = {
        key: value
        for key, value in raw.items()
        if key not in known and key not in result.spelling and value
    }
    if tensors:
        _sizes_by_shape(result, given, tensors)
    for theirs, ours in result.spelling.items():
        values[ours] = values[theirs]
        for own, ours_too in kind.spelling.items():
            if ours_too == ours:
                values.setdefault(own, values[theirs])
    result.config = _read(kind, {**values, "model_type": family}, where, result)
    result.assumed = {
        key: value
        for key, value in kind.absent.items()
        if value and kind.spelling.get(key, key) not in given and key not in given
        if key not in WITHOUT_EFFECT - _READ_WITH_OTHERS
    }
    meaningful = given & (set(kind.model_fields) | set(kind.absent))
    names = (str(raw.get("model_type")).removesuffix("_text"), family.removesuffix("_text"))
    alike = difflib.SequenceMatcher(None, *names).ratio() + 2 * names[0].startswith(names[1])
    result.score = len(meaningful) - len(result.unknown) - len(result.assumed) + 4 * alike
    result.score -= 2 * len(result.refused)
    if result.config is None:
        result.score -= _UNREADABLE
    elif tensors:
        result.score += 20 * _compare_tensors(result, result.config, module.Model, tensors)
        astray = len(result.absent_tensors) + len(result.unused_tensors)
        result.score -= 2 * astray + len(result.renamed)
    return result


def _sizes_by_shape(result: Comparison, given: set[str], tensors: Shapes) -> None:
    """Find sizes that no field of a known name gives by their values in the checkpoint."""
    embedding = max(
        (shape for name, shape in tensors.items() if len(shape) == 2 and not _layers(name)),
        default=None,
    )
    depth = max((layer + 1 for name in tensors for layer in _layers(name)[:1]), default=0)
    if embedding is None or not depth:
        return
    sizes = {
        "vocab_size": embedding[0],
        "hidden_size": embedding[1],
        "num_hidden_layers": depth,
    }
    for ours, size in sizes.items():
        same = [key for key, value in result.unknown.items() if value == size and value is not True]
        if ours not in given and len(same) == 1:
            result.spelling[same[0]] = ours
            given.add(ours)
            del result.unknown[same[0]]


def _layers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def _read(
    kind: type[DecoderConfig], values: dict[str, Any], where: str, result: Comparison
) -> DecoderConfig | None:
    """Read values; those that are refused are noted, and replaced to see the rest."""
    names = {ours: theirs for theirs, ours in kind.spelling.items()}
    for _ in range(20):
        try:
            config = kind.read(values, where)
        except RelaxLMError as error:
            message = str(error).removeprefix(f"{where}: ")
            place = re.match(r"[\w.]+", message)
            field_name = place[0].split(".")[0] if place else ""
            ours = kind.spelling.get(field_name, field_name)
            result.refused.append(message)
            if field_name in values and values[field_name] != _STAND_INS.get(ours):
                del values[field_name]
                values.pop("rope_scaling" if field_name == "rope_parameters" else "", None)
            elif ours in _STAND_INS:
                values[names.get(ours, ours)] = values[ours] = _STAND_INS[ours]
            else:
                return None
            continue
        except (TypeError, ValueError, AttributeError, KeyError):
            # A family reads some of its own fields before they are checked.
            result.refused.append(f"not readable as the configuration of {result.family}")
            return None
        depth = min(config.num_hidden_layers, _COMPARED_LAYERS)
        return config.model_copy(
            update={"num_hidden_layers": depth, "windows": config.windows[:depth]}
        )
    return None


def patterns(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """Names with `*` for numbers, of the layers that are compared."""
    found = {}
    for name, shape in shapes:
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        if numbers and int(parts[numbers[0]]) >= _COMPARED_LAYERS:
            continue
        for i in numbers:
            parts[i] = "*"
        found[".".join(parts)] = shape
    return found


def _compare_tensors(
    result: Comparison, config: DecoderConfig, model: Any, tensors: Shapes
) -> float:
    """Match tensors with what the family expects; the share of them that have the same name."""
    try:
        instance = model(config)
        specs = instance.parameter_specs()
    except (AssertionError, TypeError, ValueError, KeyError, AttributeError, RelaxLMError):
        return 0.0
    twins = [
        name
        for spec in specs
        for source in spec.sources
        for name in source.twins
        if source.found_in(tensors).name != name
    ]
    ignored = [re.compile(_as_regex(glob)) for glob in (*instance.ignored_sources(), *twins)]
    found = {
        name: shape
        for name, shape in patterns(tensors.items()).items()
        if not any(glob.fullmatch(name) for glob in ignored)
    }
    expected = _expected(specs, tensors)
    result.renamed = renamed_parts(
        {name: shape for name, shape in expected.items() if name not in found},
        {name: shape for name, shape in found.items() if name not in expected},
    )
    drafted = expected
    if result.renamed:
        names = {**model.checkpoint_names, **result.renamed}
        renamed = type("Drafted", (model,), {"checkpoint_names": names})(config)
        drafted = _expected(renamed.parameter_specs(), tensors)
    result.absent_tensors = {n: shape for n, shape in drafted.items() if n not in found}
    result.unused_tensors = {n: shape for n, shape in found.items() if n not in drafted}
    same, meet = set(expected) & set(found), set(drafted) & set(found)
    # A name that has to be mapped is less of a likeness than one that is the same.
    return (0.2 * len(same) + 0.8 * len(meet)) / len(set(drafted) | set(found))


def _expected(specs: Sequence[ParameterSpec], tensors: Shapes) -> dict[str, tuple[int, ...]]:
    return patterns(
        (source.name, source.shape) for spec in found_in(specs, tensors) for source in spec.sources
    )


def _as_regex(glob: str) -> str:
    return re.escape(glob).replace(r"\*", ".*")


def renamed_parts(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Parts of the expected names -> parts of those found, as far as they are certain.

    Certain are parts that PARTS knows, and those of tensors whose shape only one of each has.
    """
    result: dict[str, str] = {}
    contradictory: set[str] = set()
    for name, shape in expected.items():
        pairs = {
            other: _differences(name, other) for other, there in found.items() if there == shape
        }
        known = [
            difference
            for difference in pairs.values()
            if difference is not None
            and all(PARTS.get(theirs.split(".")[-1]) == ours for ours, theirs in difference.items())
        ]
        alone = list(expected.values()).count(shape) == 1 and len(pairs) == 1
        chosen = known[0] if len(known) == 1 else next(iter(pairs.values())) if alone else None
        for ours, theirs in (chosen or {}).items():
            if result.setdefault(ours, theirs) != theirs:
                contradictory.add(ours)
    return {ours: theirs for ours, theirs in result.items() if ours not in contradictory}


def _differences(ours: str, theirs: str) -> dict[str, str] | None:
    """Parts of two names that differ; the first part stands for all that one has more of."""
    first, second = ours.split("."), theirs.split(".")
    more = len(first) - len(second)
    if more > 0:
        first = [".".join(first[: more + 1]), *first[more + 1 :]]
    elif more < 0:
        second = [".".join(second[: 1 - more]), *second[1 - more :]]
    pairs = {one: other for one, other in zip(first, second, strict=True) if one != other}
    return None if "*" in pairs or "weight" in pairs or "bias" in pairs else pairs


def text_part(raw: Mapping[str, Any], where: str) -> tuple[dict[str, Any], bool]:
    """The configuration of the language model, and whether it was inside of another.

    Raises:
        ConfigError: no model_type.
    """
    if not isinstance(raw.get("model_type"), str):
        raise ConfigError(
            f"{where}: model_type is missing. Is this the config.json of a Hugging Face model?"
        )
    inner = raw.get("text_config")
    if not isinstance(inner, dict):
        return dict(raw), False
    return {"model_type": f"{raw['model_type']}_text", **inner}, True
