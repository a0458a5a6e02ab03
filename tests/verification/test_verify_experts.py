"""Mixtures of experts against transformers, which keeps all experts in one tensor."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from relaxlm.runtime.params import WeightFolder
from relaxlm.verification.report import report
from relaxlm.verification.verify import Thresholds
from tests.models.test_moe import VARIANTS
from tests.verification.test_verify import change_tensor, convert, failure, save_checkpoint, verify


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELAXLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("moe"), VARIANTS["qwen3_moe"])


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(source, tmp_path_factory.mktemp("converted") / "moe-q4f16_1", "q4f16_1")


ANY = Thresholds(top1=0, kl=9)


def test_a_quantized_library_is_exact_about_what_it_stores(source: Path, folder: Path) -> None:
    found = verify(source, folder, ANY, opt="act_quant=0")
    found.check()
    floats, stored = found.comparisons
    assert stored.total.relative_error < 3e-3 and stored.total.kl_mean < 1e-6
    assert floats.total.relative_error > 0.1
    assert stored.layers[0] == 0 < floats.layers[0]
    assert not found.weights and stored.rerouted == 0
    lines = report(found)
    assert lines[0] == "weights: exactly what q4f16_1 makes of the checkpoint"
    rows = stored.total.rows
    assert f"tokens beyond: 0 of {rows}, allowed 10% (rounding may choose other experts)" in lines
    assert max(map(len, lines)) <= 80


def test_an_expert_with_anothers_scales_is_found(
    source: Path, folder: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    name = "model.layers.1.mlp.moe_down_proj"
    scales = WeightFolder(folder).load(f"{name}.q_scale")
    change_tensor(broken, f"{name}.q_scale", lambda _: scales[[1, 0, *range(2, len(scales))]])
    found = verify(source, broken, ANY, opt="act_quant=0")
    assert [difference.name for difference in found.wrong_weights] == [f"{name}.weight"]
    # Two of six experts, of which each token sees three: more tokens than rounding may reroute.
    stored = found.comparisons[-1]
    assert stored.rerouted > 0.1 * stored.total.rows and stored.first_diverging == 2
    assert " (without 10 % of the tokens) is " in failure(found)
