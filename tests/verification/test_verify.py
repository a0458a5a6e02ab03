"""Libraries that compute right pass; broken ones are caught, and the place is named."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, pre_tokenizers

from relaxlm import models
from relaxlm.compiler.gen_config import generate_config
from relaxlm.compiler.options import CompileOptions
from relaxlm.errors import (
    CheckpointError,
    ConfigError,
    LibraryError,
    RequestError,
    TokenizerError,
    VerificationError,
    VersionError,
    WeightsError,
)
from relaxlm.quantization.convert import convert_weights
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.library import Library
from relaxlm.runtime.params import WeightFolder
from relaxlm.verification.report import report
from relaxlm.verification.results import Verification
from relaxlm.verification.verify import Thresholds, prepare
from tests.models import parity

TEXTS = ("The quick brown fox.", "def f(x):\n    return x + 1  # größer als zwölf\n")


def save_checkpoint(folder: Path, raw: dict) -> Path:
    """A Hugging Face folder: random weights, a byte-level tokenizer without merges."""
    # Of few shapes, because every shape of a matrix is a kernel to compile.
    raw = {**raw, "vocab_size": 260, "intermediate_size": 64}
    parity.reference_model(raw).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def convert(source: Path, output: Path, scheme: str) -> Path:
    config = models.load_config(source)
    convert_weights(source, get_scheme(scheme), output, models.parameter_specs(config))
    generate_config(source, scheme, output)
    return output


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Libraries are compiled once for all tests of this file, and for nobody else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELAXLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = parity.tiny_config("llama", num_hidden_layers=3)
    return save_checkpoint(tmp_path_factory.mktemp("llama"), raw)


@pytest.fixture(scope="module")
def q0f32(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(llama, tmp_path_factory.mktemp("converted") / "llama-q0f32", "q0f32")


@pytest.fixture(scope="module")
def q4f16_1(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(llama, tmp_path_factory.mktemp("converted") / "llama-q4f16_1", "q4f16_1")


def verify(source: Path, folder: Path, thresholds: Thresholds | None = None, **options):
    return prepare(source, folder, TEXTS, device="cpu", **options).run(thresholds)


def change_tensor(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrite a tensor of a converted folder, checksums and all."""
    record = WeightFolder(folder).records[name]
    path = folder / record.shard
    content = bytearray(path.read_bytes())
    place = slice(record.offset, record.offset + record.nbytes)
    old = np.frombuffer(bytes(content[place]), record.dtype).reshape(record.shape)
    new = np.ascontiguousarray(change(old.copy()))
    assert new.dtype == old.dtype and new.shape == old.shape and (new != old).any()
    content[place] = new.tobytes()
    path.write_bytes(content)
    for index in ("tensor-cache.json", "ndarray-cache.json"):
        listed = json.loads((folder / index).read_text())
        for shard in listed["records"]:
            if shard["dataPath"] == record.shard:
                shard["md5sum"] = hashlib.md5(content).hexdigest()
        (folder / index).write_text(json.dumps(listed))


def failure(verification: Verification) -> str:
    with pytest.raises(VerificationError) as raised:
        verification.check()
    return str(raised.value)


# Libraries that compute right


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_float32_library_is_as_exact_as_float32(
    model_type: str, tmp_path: Path, llama: Path, q0f32: Path
) -> None:
    source, folder = llama, q0f32
    if model_type != "llama":
        raw = parity.tiny_config(model_type, tie_word_embeddings=True)
        source = save_checkpoint(tmp_path / "source", raw)
        folder = convert(source, tmp_path / "converted", "q0f32")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    found = verify(source, folder)
    found.check()
    (comparison,) = found.comparisons
    assert comparison.reference == "float"
    total = comparison.total
    assert 0 < total.relative_error < 2e-5 and total.kl_mean < 1e-9 and total.top1 == 1
    assert abs(total.nll_library - total.nll_reference) < 1e-5
    assert total.rows == sum(len(text.encode()) for text in TEXTS)
    assert total.targets == total.rows - len(TEXTS)
    assert comparison.first_diverging is None
    assert comparison.layers[0] == 0 and 0 < max(comparison.layers) < 1e-5
    assert not found.weights and not found.settings
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_a_quantized_library_is_exact_about_what_it_stores(llama: Path, q4f16_1: Path) -> None:
    found = verify(llama, q4f16_1, Thresholds(top1=0.3), opt="act_quant=0")
    found.check()
    floats, stored = found.comparisons
    assert (floats.reference, stored.reference) == ("float", "dequantized")
    assert stored.total.relative_error < 3e-3 and stored.total.kl_mean < 1e-6
    assert floats.total.kl_mean > 1e-3 and floats.total.relative_error > 0.1
    assert stored.layers[0] == 0 < floats.layers[0]
    assert floats.first_diverging is None  # not judged
    assert floats.total.nll_library == pytest.approx(stored.total.nll_library)
    assert not found.weights
    # More than 80 columns would be broken by a terminal.
    assert max(map(len, report(found))) <= 80
    assert "against the values that the library stores:" in report(found)


@pytest.mark.parametrize("reference", ["float", "dequantized"])
def test_one_reference_is_enough_if_asked_for(llama: Path, q4f16_1: Path, reference: str) -> None:
    found = verify(llama, q4f16_1, Thresholds(kl=1e-14), reference=reference)
    (comparison,) = found.comparisons
    assert comparison.reference == reference
    assert comparison.limits.kl == 1e-14
    text = "the checkpoint in float32" if reference == "float" else "the values that the library"
    assert f"Against {text}" in failure(found)


def test_a_rounded_cache_is_rounded_in_the_reference_too(llama: Path, q0f32: Path) -> None:
    found = verify(llama, q0f32, overrides="kv_cache_dtype=fp8")
    found.check()
    floats, stored = found.comparisons
    assert floats.total.relative_error > 3 * stored.total.relative_error


def test_a_text_ends_where_a_window_begins_to_matter(llama: Path, q0f32: Path) -> None:
    found = verify(llama, q0f32, overrides="sliding_window_size=17;attention_sink_size=2")
    found.check()
    assert [prompt.tokens for prompt in found.comparisons[0].prompts] == [17, 17]


def test_a_library_may_lie_anywhere(llama: Path, q0f32: Path, tmp_path: Path) -> None:
    built = prepare(llama, q0f32, TEXTS, device="cpu").library.path
    library = tmp_path / "model.so"
    shutil.copy(built, library)
    for job in (
        prepare(llama, library, TEXTS, weights=q0f32, max_length=5),
        prepare(llama, q0f32, TEXTS, model_lib=library, max_length=5),
    ):
        assert job.library.path == library and job.weights.path == q0f32
        assert [len(ids) for _, ids in job.texts] == [5, 5]
    shutil.copytree(q0f32, tmp_path, dirs_exist_ok=True)
    assert prepare(llama, library, TEXTS).weights.path == tmp_path


def test_a_library_that_rounds_activations_is_not_held_to_float32(llama: Path, q0f32: Path) -> None:
    job = prepare(llama, q0f32, TEXTS, device="cpu")
    assert job.activations == "float32"
    library = job.library
    opt = CompileOptions.resolve(job.config, job.scheme, opt="act_quant=1").opt
    info = library.metadata.model_copy(update={"opt": opt})
    rounding = replace(job, library=Library(library.module, info, library.path))
    assert rounding.activations == "rounded"


def test_weights_from_another_converter_may_be_rounded_otherwise(
    llama: Path, q4f16_1: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(q4f16_1, tmp_path / "copy")

    def next_code(words: np.ndarray) -> np.ndarray:
        words[5, 1] += np.where(words[5, 1] & 15 < 14, 1, -1).astype(np.int64).astype(np.uint32)
        return words

    change_tensor(folder, "model.layers.1.mlp.gate_up_proj.q_weight", next_code)
    found = verify(llama, folder, Thresholds(top1=0.3))
    found.check()
    (difference,) = found.weights
    assert difference.rounding and difference.share == 1 / (128 * 64)
    assert report(found)[0] == (
        "weights: 1 differ by rounding from what q4f16_1 makes of the checkpoint"
    )


# Broken ones


@pytest.mark.parametrize("scheme", ["q0f32", "q4f16_1"])
def test_a_changed_tensor_is_found_in_its_layer(
    scheme: str, llama: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = shutil.copytree(request.getfixturevalue(scheme), tmp_path / "copy")
    name = "model.layers.1.mlp.down_proj." + ("weight" if scheme == "q0f32" else "q_scale")
    change_tensor(folder, name, lambda values: np.roll(values, 1, axis=0))
    found = verify(llama, folder, Thresholds(top1=0, kl=9), opt="act_quant=0")
    assert found.comparisons[-1].first_diverging == 2
    message = failure(found)
    kind = (
        "the checkpoint in float32" if scheme == "q0f32" else "the values that the library stores"
    )
    assert message.startswith(
        f"{found.library} does not pass. Against {kind} the largest error of a logit is "
    )
    assert " First diverging: layer 1 (relative error " in message
    assert message.endswith(
        f" 1 of the parameters in {folder} is not what {scheme} makes of {llama}: "
        "model.layers.1.mlp.down_proj.weight."
    )
    assert any(line.endswith("  <- first") and "layer 1 " in line for line in report(found))


def test_swapped_norms_are_found_in_their_layer(llama: Path, q0f32: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(q0f32, tmp_path / "copy")
    names = [f"model.layers.2.{part}_layernorm.weight" for part in ("input", "post_attention")]
    first, second = (WeightFolder(q0f32).load(name) for name in names)
    change_tensor(folder, names[0], lambda _: second)
    change_tensor(folder, names[1], lambda _: first)
    found = verify(llama, folder)
    assert found.comparisons[0].first_diverging == 3
    assert [difference.name for difference in found.wrong_weights] == names
    assert "First diverging: layer 2 (" in failure(found)


def test_a_damaged_final_norm_is_told_from_the_layers(
    llama: Path, q0f32: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(q0f32, tmp_path / "copy")
    change_tensor(folder, "model.norm.weight", lambda weight: weight * np.float32(1.01))
    assert (
        "Every layer is as exact as expected, so the error begins in the final norm or the head."
    ) in failure(verify(llama, folder))


def test_weights_that_are_not_finite_are_found(llama: Path, q0f32: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(q0f32, tmp_path / "copy")

    def poison(values: np.ndarray) -> np.ndarray:
        values[3, 3] = np.nan
        return values

    change_tensor(folder, "model.layers.1.self_attn.o_proj.weight", poison)
    found = verify(llama, folder)
    assert "the largest error of a logit is inf standard deviations" in failure(found)
    assert found.comparisons[0].first_diverging == 2
    content = found.as_json()
    json.dumps(content, allow_nan=False)
    assert content["comparisons"][0]["total"]["max_error"] is None


def test_another_rope_theta_is_found_in_the_first_layer(
    llama: Path, q0f32: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(q0f32, tmp_path / "copy")
    path = folder / "mlc-chat-config.json"
    content = json.loads(path.read_text())
    content["model_config"]["rope_theta"] = 700.0
    path.write_text(json.dumps(content))
    found = verify(llama, folder)
    message = failure(found)
    assert "First diverging: layer 0 (relative error " in message
    assert message.endswith(
        "Library and checkpoint differ in rope.rope_theta: 700.0 in the library, 5000.0 in "
        f"{llama}."
    )


# Input that cannot be verified


def test_missing_packages_are_asked_for_first(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(VersionError) as raised:
        prepare(tmp_path / "no-such-folder", llama, TEXTS)
    assert str(raised.value) == (
        "verify runs the original model with torch and transformers, which cannot be imported "
        "(import of transformers halted; None in sys.modules): "
        'pip install "relaxlm[test]", which brings torch==2.13.0'
    )


def test_what_is_no_checkpoint_is_refused(llama: Path, q0f32: Path, tmp_path: Path) -> None:
    for source, message in (
        (
            tmp_path / "absent",
            "{} is not a folder, expected a Hugging Face folder with config.json and "
            "model.safetensors",
        ),
        (
            q0f32,
            "{}: no weights found, expected model.safetensors or pytorch_model.bin, or one of them "
            "with .index.json and the files it names; ndarray-cache.json belongs to weights that "
            "are already converted; they need no convert_weight",
        ),
    ):
        with pytest.raises(CheckpointError) as raised:
            prepare(source, q0f32, TEXTS)
        assert str(raised.value) == message.format(source)


def test_a_checkpoint_that_transformers_finds_incomplete_is_refused(
    llama: Path, q0f32: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(llama, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as raised:
        prepare(source, q0f32, TEXTS, device="cpu").run()
    assert str(raised.value) == (
        f"{source}: transformers misses weights in it, or they have other shapes: "
        "model.layers.1.mlp.up_proj.weight, model.norm.weight"
    )


def test_a_checkpoint_that_transformers_does_not_load_is_refused(
    llama: Path, q0f32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments, **options):
        raise RuntimeError("a tensor is odd\nand more")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(CheckpointError) as raised:
        prepare(llama, q0f32, TEXTS, device="cpu").run()
    assert str(raised.value) == (
        f"{llama}: transformers {transformers.__version__} does not load it as a language model "
        "(RuntimeError: a tensor is odd). relaxlm was tested with the packages of "
        'pip install "relaxlm[test]"'
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 300}, "vocab_size is 260, not 300"),
        (
            {"model_type": "qwen3", "num_hidden_layers": 2},
            "model_type is llama, not qwen3; num_hidden_layers is 3, not 2",
        ),
        ({"head_dim": 8}, "head_dim is 16, not 8"),
    ],
)
def test_a_library_of_another_model_is_refused(
    llama: Path, q0f32: Path, tmp_path: Path, change: dict, words: str
) -> None:
    other = shutil.copytree(llama, tmp_path / "other")
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**raw, **change}))
    library = prepare(llama, q0f32, TEXTS, device="cpu").library.path
    with pytest.raises(LibraryError) as raised:
        prepare(other, q0f32, TEXTS, device="cpu")
    assert str(raised.value) == (
        f"{library} was compiled for another model than {other}: {words}. Give the checkpoint that "
        "it was made from, or compile for this one"
    )


def test_a_library_and_weights_in_another_preset_are_refused(
    llama: Path, q0f32: Path, q4f16_1: Path
) -> None:
    library = prepare(llama, q0f32, TEXTS, device="cpu").library.path
    with pytest.raises(WeightsError, match=f"^{q4f16_1}: the weights do not fit the model: "):
        prepare(llama, library, TEXTS, weights=q4f16_1).run()


def test_options_that_contradict_each_other_are_refused(llama: Path, q0f32: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        prepare(llama, q0f32, TEXTS, weights=q0f32)
    assert str(raised.value) == (
        f"--weights {q0f32} goes with a library, but {q0f32} is a folder and has its own weights: "
        "give its library with --model-lib, or leave --weights out"
    )
    with pytest.raises(ConfigError) as raised:
        prepare(llama, Path("a.so"), TEXTS, model_lib=Path("b.so"))
    assert str(raised.value) == (
        "--model-lib b.so goes with a converted folder, but a.so is none: give the library's "
        "weights with --weights FOLDER"
    )
    library = prepare(llama, q0f32, TEXTS, device="cpu").library.path
    with pytest.raises(ConfigError, match=r"device 'cuda', but .* was compiled for cpu"):
        prepare(llama, library, TEXTS, weights=q0f32, device="cuda")
    for option in ("opt", "overrides"):
        with pytest.raises(ConfigError, match=f"^{option} = 'x' is for compiling, and a.so is "):
            prepare(llama, q0f32, TEXTS, model_lib=Path("a.so"), **{option: "x"})
        with pytest.raises(ConfigError, match=f"^{option} = 'x' is for compiling, and a.so is "):
            prepare(llama, Path("a.so"), TEXTS, **{option: "x"})


def test_texts_without_usable_tokens_are_refused(llama: Path, q0f32: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as raised:
        prepare(llama, q0f32, ["a", ""], device="cpu")
    assert str(raised.value) == "prompt '' has no tokens, expected at least one"

    folder = shutil.copytree(q0f32, tmp_path / "copy")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = 290
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(RequestError) as raised:
        prepare(llama, folder, ["b", "a"], device="cpu")
    assert str(raised.value) == (
        "prompt 'a' has the token id 290, and the model has 260 tokens; is "
        f"{folder}/tokenizer.json the tokenizer of this model?"
    )

    (folder / "tokenizer.json").unlink()  # the checkpoint's own is taken
    assert prepare(llama, folder, ["a"], device="cpu").texts == [("a", [64])]
    bare = shutil.copytree(llama, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=f"^{bare}: no tokenizer.json"):
        prepare(bare, folder, ["a"], device="cpu")
