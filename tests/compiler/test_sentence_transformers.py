"""The files of sentence-transformers: what they say is written down, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from relaxlm import models
from relaxlm.compiler.gen_config import generate_config
from relaxlm.compiler.sentence_transformers import read
from relaxlm.errors import ConfigError, UnsupportedError
from tests.tiny_embedder import BERT, PROMPTS, QWEN3, tokenizer_json, write_modules

CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def folder(place: Path, raw: dict = BERT, modules: bool = True, **texts: Any) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(raw))
    (place / "tokenizer.json").write_text(tokenizer_json("bert"))
    if modules:
        write_modules(place, CLS, True, **texts)
    return place


def generated(source: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    notes: list[str] = []
    path = generate_config(source, "q4f16_1", source / "out", note=notes.append, **options)
    return json.loads(path.read_text("utf-8")), notes


def test_what_the_files_say_is_in_the_configuration(tmp_path: Path) -> None:
    config, notes = generated(folder(tmp_path, max_seq_length=50, do_lower_case=True))
    assert notes == []
    assert config["model_task"] == "embedding"
    assert config["embedding_metadata"] == {
        "model_type": "encoder",
        "pooling_strategy": "cls",
        "normalize": True,
    }
    assert config["relaxlm"]["embedding"] == {"prompts": PROMPTS, "lowercase": True, "strip": True}
    # Several texts share a step; none is longer than the context.
    assert (config["context_window_size"], config["prefill_chunk_size"]) == (50, 2048)
    assert config["model_config"]["max_position_embeddings"] == 64
    assert "model_task" not in config["model_config"]
    assert models.load_config(tmp_path / "out").model_task == "embedding"


def test_a_decoder_is_for_embeddings_where_the_files_say_so(tmp_path: Path) -> None:
    config, _ = generated(folder(tmp_path, QWEN3))
    assert config["embedding_metadata"]["model_type"] == "decoder"
    assert models.load_config(tmp_path).has_head is False
    names = [spec.name for spec in models.parameter_specs(models.load_config(tmp_path))]
    assert "lm_head.weight" not in names
    assert models.ignored_sources(models.load_config(tmp_path))[-2:] == (
        "lm_head.weight",
        "lm_head.bias",
    )
    config, _ = generated(tmp_path, model_task="chat")
    assert (config["model_task"], config["embedding_metadata"]) == ("chat", None)
    assert models.load_config(tmp_path / "out").has_head
    assert models.load_config(tmp_path, "chat").has_head


def test_options_come_before_files_and_files_before_what_is_assumed(tmp_path: Path) -> None:
    config, notes = generated(folder(tmp_path / "a"), pooling="max", normalize=False)
    assert config["embedding_metadata"]["pooling_strategy"] == "max" and notes == []
    assert config["embedding_metadata"]["normalize"] is False
    config, notes = generated(folder(tmp_path / "b", modules=False))
    assert config["embedding_metadata"]["pooling_strategy"] == "cls"
    assert "cls pooling is assumed; --pooling chooses another" in notes[0]
    config, notes = generated(folder(tmp_path / "c", QWEN3, modules=False), model_task="embedding")
    assert config["embedding_metadata"]["pooling_strategy"] == "last"
    with pytest.raises(ConfigError, match="pooling and normalize are for embedding models"):
        generated(tmp_path / "c", pooling="mean")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"context_window_size": 65}, "this model has positions for 64 tokens and no others"),
        ({"prefill_chunk_size": 20}, "an encoder reads a text in one step, expected at least"),
        ({"sliding_window_size": 16}, "an encoder reads a text at once"),
    ],
)
def test_sizes_that_an_encoder_cannot_have(sizes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        generated(folder(tmp_path), **sizes)


@pytest.mark.parametrize(
    ("pooling", "found"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "cls", "embedding_dimension": 64}, "cls"),  # as later releases write it
    ],
)
def test_poolings(pooling: dict, found: str, tmp_path: Path) -> None:
    write_modules(tmp_path, pooling, False)
    result = read(tmp_path)
    assert result is not None and (result.pooling, result.normalize) == (found, False)


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, "pooling weightedmean is not supported"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "cls and max is not"),
        ({}, "pooling of nothing is not supported"),
        ({**CLS, "include_prompt": False}, "include_prompt = false is not supported"),
        ({**CLS, "pooling_mode_new": 1}, "pooling_mode_new is not supported"),
    ],
)
def test_poolings_that_are_refused(pooling: dict, message: str, tmp_path: Path) -> None:
    write_modules(tmp_path, pooling, True)
    with pytest.raises(UnsupportedError, match=message):
        read(tmp_path)


def test_other_modules_and_broken_files_are_refused(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    write_modules(tmp_path, CLS, True)
    modules = json.loads((tmp_path / "modules.json").read_text())
    dense = {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (tmp_path / "modules.json").write_text(json.dumps([*modules[:2], dense, modules[2]]))
    with pytest.raises(UnsupportedError, match="Transformer, Pooling, Dense, Normalize are not"):
        read(tmp_path)
    modules[0]["path"] = "0_Transformer"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedError, match="the folder '0_Transformer' within"):
        read(tmp_path)
    (tmp_path / "modules.json").write_text('[{"idx": 0}]')
    with pytest.raises(ConfigError, match="expected a list of modules"):
        models.load_config(folder(tmp_path, modules=False))
    write_modules(tmp_path, CLS, True, max_seq_length="long")
    with pytest.raises(ConfigError, match="max_seq_length = 'long'"):
        read(tmp_path)
