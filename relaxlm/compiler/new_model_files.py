"""The text of the files that `relaxlm new-model` drafts, as `ruff format` leaves them."""

import json
import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relaxlm import models
from relaxlm.compiler.new_model import FIELDS, Comparison, Shapes, nearest_family, text_part
from relaxlm.errors import ConfigError
from relaxlm.models.config import WITHOUT_EFFECT, DecoderConfig, unknown_fields

WIDTH = 100
# Sizes of the tiny model in the drafted test, as in tests/models/parity.py.
TINY = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 64,
    "sliding_window": 21,
    "max_window_layers": 1,
}
# Of the fields that do not change the result by themselves, those that others are read with.
_TOLD = {
    *("layer_types", "max_window_layers", "model_type", "original_max_position_embeddings"),
    *("partial_rotary_factor", "rope_parameters", "rope_scaling", "rope_theta"),
    *("sliding_window", "use_sliding_window"),
}
# Ids that are inside of the tiny vocabulary.
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Texts of values that are longer are left out.
_LONG = 2000
# Largest sizes of what relaxlm does not know, where a field's name tells that it is a size.
_SMALL = ((re.compile(r"(_size|_dim|_rank)$"), 32), (re.compile(r"experts$"), 8))


@dataclass(frozen=True)
class Draft:
    """What `relaxlm new-model` has to say.

    Attributes:
        family: the family of relaxlm that runs the type, or the nearest one.
        supported: whether relaxlm runs this configuration as it is; then there are no files.
        inferred, open_points: sentences.
        files: name of a module -> text; "MODULE" and "test_MODULE".
    """

    model_type: str
    family: str
    supported: bool
    inferred: tuple[str, ...]
    open_points: tuple[str, ...]
    module: str = ""
    model: str = ""
    test: str = ""


def draft(raw: Mapping[str, Any], where: str, tensors: Shapes | None = None) -> Draft:
    """Draft a model for a configuration.

    Args:
        raw: config.json.
        where: its name, for messages.
        tensors: name -> shape of every tensor of the checkpoint, if there is one.

    Raises:
        ConfigError: no configuration of a model.
    """
    model_type = raw.get("model_type")
    if model_type in models.MODELS:
        return _of_known_type(str(model_type), raw)
    text, is_inner = text_part(raw, where)
    model_type = text["model_type"]
    nearest = nearest_family(text, where, tensors)
    open_points = _open_points(nearest, text, tensors is not None)
    if is_inner:
        open_points.insert(
            0,
            "text_config is the language model, which is drafted here; what reads pictures or "
            "sound is not, and a checkpoint with both needs `ignored` patterns for the rest",
        )
    module = re.sub(r"\W", "_", model_type)
    return Draft(
        model_type,
        nearest.family,
        False,
        tuple(_inferred(nearest, text, tensors is not None)),
        tuple(open_points),
        module,
        _model_file(nearest, model_type, open_points),
        _test_file(nearest, text, module),
    )


def _of_known_type(model_type: str, raw: Mapping[str, Any]) -> Draft:
    try:
        config = models.load_config(raw)
    except ConfigError as error:
        return Draft(model_type, model_type, False, (), (str(error),))
    unknown = [
        f"{name} = {_short(raw[name])} is not read by relaxlm"
        for name in unknown_fields(config, raw)
    ]
    return Draft(model_type, model_type, not unknown, (), tuple(unknown))


def _inferred(nearest: Comparison, raw: Mapping[str, Any], compared: bool) -> list[str]:
    config = nearest.config
    found = [f"nearest family: {nearest.family} (relaxlm/models/{_module(nearest)}.py)"]
    found += [f"{theirs} is our {ours}" for theirs, ours in nearest.spelling.items()]
    found += [f"{ours} is called {theirs} in tensors" for ours, theirs in nearest.renamed.items()]
    if config is not None:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        rope = getattr(config.rope, "rope_type", "none")
        share = getattr(config.rope, "partial_rotary_factor", 1.0)
        found += [
            f"activation: {config.hidden_act}; eps of norms: {config.norm_eps:g}",
            f"attention: {heads} heads of {config.head_dim}, {kv_heads} for keys and values",
            f"rotary embedding: {rope}" + (f", {share:g} of each head" if share != 1 else ""),
            f"windows: {sorted(set(config.windows))} (0 is full attention)",
            "embedding and head are " + ("one" if config.tie_word_embeddings else "two"),
        ]
    if compared and not (nearest.absent_tensors or nearest.unused_tensors):
        found.append("every tensor of the checkpoint has its place")
    return found


def _open_points(nearest: Comparison, raw: Mapping[str, Any], compared: bool) -> list[str]:
    points = [f"{nearest.family} says: {message}" for message in nearest.refused]
    points += [
        f"{name} = {_short(value)} is not known to {nearest.family}"
        for name, value in nearest.unknown.items()
    ]
    points += [
        f"{name} is not given, and {nearest.family} takes it to be {_short(value)}"
        for name, value in nearest.assumed.items()
    ]
    points += [
        f"no tensor of the checkpoint for {name} {list(shape)}"
        for name, shape in nearest.absent_tensors.items()
    ]
    points += [
        f"no parameter for the checkpoint's {name} {list(shape)}"
        for name, shape in nearest.unused_tensors.items()
    ]
    if nearest.config is None:
        points.append(f"{nearest.family} could not read the configuration, so little is inferred")
    if not compared:
        points.append("no checkpoint was given, so names and shapes of tensors are not compared")
    return points


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _module(nearest: Comparison) -> str:
    return models.MODELS[nearest.family]


def _model_file(nearest: Comparison, model_type: str, open_points: list[str]) -> str:
    parent = _module(nearest)
    points = "".join(_wrapped(point, "- ", "  ") for point in open_points)
    document = f'"""{model_type}, drafted by `relaxlm new-model` after models/{parent}.py.'
    document += f'\n\nOpen points:\n{points}"""' if points else '"""'
    declared = [name for name in nearest.unknown if _can_be_declared(name)]
    others = [name for name in nearest.unknown if name not in declared]
    config = ""
    if declared:
        entries = [f"**{parent}.Config.absent,", *(f'"{name}": None,' for name in declared)]
        config += _block("absent: ClassVar[dict] = {", entries)
    if nearest.spelling:
        entries = [f"**{parent}.Config.spelling,"]
        entries += [f'"{theirs}": "{ours}",' for theirs, ours in nearest.spelling.items()]
        config += _block("spelling: ClassVar[dict] = {", entries)
    config += "\n" if config else ""
    literal = f"    model_type: Literal[{json.dumps(model_type)}]"
    config += f"{literal}  # type: ignore[assignment]\n"
    if declared:
        config += (
            "    # Open, and refused as long as the only value is None. A value that changes\n"
            "    # nothing, or is what is computed anyway, is given as the type; others are\n"
            "    # implemented.\n"
        )
        config += "".join(f"    {name}: Literal[None]\n" for name in declared)
    config += "".join(_wrapped(f"Open: {name} is not read.", "    # ", "    # ") for name in others)
    model = "    pass\n"
    if nearest.renamed:
        entries = [f"**{parent}.Model.checkpoint_names,"]
        entries += [f'"{ours}": "{theirs}",' for ours, theirs in nearest.renamed.items()]
        model = _block("checkpoint_names: ClassVar[dict] = {", entries)
    typing = "ClassVar, Literal" if "ClassVar" in config + model else "Literal"
    return (
        f"{document}\n\nfrom typing import {typing}\n\nfrom relaxlm.models import {parent}\n\n\n"
        f"class Config({parent}.Config):\n{config}\n\nclass Model({parent}.Model):\n{model}"
    )


def _can_be_declared(name: str) -> bool:
    plain = re.fullmatch(r"[a-z][a-zA-Z0-9_]*", name) is not None
    return plain and not hasattr(DecoderConfig, name) and not name.startswith("model_")


def _wrapped(text: str, first: str, other: str) -> str:
    text = text.replace("\\", "/").replace('"""', "'''")
    lines = textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=other, break_on_hyphens=False
    )
    return "".join(f"{line}\n" for line in lines)


def _block(opening: str, entries: list[str]) -> str:
    return f"    {opening}\n" + "".join(f"        {entry}\n" for entry in entries) + "    }\n"


def _test_file(nearest: Comparison, raw: Mapping[str, Any], module: str) -> str:
    fields = tiny_config(nearest, raw)
    return f'''\
"""The logits of {raw["model_type"]} are those of transformers, however the tokens arrive."""

import pytest

from tests.models import parity

# Every value that real configurations have of what changes the result: one variant for each.
VARIANTS = {{
    "{module}": {_python(fields, 4, True)},
}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str) -> None:
    parity.check_parity(VARIANTS[variant])


def test_quantized() -> None:
    parity.check_quantized(VARIANTS["{module}"])
'''


def tiny_config(nearest: Comparison, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with small sizes, in its own spelling, without what has no effect."""
    spelling = {**FIELDS, **_family_spelling(nearest), **nearest.spelling}
    depth = _value(raw, spelling, "num_hidden_layers")
    heads = _value(raw, spelling, "num_attention_heads")

    def small(name: str, value: Any) -> Any:
        ours = spelling.get(name, name)
        if isinstance(value, dict):
            return {key: small(key, inner) for key, inner in value.items() if inner is not None}
        if name in ("short_factor", "long_factor") and isinstance(value, list):
            turned = len(value) * 2 * TINY["head_dim"] // (2 * _head_dim(raw, spelling))
            return value[: max(1, turned)]
        if isinstance(value, (list, str)) and len(value) == depth:  # one entry per layer
            kinds = [json.dumps(kind) for kind in value]
            first = sorted({kinds.index(kind) for kind in kinds})
            both = (first * 2)[:2]
            return (
                "".join(value[i] for i in both)
                if isinstance(value, str)
                else [value[i] for i in both]
            )
        if type(value) is not int:
            return value
        if ours == "num_key_value_heads":
            return {1: 1, heads: TINY["num_attention_heads"]}.get(value, 2)
        if ours in TINY:
            return TINY[ours]
        limits = [limit for pattern, limit in _SMALL if pattern.search(name)]
        return min([value, *limits])

    kept = {
        name: small(name, value)
        for name, value in raw.items()
        if value is not None and (name in _TOLD or name not in WITHOUT_EFFECT | set(_SPECIAL))
    }
    # Such as templates, which no model reads.
    kept = {name: value for name, value in kept.items() if len(json.dumps(value)) < _LONG}
    return kept | _SPECIAL


def _family_spelling(nearest: Comparison) -> Mapping[str, str]:
    return type(nearest.config).spelling if nearest.config is not None else {}


def _value(raw: Mapping[str, Any], spelling: Mapping[str, str], ours: str) -> Any:
    """The value of one of our fields, by whatever name."""
    return next((raw[name] for name in raw if spelling.get(name, name) == ours), None)


def _head_dim(raw: Mapping[str, Any], spelling: Mapping[str, str]) -> int:
    found = _value(raw, spelling, "head_dim")
    if isinstance(found, int) and found > 0:
        return found
    hidden = _value(raw, spelling, "hidden_size")
    heads = _value(raw, spelling, "num_attention_heads")
    known = isinstance(hidden, int) and isinstance(heads, int) and heads > 0
    return hidden // heads if known else TINY["head_dim"]


def _python(value: Any, indent: int, exploded: bool = False, used: int = 0) -> str:
    """A literal as ruff writes it: on one line where it fits."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if not isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    if isinstance(value, dict):
        names = [f"{json.dumps(key, ensure_ascii=False)}: " for key in value]
        parts = list(value.values())
    else:
        names, parts = [""] * len(value), value
    line = [name + _python(part, 0, used=-10_000) for name, part in zip(names, parts, strict=True)]
    flat = f"{opening}{', '.join(line)}{closing}"
    if not exploded and indent + used + len(flat) + 1 <= WIDTH:
        return flat
    inner = indent + 4
    rows = [
        f"{' ' * inner}{name}{_python(part, inner, used=len(name))},\n"
        for name, part in zip(names, parts, strict=True)
    ]
    return f"{opening}\n{''.join(rows)}{' ' * indent}{closing}"


def write(draft: Draft, folder: Path) -> tuple[Path, Path]:
    """Write the files of a draft, never over others.

    They go to relaxlm/models and tests/models of a checkout of relaxlm, else into the folder.

    Raises:
        ConfigError: one of the files is already there.
    """
    checkout = (folder / "relaxlm" / "models").is_dir()
    model = (folder / "relaxlm" / "models" if checkout else folder) / f"{draft.module}.py"
    test = (folder / "tests" / "models" if checkout else folder) / f"test_{draft.module}.py"
    for path in (model, test):
        if path.exists():
            raise ConfigError(f"{path} is already there, and is not overwritten; move it away")
    for path, text in ((model, draft.model), (test, draft.test)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    return model, test
