"""Libraries with recurrent layers are verified like others."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from relaxlm.verification.results import Verification
from relaxlm.verification.verify import prepare
from tests.tiny_model import TinyModel, compile_library
from tests.verification.test_verify import TEXTS, change_tensor, failure


@pytest.fixture(scope="module", params=["hybrid", "recurrent"])
def model(request: pytest.FixtureRequest) -> TinyModel:
    return request.getfixturevalue(f"{request.param}_tiny")


def verify(model: TinyModel, folder: Path | None = None, library: Path | None = None):
    folder, library = folder or model.folder, library or model.library
    return prepare(model.source, folder, TEXTS, device="cpu", model_lib=library).run()


def exact(found: Verification) -> None:
    found.check()
    (comparison,) = found.comparisons
    assert comparison.reference == "float"
    total = comparison.total
    assert 0 < total.relative_error < 1e-4 and total.kl_mean < 1e-9 and total.top1 == 1
    assert comparison.layers[0] == 0 < max(comparison.layers) < 1e-5


def test_a_float32_library_is_as_exact_as_float32(model: TinyModel) -> None:
    exact(verify(model))


def test_a_change_of_how_fast_a_state_fades_is_found(model: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(model.folder, folder)
    [name] = [name for name in _parameters(model) if "layers.0." in name and "A_log" in name]
    change_tensor(folder, name, lambda values: (values * np.float32(1.5)).astype(values.dtype))
    found = verify(model, folder)
    assert "1 of the parameters" in failure(found) and "layer 0" in failure(found)


def test_a_cache_that_is_not_there_is_not_rounded(
    recurrent_tiny: TinyModel, tmp_path: Path
) -> None:
    library = tmp_path / "rounded.so"
    compile_library(recurrent_tiny.folder, library, "kv_cache_dtype=fp8")
    _, stored = verify(recurrent_tiny, library=library).comparisons
    assert stored.reference == "dequantized" and stored.total.relative_error < 1e-4


def _parameters(model: TinyModel) -> list[str]:
    from relaxlm.runtime.library import Library

    return [param.name for param in Library.load(model.library).metadata.params]
