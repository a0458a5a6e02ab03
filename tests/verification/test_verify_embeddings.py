"""Libraries for embeddings against transformers: states, and the vectors of texts."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from relaxlm.cli import main as program
from relaxlm.errors import ConfigError
from relaxlm.verification.metrics import compare_vectors
from relaxlm.verification.report import report
from relaxlm.verification.verify import Thresholds, prepare
from tests.tiny_embedder import TinyEmbedder
from tests.tiny_model import convert
from tests.verification.test_verify import change_tensor, failure

TEXTS = ("the cat sat on the mat", "a dog ran to the house, and hello world")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELAXLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=["encoder", "decoder"])
def model(request: pytest.FixtureRequest) -> TinyEmbedder:
    name = "tiny_encoder" if request.param == "encoder" else "tiny_embedder"
    return request.getfixturevalue(name)


def verify(model: TinyEmbedder, thresholds: Thresholds | None = None, folder: Path | None = None):
    job = prepare(model.source, folder or model.folder, TEXTS, model_lib=model.library)
    assert job.pooling == model.pooling
    return job.run(thresholds)


def test_vectors_are_those_of_transformers(model: TinyEmbedder) -> None:
    found = verify(model)
    found.check()
    (comparison,) = found.comparisons
    total = comparison.total
    assert 0 < total.relative_error < 2e-5 and total.vectors == 2
    assert 1 - 1e-10 < total.cosine <= 1
    assert total.rows == sum(len(model.token_ids(text)) for text in TEXTS)
    assert comparison.first_diverging is None and max(comparison.layers) < 1e-5
    assert not found.weights and not found.settings
    assert max(map(len, report(found))) <= 80


def test_the_vectors_compared_are_those_of_the_texts(tiny_encoder: TinyEmbedder) -> None:
    expected = tiny_encoder.vectors([TEXTS[0]])[0]
    rng = np.random.default_rng(0)
    states = rng.standard_normal((9, len(expected)), np.float32)
    other = states + rng.standard_normal(states.shape).astype(np.float32)
    distance = compare_vectors(states, other, lambda x: x.mean(0))
    a, b = states.mean(0), other.mean(0)
    assert distance.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
    assert distance.max_error == pytest.approx(np.abs(other - states).max())
    states[3, 3] = np.nan
    assert compare_vectors(other, states, lambda x: x.mean(0)).cosine == -np.inf


def test_a_quantized_encoder_is_exact_about_what_it_stores(
    tiny_encoder: TinyEmbedder, tmp_path: Path
) -> None:
    folder = convert(tiny_encoder.source, tmp_path / "q4f16_1", "q4f16_1")
    found = prepare(tiny_encoder.source, folder, TEXTS, device="cpu", opt="act_quant=0").run()
    found.check()
    floats, stored = found.comparisons
    assert stored.total.relative_error < 1e-4 and stored.total.cosine > 1 - 1e-8
    assert 0.8 < floats.total.cosine < 0.9999


def test_a_changed_tensor_is_found_in_its_layer(model: TinyEmbedder, tmp_path: Path) -> None:
    folder = shutil.copytree(model.folder, tmp_path / "copy")
    records = json.loads((folder / "tensor-cache.json").read_text())["records"]
    names = [record["name"] for shard in records for record in shard["records"]]
    (name,) = [
        n
        for n in names
        if ".1." in n
        and n.endswith(("output.dense.weight", "down_proj.weight"))
        and "attention" not in n
    ]
    change_tensor(folder, name, lambda values: np.roll(values, 1, axis=0))
    found = verify(model, folder=folder)
    message = failure(found)
    assert "Against the checkpoint in float32 the largest error of a state is " in message
    assert "Against the checkpoint in float32 the smallest cosine is 0." in message
    assert "required are 1 - 1.0e-09." in message
    assert " First diverging: layer 1 (relative error " in message
    assert [difference.name for difference in found.wrong_weights] == [name]


def test_limits_of_what_is_not_computed_are_refused(
    tiny_encoder: TinyEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as raised:
        verify(tiny_encoder, Thresholds(kl=1))
    assert str(raised.value) == (
        "--threshold and --min-top1 are limits of logits, and the library is for embeddings: give "
        "--min-cosine or --max-error"
    )
    with pytest.raises(ConfigError) as raised:
        Thresholds(cosine=0.5).check(for_embeddings=False)
    assert str(raised.value) == (
        "--min-cosine is a limit of embeddings, and the library computes logits: give --threshold, "
        "--min-top1 or --max-error"
    )
    monkeypatch.setattr(program, "COMMANDS", ("verify",))
    words = ["verify", tiny_encoder.source, tiny_encoder.folder, "--prompt", TEXTS[0]]
    words += ["--model-lib", tiny_encoder.library, "--min-cosine", "1"]
    result = CliRunner().invoke(program.app, list(map(str, words)), prog_name="relaxlm")
    assert result.exit_code == 1
    assert "the smallest cosine is 1 - " in result.stderr
    assert result.stderr.endswith(
        ", required are 1 - 0.0e+00. Every layer is as exact as expected, so the error begins in "
        "the final norm.\n"
    )
