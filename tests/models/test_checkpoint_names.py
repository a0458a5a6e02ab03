"""Checkpoints whose tensors have other names give the parameters that the usual ones give."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from relaxlm import models
from relaxlm.errors import CheckpointError
from relaxlm.quantization.convert import convert_weights
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.params import WeightFolder
from tests.models.parity import tiny_config

Names = Callable[[str], str]
FAMILIES = {
    "llama": (tiny_config("llama"), "model."),
    "llama-tied": (tiny_config("llama", tie_word_embeddings=True), "model."),
    "gpt2": (tiny_config("gpt2", n_inner=112, num_key_value_heads=4), "transformer."),
    "gpt_neox": (tiny_config("gpt_neox", hidden_act="gelu", num_key_value_heads=4), "gpt_neox."),
    "gemma3": (
        {
            "model_type": "gemma3",
            "text_config": tiny_config("gemma3_text", tie_word_embeddings=True),
        },
        "model.",
    ),
    "chatglm": (
        {
            "model_type": "chatglm",
            "hidden_size": 64,
            "kv_channels": 16,
            "num_layers": 1,
            "num_attention_heads": 4,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "ffn_hidden_size": 112,
            "padded_vocab_size": 131,
            "layernorm_epsilon": 1e-3,
            "seq_length": 256,
        },
        "transformer.",
    ),
}
SPELLINGS: dict[str, Callable[[str], Names]] = {
    "base model": lambda base: lambda name: name.removeprefix(base),
    "pictures, old": lambda base: lambda name: f"language_model.{name}",
    "pictures, new": lambda base: (
        lambda name: (
            f"model.language_model.{name.removeprefix(base)}"
            if name.startswith(base)
            else f"language_model.{name}"
        )
    ),
}


def usual_tensors(raw: dict) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {
        source.name: rng.normal(0, 0.1, source.shape).astype(np.float32)
        for spec in models.parameter_specs(models.load_config(raw))
        for source in spec.sources
    }


def converted(raw: dict, tensors: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = models.load_config(raw)
    specs, ignored = models.parameter_specs(config), models.ignored_sources(config)
    convert_weights(folder, get_scheme("q0f32"), folder.parent / "out", specs, ignored)
    weights = WeightFolder(folder.parent / "out")
    return {spec.name: weights.load(spec.name).copy() for spec in specs}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_spelling_gives_the_same_parameters(family: str, tmp_path: Path) -> None:
    raw, base = FAMILIES[family]
    usual = usual_tensors(raw)
    assert any(name.startswith(base) for name in usual)
    expected = converted(raw, usual, tmp_path / "usual")
    for spelling, rename in SPELLINGS.items():
        renamed = {rename(base)(name): value for name, value in usual.items()}
        found = converted(raw, renamed, tmp_path / spelling)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{spelling}: {name}")


def test_what_reads_pictures_is_left_out(tmp_path: Path) -> None:
    raw, _ = FAMILIES["gemma3"]
    usual = usual_tensors(raw)
    for number, part in enumerate(("vision_tower.a", "model.multi_modal_projector.b")):
        extra = {part: np.ones(3, np.float32)}
        converted(raw, usual | extra, tmp_path / str(number))
        with pytest.raises(CheckpointError, match="unused"):
            converted(
                *(FAMILIES["llama"][0], usual_tensors(FAMILIES["llama"][0]) | extra),
                tmp_path / f"llama-{number}",
            )


def refused(raw: dict, tensors: dict[str, np.ndarray], folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        converted(raw, tensors, folder)
    return str(caught.value)


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    raw, _ = FAMILIES["llama"]
    tensors = usual_tensors(raw)
    tensors["norm.weight"] = tensors["model.norm.weight"]
    assert refused(raw, tensors, tmp_path / "a") == (
        f"{tmp_path / 'a'}: checkpoint does not fit the model: 1 under two names "
        "(model.norm.weight and norm.weight). Is config.json from the same revision?"
    )


def test_a_missing_tensor_is_named_with_all_names_that_were_tried(tmp_path: Path) -> None:
    raw, _ = FAMILIES["llama"]
    tensors = usual_tensors(raw)
    del tensors["model.norm.weight"]
    assert refused(raw, tensors, tmp_path / "a") == (
        f"{tmp_path / 'a'}: checkpoint does not fit the model: 1 missing (model.norm.weight). "
        "Is config.json from the same revision? (sought model.norm.weight also as norm.weight, "
        "language_model.model.norm.weight, model.language_model.norm.weight)"
    )


def test_a_head_that_is_missing_says_what_to_do(tmp_path: Path) -> None:
    raw, _ = FAMILIES["llama"]
    tensors = usual_tensors(raw)
    del tensors["lm_head.weight"]
    assert refused(raw, tensors, tmp_path / "a") == (
        f"{tmp_path / 'a'}: checkpoint does not fit the model: 1 missing (lm_head.weight). If the "
        'embedding is the head, too, set "tie_word_embeddings" to true in config.json; else the '
        "folder lacks the head of a language model (sought lm_head.weight also as "
        "language_model.lm_head.weight)"
    )


@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_tied_head_may_be_there_once_more_or_alone_but_not_differ(
    head: str, tmp_path: Path
) -> None:
    raw, _ = FAMILIES["llama-tied"]
    usual = usual_tensors(raw)
    embedding = usual["model.embed_tokens.weight"]
    expected = converted(raw, usual, tmp_path / "usual")
    both = converted(raw, usual | {head: embedding}, tmp_path / "both")
    alone = {name: value for name, value in usual.items() if value is not embedding}
    only = converted(raw, alone | {head: embedding}, tmp_path / "only")
    for name, value in expected.items():
        np.testing.assert_array_equal(both[name], value)
        np.testing.assert_array_equal(only[name], value)
    other = embedding.copy()
    other[-1, -1] += 1
    assert refused(raw, usual | {head: other}, tmp_path / "a") == (
        f"{tmp_path / 'a'}: {head} differs from model.embed_tokens.weight, and config.json says "
        'that they are one (tie_word_embeddings). Set "tie_word_embeddings" to false in '
        "config.json if the head is meant, or delete the tensor that is not"
    )
