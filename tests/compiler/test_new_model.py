"""Drafts of models: files that import, the nearest family, and what was left open."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import save_file

from relaxlm import models
from relaxlm.cli.new_model import new_model
from relaxlm.compiler.new_model_files import Draft, draft, write
from relaxlm.errors import ConfigError, UnsupportedError
from tests.models import parity
from tests.models.parity import tiny_config
from tests.shared_data import SHARED, needs_shared_data

CONFIGS = sorted((SHARED / "configs").glob("*.json")) if SHARED.is_dir() else []
# A family with other names for its fields and tensors, for which nothing has to be written.
RENAMED_FIELDS = {
    "hidden_size": "n_embd",
    "intermediate_size": "ffn_dim",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "num_hidden_layers": "block_count",
    "rms_norm_eps": "norm_epsilon",
    "hidden_act": "activation",
    "max_position_embeddings": "seq_length",
}
RENAMED_PARTS = {
    "model": "transformer",
    "layers": "blocks",
    "self_attn": "attn",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "mlp": "feed_forward",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "norm": "final_norm",
    "embed_tokens": "tok_embeddings",
}


def llama_variant(**change) -> dict:
    """A configuration of a type that nobody has, which is Llama under other names."""
    raw = tiny_config("llama", num_hidden_layers=3) | {"model_type": "llama_variant"}
    return {RENAMED_FIELDS.get(name, name): value for name, value in raw.items()} | change


def renamed(name: str) -> str:
    return ".".join(RENAMED_PARTS.get(part, part) for part in name.split("."))


def imported(found: Draft, folder: Path) -> tuple[ModuleType, ModuleType]:
    """The files of a draft as modules."""
    loaded = []
    for path in write(found, folder):
        spec = importlib.util.spec_from_file_location(f"drafted_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loaded.append(module)
    return loaded[0], loaded[1]


def check_style(folder: Path) -> None:
    for arguments in (["format", "--check"], ["check"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--isolated"]
        rules = ["--select", "E,F,I,UP,B,RUF"] if arguments == ["check"] else []
        lines = ["--line-length", "100", "--target-version", "py310"]
        source = ["--config", 'src=["."]'] if arguments == ["check"] else []
        done = subprocess.run(
            [*command, *lines, *rules, *source, str(folder)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@needs_shared_data
def test_real_configurations_give_files_that_import(tmp_path: Path) -> None:
    drafted = 0
    for number, path in enumerate(CONFIGS):
        raw = json.loads(path.read_text())
        if not isinstance(raw, dict) or "model_type" not in raw:
            continue
        found = draft(raw, path.name)
        if raw["model_type"] in models.MODELS:
            assert found.family == raw["model_type"] and not found.module
            assert found.supported or found.open_points
            continue
        model, test = imported(found, tmp_path / str(number))
        assert model.Config.__mro__[1].__module__ == f"relaxlm.models.{models.MODELS[found.family]}"
        (variant,) = test.VARIANTS.values()
        assert variant["model_type"] == found.model_type
        drafted += 1
    assert drafted
    check_style(tmp_path)


def first_variants() -> dict[str, dict]:
    """The first configuration of each family that the tests of models have."""
    found: dict[str, dict] = {}
    for path in sorted((Path(__file__).parents[1] / "models").glob("test_*.py")):
        module = importlib.import_module(f"tests.models.{path.stem}")
        for raw in getattr(module, "VARIANTS", {}).values():
            if isinstance(raw, dict) and raw.get("model_type") in models.MODELS:
                found.setdefault(raw["model_type"], raw)
    return found


def test_a_type_like_each_family_is_drafted_after_one_with_its_tensors(tmp_path: Path) -> None:
    variants = first_variants()
    assert len(variants) > len(models.MODELS) / 2
    for model_type, raw in variants.items():
        specs = models.parameter_specs(models.load_config(raw))
        shapes = {source.name: source.shape for spec in specs for source in spec.sources}
        found = draft(raw | {"model_type": f"{model_type}_variant"}, "config.json", shapes)
        model, test = imported(found, tmp_path / model_type)
        assert model.Config.model_fields["model_type"].annotation is not None
        assert f"{model_type}_variant".replace("-", "_") in test.VARIANTS
        assert not [point for point in found.open_points if "tensor" in point or "param" in point]
    check_style(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_the_nearest_family_is_found_by_tensors(model_type: str) -> None:
    raw = tiny_config(model_type, tie_word_embeddings=True)
    specs = models.parameter_specs(models.load_config(raw))
    shapes = {source.name: source.shape for spec in specs for source in spec.sources}
    found = draft(raw | {"model_type": "unnamed"}, "config.json", shapes)
    assert found.open_points == ()
    own = models.create(models.load_config(raw | {"model_type": found.family})).parameter_specs()
    assert {source.name for spec in own for source in spec.sources} == set(shapes)


def test_llama_under_other_names_is_right_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = llama_variant()
    known = tiny_config("llama", num_hidden_layers=3)
    reference = parity.reference_model(known)
    state = {renamed(name): tensor for name, tensor in reference.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = draft(raw, "config.json", shapes)
    assert found.open_points == () and found.family == "llama"

    module, _ = imported(found, tmp_path)
    monkeypatch.setitem(sys.modules, "relaxlm.models.llama_variant", module)
    monkeypatch.setattr(models, "MODELS", models.MODELS | {"llama_variant": "llama_variant"})
    compiled = parity.Compiled(raw, parity.stored_parameters(raw, state, "q0f32"), "q0f32")
    ids = np.random.default_rng(5).integers(0, parity.VOCAB, 40)
    (logits,) = compiled.run([ids], [20, 1, 19])
    expected = parity.reference_logits(reference, ids)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_inferred_is_named_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = llama_variant(logit_cap=30.0, activation="swish2")
    shapes = {
        "transformer.tok_embeddings.weight": (131, 64),
        "transformer.blocks.0.attn.wq.weight": (64, 64),
        "transformer.blocks.2.attn.gate.weight": (7, 64),
    }
    found = draft(raw, "config.json", shapes)
    text = "\n".join(found.open_points)
    assert "logit_cap = 30.0 is not known to llama" in text
    assert "'swish2' is not supported" in text
    assert "no parameter for the checkpoint's transformer.blocks.*.attn.gate.weight [7, 64]" in text
    assert "no tensor of the checkpoint for " in text and "down_proj.weight [64, 112]" in text
    assert "logit_cap = 30.0" in " ".join(found.model.split())

    module, _ = imported(found, tmp_path)
    with pytest.raises(UnsupportedError, match=r"logit_cap = 30\.0 is not supported"):
        module.Config.read(raw | {"activation": "silu"}, "config.json")
    settled = {key: value for key, value in raw.items() if key != "logit_cap"}
    assert module.Config.read(settled | {"activation": "silu"}, "config.json").hidden_size == 64


def test_the_tiny_model_of_the_test_has_the_shape_of_the_real_one() -> None:
    raw = llama_variant(
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        num_hidden_layers=3,
        sliding_window=4096,
        n_kv_heads=1,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0] * 8,
            "original_max_position_embeddings": 4096,
        },
        num_experts=64,
        moe_hidden_size=1408,
        torch_dtype="bfloat16",
        eos_token_id=[5, 7],
    )
    text = draft(raw, "config.json").test
    values: dict = {}
    start = text.index("VARIANTS = ")
    exec(text[start : text.index("\n\n\n", start)], values)
    tiny = values["VARIANTS"]["llama_variant"]
    assert tiny["layer_types"] == ["full_attention", "sliding_attention"]
    assert (tiny["num_hidden_layers"], tiny["sliding_window"], tiny["n_kv_heads"]) == (2, 21, 1)
    assert tiny["rope_scaling"]["original_max_position_embeddings"] == 64
    assert len(tiny["rope_scaling"]["short_factor"]) == 8
    assert (tiny["num_experts"], tiny["moe_hidden_size"]) == (8, 32)
    assert tiny["eos_token_id"] == 2 and "torch_dtype" not in tiny


def test_a_type_that_relaxlm_has() -> None:
    found = draft(tiny_config("qwen3"), "config.json")
    assert found.supported and not found.module
    found = draft(tiny_config("qwen3", logit_cap=3.0), "config.json")
    assert not found.supported and found.open_points == ("logit_cap = 3.0 is not read by relaxlm",)
    found = draft(tiny_config("qwen3", hidden_act="swish2"), "config.json")
    assert not found.supported and "'swish2' is not supported" in found.open_points[0]
    with pytest.raises(ConfigError, match="model_type is missing"):
        draft({}, "config.json")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "model", tmp_path / "checkout"
    (output / "relaxlm" / "models").mkdir(parents=True)
    source.mkdir()
    (source / "config.json").write_text(json.dumps(llama_variant()))
    specs = models.parameter_specs(models.load_config(tiny_config("llama", num_hidden_layers=3)))
    sources = [one for spec in specs for one in spec.sources]
    save_file(
        {renamed(one.name): np.zeros(one.shape, np.float16) for one in sources},
        source / "model.safetensors",
    )
    new_model(source, source, output)
    said = capsys.readouterr().out
    assert "block_count is our num_hidden_layers" in said and "No open points" in said
    assert "every tensor of the checkpoint has its place" in said
    assert '"llama_variant": "llama_variant" to MODELS' in said
    assert (output / "relaxlm" / "models" / "llama_variant.py").is_file()
    assert (output / "tests" / "models" / "test_llama_variant.py").is_file()
    with pytest.raises(ConfigError, match="is already there, and is not overwritten"):
        new_model(source, None, output)
    (source / "config.json").write_text(json.dumps(tiny_config("llama")))
    new_model(source, None, output)
    assert "relaxlm runs this model" in capsys.readouterr().out
