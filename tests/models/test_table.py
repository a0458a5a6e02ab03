"""The table of families says what its tests compared."""

import numpy as np
import pytest

from relaxlm.models import MODELS
from tests.models import families, parity
from tests.models.families import Measured, Recorder, table


def test_a_row_for_every_family_of_what_was_measured_last() -> None:
    old = "| `qwen3` | Qwen3 | transformers | 1e-06 | 2e-06 | 2001-01-01 |\n| `gone` | a |\n"
    measured = {"llama": Measured({"q0f32": 1.24e-6, "q4f16_1": 3e-6}, {"transformers"})}
    rows = table(measured, {"qwen2"}, old, "2002-02-02").splitlines()[2:]
    assert [text.split("`")[1] for text in rows] == sorted(MODELS)
    found = {text.split("`")[1]: text.split(" | ")[2:] for text in rows}
    assert found["llama"] == ["transformers", "1e-06", "3e-06", "2002-02-02 |"]
    assert found["qwen3"] == ["transformers", "1e-06", "2e-06", "2001-01-01 |"]
    assert found["qwen2"] == ["not yet"] * 3 + ["not yet |"]
    failed = table({}, {"qwen3"}, old, "2002-02-02")
    assert "2001-01-01" not in failed


@pytest.mark.parametrize("model_type", MODELS)
def test_every_family_says_what_runs(model_type: str) -> None:
    text = families.runs(model_type)
    assert 0 < len(text) < 100 and "|" not in text and "\n" not in text


def test_only_logits_of_compiled_models_count(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = np.array([[4.0, -8.0]], np.float32)
    monkeypatch.setattr(parity.Compiled, "__init__", lambda *given, **named: None)
    monkeypatch.setattr(parity.Compiled, "run", lambda *given: [expected + np.float32(2**-10)])
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        recorder._listen(patch)
        for overrides, scheme in (("", "q0f32"), ("kv_cache_dtype=float16", "q4f16_1")):
            compiled = parity.Compiled({"model_type": "llama"}, {}, scheme, overrides)
            (logits,) = compiled.run([], [])
            np.testing.assert_allclose(logits, expected, rtol=1e-2)
        np.testing.assert_allclose(expected, expected)
    assert recorder._found == [("llama", "q0f32", 2**-13), ("llama", "", 2**-13)]
