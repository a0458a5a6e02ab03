"""What a preset keeps of a checkpoint, written into the reference, and the folder compared."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from relaxlm.models.weights import ParameterSpec, Source
from relaxlm.quantization.container import ContainerWriter
from relaxlm.quantization.schemes import SCHEMES, get_scheme
from relaxlm.runtime.params import WeightFolder
from relaxlm.verification import kept_weights
from relaxlm.verification.kept_weights import WeightDifference, has_all, keep_weights

SPECS = [
    ParameterSpec("table.weight", (11, 50), "embedding", (Source("table.weight", (11, 50)),)),
    ParameterSpec(
        "qkv.weight",
        (9, 50),
        "linear",
        (Source("q.weight", (4, 50)), Source("k.weight", (2, 50)), Source("v.weight", (3, 50))),
    ),
    ParameterSpec("norm.weight", (50,), "vector", (Source("norm.weight", (50,)),)),
]


def random_state() -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(12)
    return {
        source.name: torch.from_numpy(rng.standard_normal(source.shape).astype(np.float32))
        for spec in SPECS
        for source in spec.sources
    }


def kept(scheme_name: str, state: dict[str, torch.Tensor]) -> dict[str, dict[str, np.ndarray]]:
    """Parameter -> stored arrays, by the schemes' own functions."""
    scheme, result = get_scheme(scheme_name), {}
    for spec in SPECS:
        value = np.concatenate([state[source.name].numpy() for source in spec.sources])
        quant = scheme.for_role(spec.role)
        dtype = ml_dtypes.bfloat16 if scheme.dtype == "bfloat16" else scheme.dtype
        arrays = list(quant.quantize(value).values()) if quant else [value.astype(dtype)]
        result[spec.name] = dict(zip(scheme.storage(spec), arrays, strict=True))
    return result


def write(folder: Path, stored: dict[str, dict[str, np.ndarray]], format="raw") -> WeightFolder:
    with ContainerWriter(folder, format) as writer:
        for arrays in stored.values():
            for name, array in arrays.items():
                writer.add(name, array)
        writer.finish(1000)
    return WeightFolder(folder)


@pytest.mark.parametrize("block", [60, 1 << 22])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_reference_gets_what_the_preset_keeps(
    scheme: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_weights, "_BLOCK_VALUES", block)
    state = random_state()
    weights = write(tmp_path, kept(scheme, state))
    expected = {}
    for spec in SPECS:
        quant = get_scheme(scheme).for_role(spec.role)
        for source in spec.sources:
            value = state[source.name].numpy()
            dtype = get_scheme(scheme).dtype
            expected[source.name] = (
                quant.dequantize(quant.quantize(value), value.shape)
                if quant
                else value.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
            ).astype(np.float32)
    assert keep_weights(state, SPECS, get_scheme(scheme), weights) == []
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name], err_msg=name)


@pytest.mark.parametrize("scheme", ["q4f16_1", "q4f16_0", "q3f16_1", "q8f16_1"])
def test_neighbouring_codes_are_rounding_if_they_are_few(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_weights, "_ROUNDED_SHARE", 2 / 550)
    quant = get_scheme(scheme).embedding
    assert quant is not None
    state = random_state()
    original = {name: tensor.clone() for name, tensor in state.items()}
    stored = kept(scheme, state)
    words = stored["table.weight"]["table.q_weight"]
    mask = (1 << quant.bits) - 1
    for row, count in ((3, 1), (7, 2), (9, 3)):
        words[row, 0] += 1 if words[row, 0] & mask < 2 * quant.max_int else np.uint32(2**32 - 1)
        found = keep_weights(state, SPECS, get_scheme(scheme), write(tmp_path / str(count), stored))
        rounding = count <= 2
        assert [(d.name, d.rounding) for d in found] == [("table.weight", rounding)]
        assert found[0].share == pytest.approx(count / 550)
        # The folder's own values, or those that should be in it.
        arrays = {part.rpartition(".")[2]: a for part, a in stored["table.weight"].items()}
        theirs = quant.dequantize(arrays, (11, 50))
        assert (state["table.weight"].numpy() == theirs).all() == rounding
        state = {name: tensor.clone() for name, tensor in original.items()}


def test_a_code_that_is_two_steps_away_is_wrong(tmp_path: Path) -> None:
    state = random_state()
    stored = kept("q4f16_1", state)
    words = stored["qkv.weight"]["qkv.q_weight"]
    words[5, 0] += 2 if words[5, 0] & 15 < 12 else np.uint32(2**32 - 2)
    scale = float(stored["qkv.weight"]["qkv.q_scale"][5, 0])
    (found,) = keep_weights(state, SPECS, get_scheme("q4f16_1"), write(tmp_path, stored))
    assert found == WeightDifference("qkv.weight", 1 / 450, pytest.approx(2 * scale), False)


def test_a_plain_value_has_no_neighbour(tmp_path: Path) -> None:
    state = random_state()
    stored = kept("q0f16", state)
    norm = stored["norm.weight"]["norm.weight"]
    norm[7] = np.nextafter(norm[7], np.float16(9))
    (found,) = keep_weights(state, SPECS, get_scheme("q0f16"), write(tmp_path, stored))
    assert (found.name, found.rounding) == ("norm.weight", False)


def test_float32_that_is_stored_as_bfloat16_is_that_of_other_tools(tmp_path: Path) -> None:
    for scheme, rounding in (("q0f32", None), ("q4f32_1", True)):
        state = random_state()
        weights = write(tmp_path / scheme, kept(scheme, state), "f32-to-bf16")
        exact = state["norm.weight"].numpy().copy()
        found = keep_weights(state, SPECS, get_scheme(scheme), weights)
        # Plain values are known to be rounded; scales make quantized ones differ a little.
        assert {difference.rounding for difference in found} == ({rounding} - {None})
        rounded = exact.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(state["norm.weight"].numpy(), rounded)


def test_tensors_that_transformers_keeps_otherwise_are_told() -> None:
    sources = tuple(Source(f"experts.{i}.up_proj.weight", (4, 32)) for i in range(3))
    spec = ParameterSpec("experts.weight", (3, 4, 32), "expert", sources)
    assert not has_all({"experts.up_proj": torch.zeros(3, 4, 32)}, [spec])
    assert has_all({source.name: torch.zeros(4, 32) for source in sources}, [spec])
