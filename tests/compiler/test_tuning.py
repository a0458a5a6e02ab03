"""Parameters of kernels: what is allowed, where they come from, and that kernels follow them."""

import json
from pathlib import Path

import numpy as np
import pytest

from relaxlm.compiler.kernels import tuning
from relaxlm.compiler.kernels.isa import best_isa
from relaxlm.compiler.kernels.tuning import Tuning
from relaxlm.compiler.options import parse_opt, with_saved_tuning
from relaxlm.compiler.request import CompileRequest
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import ConfigError
from relaxlm.runtime import jit
from tests.models import parity
from tests.models.parity import Compiled, tiny_config
from tests.tiny_model import TinyModel


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("RELAXLM_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ahead": 100}, "ahead = 100, expected a multiple of 64 from 64 to 65536"),
        ({"task_rows": 0}, "task_rows = 0, expected a multiple of 32 from 32 to 2048"),
        ({"ahead": "128"}, "ahead = 128, expected"),
    ],
)
def test_values_that_no_kernel_takes(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Tuning(**values)
    assert str(error.value).startswith(message)


def test_only_what_differs_is_written(cache: Path) -> None:
    assert str(Tuning()) == "" and str(Tuning(ahead=128)) == "ahead=128"
    assert parse_opt("task_rows=1024 ; O3;ahead=4096") == "O3;task_rows=1024"
    with pytest.raises(ConfigError, match="ahead = 99, expected"):
        parse_opt("ahead=99")


def test_what_was_found_is_used_where_code_is_for_this_machine(cache: Path) -> None:
    here, anywhere = resolve_device("cpu"), resolve_device("cpu", "x86-64-v3")
    assert parse_opt(with_saved_tuning("O2", here) or "") == "O2"
    path = tuning.save(cache, Tuning(ahead=8192, task_rows=1024), [])
    assert path.parent == cache / "tuning" and tuning.saved(cache) == Tuning(8192, 1024)
    assert json.loads(path.read_text())["processor"] == tuning.processor()
    assert with_saved_tuning("O2;task_rows=64", here) == "O2;task_rows=64;ahead=8192"
    assert with_saved_tuning("O2", anywhere) == "O2"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "relaxlm": "0.0.0"}))
    assert tuning.saved(cache) == Tuning()  # found with other kernels
    path.write_text(json.dumps({**content, "parameters": {"ahead": 1000}}))
    with pytest.raises(ConfigError, match=r"ahead = 1000, .*relaxlm tune"):
        tuning.saved(cache)


def test_another_tuning_is_another_library(tiny: TinyModel, cache: Path) -> None:
    before, seen = (
        CompileRequest.read(tiny.folder).identity(),
        jit._seen(tiny.folder, "cpu", None, None),
    )
    tuning.save(cache, Tuning(ahead=128), [])
    request = CompileRequest.read(tiny.folder)
    assert request.options.tuning == Tuning(ahead=128)
    assert request.identity() != before and jit._seen(tiny.folder, "cpu", None, None) != seen


def test_kernels_are_kept_by_tuning() -> None:
    made = []

    @tuning.cached
    def make(size: int) -> Tuning:
        made.append(size)
        return tuning.current()

    with tuning.use(Tuning(ahead=128)):
        assert make(1) == make(1) == Tuning(ahead=128)
    assert make(1) == make(1) == Tuning() and make(2) == Tuning()
    assert made == [1, 1, 2]


def test_results_are_the_same() -> None:
    """Of one row, few, and more than a task has."""
    device = resolve_device("cpu")
    if best_isa(device.cpu_features.__contains__) is None:
        pytest.skip("no dot products here")
    raw = tiny_config("llama", num_hidden_layers=1)
    state = dict(parity.reference_model(raw).state_dict())
    params = parity.stored_parameters(raw, state, "q4f16_1")
    ids = np.random.default_rng(7).integers(0, parity.VOCAB, 71)
    logits = []
    for opt in ("act_quant=1", "act_quant=1;ahead=128;task_rows=32"):
        compiled = Compiled(raw, params, "q4f16_1", "kv_cache_dtype=float32", opt, device)
        logits += compiled.run([ids], [50, 1, 20])
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5, atol=1e-6)
