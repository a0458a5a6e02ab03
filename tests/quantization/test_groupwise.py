"""The group format against a slow transcription of its definition, one element at a time."""

import ml_dtypes
import numpy as np
import pytest

from relaxlm.errors import CheckpointError, UnsupportedError
from relaxlm.quantization import groupwise
from relaxlm.quantization.groupwise import FLOAT_DTYPES, GroupQuant, cast, round_to

FORMATS = {
    "q4f16 NK": GroupQuant(4, 32, "NK", "float16"),
    "q4f16 KN": GroupQuant(4, 32, "KN", "float16"),
    "q4f32 NK": GroupQuant(4, 32, "NK", "float32"),
    "q4bf16 NK": GroupQuant(4, 32, "NK", "bfloat16"),
    "q4bf16 KN": GroupQuant(4, 32, "KN", "bfloat16"),
    "q3f16 NK": GroupQuant(3, 40, "NK", "float16"),
    "q3f16 KN": GroupQuant(3, 40, "KN", "float16"),
    "q8f16 NK": GroupQuant(8, 32, "NK", "float16"),
}
every_format = pytest.mark.parametrize("quant", FORMATS.values(), ids=FORMATS.keys())


def slow_quantize(weight: np.ndarray, quant: GroupQuant) -> dict[str, np.ndarray]:
    """The documented formulas on NumPy scalars of the model's dtype."""
    scalar = FLOAT_DTYPES[quant.dtype].type
    top = scalar(2 ** (quant.bits - 1) - 1)
    rows, columns = weight.shape
    groups = -(-columns // quant.group)
    lanes = 32 // quant.bits
    words = [[0] * (groups * quant.group // lanes) for _ in range(rows)]
    scales = np.zeros((rows, groups), FLOAT_DTYPES[quant.dtype])
    for n in range(rows):
        for g in range(groups):
            members = range(g * quant.group, min((g + 1) * quant.group, columns))
            values = [scalar(weight[n, k]) for k in members]
            scale = scalar(max(abs(value) for value in values) / top)
            scales[n, g] = scale
            for k, value in zip(members, values, strict=True):
                step = scalar(scalar(value / scale) + top) if scale != 0 else top
                code = min(max(int(np.rint(step)), 0), 2 * int(top))
                words[n][k // lanes] |= code << (k % lanes * quant.bits)
    q_weight = np.array(words, np.uint32)
    if quant.layout == "KN":
        return {"q_weight": q_weight.T, "q_scale": scales.T}
    return {"q_weight": q_weight, "q_scale": scales}


@pytest.mark.parametrize("shape", [(3, 320), (5, 33), (2, 40), (7, 8), (1, 81)])
@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32"])
@every_format
def test_the_arrays_are_those_of_the_definition(
    quant: GroupQuant, source: str, shape: tuple[int, int]
) -> None:
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal(shape) * 0.05).astype(FLOAT_DTYPES[source])
    arrays, expected = quant.quantize(weight), slow_quantize(weight, quant)
    for key, (stored_shape, dtype) in quant.storage(shape).items():
        assert arrays[key].shape == stored_shape
        assert arrays[key].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(arrays[key], expected[key])


@every_format
def test_ties_tiny_and_huge_values_are_those_of_the_definition(quant: GroupQuant) -> None:
    rng = np.random.default_rng(2)
    half_steps = rng.integers(-2 * quant.max_int, 2 * quant.max_int + 1, (6, 120)) / 2
    powers = 2.0 ** rng.integers(-24, 15, (6, 1)) / quant.max_int
    ties = half_steps * powers
    subnormal = rng.integers(-300, 301, (6, 120)) * 2.0**-24
    huge = rng.uniform(-65504, 65504, (6, 120))
    weight = np.concatenate([ties, subnormal, huge]).astype(np.float32)
    with np.errstate(all="ignore"):
        expected = slow_quantize(weight, quant)
    for key, array in quant.quantize(weight).items():
        np.testing.assert_array_equal(array, expected[key])


@every_format
def test_element_i_of_a_word_is_in_bits_i_times_bits(quant: GroupQuant) -> None:
    weight = np.zeros((1, quant.group), np.float32)
    weight[0, :3] = [quant.max_int, -quant.max_int, 1]  # scale 1, so codes are weights + max_int
    codes = [quant.max_int] * quant.per_word
    codes[:3] = [2 * quant.max_int, 0, quant.max_int + 1]
    word = sum(code << (i * quant.bits) for i, code in enumerate(codes))
    assert quant.quantize(weight)["q_weight"].reshape(-1)[0] == word


@every_format
def test_columns_past_the_end_are_zero_bits(quant: GroupQuant) -> None:
    weight = np.full((1, quant.group + 1), 0.5, np.float32)
    words = quant.quantize(weight)["q_weight"].reshape(-1)
    first_of_last_group = words[quant.group // quant.per_word]
    assert first_of_last_group == 2 * quant.max_int
    assert not words[quant.group // quant.per_word + 1 :].any()


@every_format
def test_the_error_is_at_most_half_a_step(quant: GroupQuant) -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((16, 400)).astype(FLOAT_DTYPES[quant.dtype])
    arrays = quant.quantize(weight)
    decoded = quant.dequantize(arrays, weight.shape)
    assert decoded.dtype == np.float32
    scale = arrays["q_scale"].T if quant.layout == "KN" else arrays["q_scale"]
    step = np.repeat(scale.astype(np.float32), quant.group, axis=1)[:, :400]
    # Rounding of the quotient and of the sum in the model's dtype moves a tie by this much.
    slack = 2 * quant.max_int * float(ml_dtypes.finfo(FLOAT_DTYPES[quant.dtype]).eps)
    assert (np.abs(decoded - weight.astype(np.float32)) <= step * (0.5 + slack)).all()


@every_format
def test_zero_groups_decode_to_exactly_zero(quant: GroupQuant) -> None:
    weight = np.random.default_rng(4).standard_normal((4, 3 * quant.group)).astype(np.float32)
    weight[1] = 0
    weight[2, quant.group : 2 * quant.group] = 0
    weight[3, : quant.group] = 1e-9 if quant.dtype == "float16" else 1e-45  # the scale underflows
    decoded = quant.dequantize(quant.quantize(weight), weight.shape)
    assert np.isfinite(decoded).all()
    assert not decoded[1].any()
    assert not decoded[2, quant.group : 2 * quant.group].any()
    assert not decoded[3, : quant.group].any()
    assert decoded[0].any() and decoded[2, : quant.group].any()


def test_experts_are_stored_one_matrix_after_the_other() -> None:
    quant = FORMATS["q4f16 NK"]
    weight = np.random.default_rng(5).standard_normal((3, 5, 64)).astype(np.float16)
    arrays = quant.quantize(weight)
    assert arrays["q_weight"].shape == (3, 5, 8) and arrays["q_scale"].shape == (3, 5, 2)
    for expert in range(3):
        for key, array in quant.quantize(weight[expert]).items():
            np.testing.assert_array_equal(arrays[key][expert], array)
    decoded = quant.dequantize(arrays, weight.shape)
    assert np.abs(decoded - weight.astype(np.float32)).max() < 0.3


def test_the_transposed_layout_refuses_experts() -> None:
    with pytest.raises(UnsupportedError) as caught:
        FORMATS["q4f16 KN"].storage((3, 5, 64))
    assert str(caught.value) == (
        "the transposed layout holds matrices only, not a weight of shape (3, 5, 64); "
        "use a preset that ends in _1, such as q4f16_1"
    )


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(6).standard_normal((37, 70)).astype(np.float32)
    for quant in FORMATS.values():
        whole = quant.quantize(weight)
        decoded = quant.dequantize(whole, weight.shape)
        monkeypatch.setattr(groupwise, "BLOCK_ELEMENTS", 5 * 70)
        parts = quant.quantize(weight)
        for key in whole:
            np.testing.assert_array_equal(whole[key], parts[key])
        np.testing.assert_array_equal(decoded, quant.dequantize(parts, weight.shape))
        monkeypatch.undo()


def test_write_rows_returns_what_was_stored() -> None:
    weight = np.random.default_rng(7).standard_normal((6, 70)).astype(np.float32)
    for quant in FORMATS.values():
        arrays = quant.empty(weight.shape)
        parts = [quant.write_rows(arrays, start, weight[start : start + 2]) for start in (0, 2, 4)]
        stored = quant.dequantize(arrays, weight.shape)
        np.testing.assert_array_equal(np.concatenate(parts), stored)


def test_dequantize_refuses_arrays_of_another_shape() -> None:
    quant = FORMATS["q4f16 NK"]
    arrays = quant.quantize(np.ones((4, 64), np.float32))
    with pytest.raises(ValueError, match=r"q_weight has shape \(4, 8\), expected \(4, 12\)"):
        quant.dequantize(arrays, (4, 96))


def test_rounding_to_float16_equals_numpys_conversion() -> None:
    rng = np.random.default_rng(8)
    half = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    between = (half[:-1] + half[1:]) / 2  # exact in float32: the ties
    ties = between.astype(np.float32)
    around = [np.nextafter(ties, np.float32(0)), ties, np.nextafter(ties, np.float32(np.inf))]
    random = rng.integers(0, 2**32, 2_000_000, dtype=np.uint32).view(np.float32)
    random = random[np.isfinite(random)]
    values = np.concatenate([*around, half.astype(np.float32), random])
    values = np.concatenate([values, -values])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
        rounded = round_to(values, "float16")
        beyond = np.isinf(expected)
        assert (np.abs(rounded[beyond]) > 65504).all()
        np.testing.assert_array_equal(rounded[~beyond], expected[~beyond])
        brain = values.astype(FLOAT_DTYPES["bfloat16"])
        brain = brain[np.abs(brain.astype(np.float32)) < 65504]
        np.testing.assert_array_equal(round_to(brain, "float16"), brain.astype(np.float16))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_rounded_once_more_equals_arithmetic_in_the_narrow_dtype(dtype: str) -> None:
    """Rounding a float32 result again gives the correctly rounded narrow one, as float64 shows."""
    rng = np.random.default_rng(9)
    narrow = FLOAT_DTYPES[dtype]
    dividend = rng.standard_normal(400_000).astype(narrow).astype(np.float64)
    divisor = rng.uniform(0.01, 1, 400_000).astype(narrow).astype(np.float64)
    quotient = (dividend.astype(np.float32) / divisor.astype(np.float32)).astype(np.float32)
    total = quotient + np.float32(7)
    exact_sum = quotient.astype(np.float64) + 7
    for emulated, exact in ((quotient, dividend / divisor), (total, exact_sum)):
        once = emulated.astype(narrow).astype(np.float64)
        step = np.abs(
            np.nextafter(once.astype(narrow), narrow.type(np.inf)).astype(np.float64) - once
        )
        below = np.abs(
            np.nextafter(once.astype(narrow), narrow.type(-np.inf)).astype(np.float64) - once
        )
        assert (np.abs(exact - once) <= np.maximum(step, below) / 2).all()


@pytest.mark.parametrize(
    "value, found", [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")]
)
@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32"])
@every_format
def test_values_that_are_not_finite_are_refused(
    quant: GroupQuant, source: str, value: float, found: str
) -> None:
    weight = np.ones((4, 80), FLOAT_DTYPES[source])
    weight[2, 50] = value
    expected = (
        f"model.x.weight: contains {found}; weights must be finite. "
        "Is the download damaged, or did training diverge?"
    )
    for act in (
        lambda: quant.quantize(weight, "model.x.weight"),
        lambda: cast(weight, quant.dtype, "model.x.weight"),
    ):
        with pytest.raises(CheckpointError) as caught:
            act()
        assert str(caught.value) == expected


@pytest.mark.parametrize("value", [65520.0, -1e30])
def test_values_beyond_float16_are_refused_not_saturated(value: float) -> None:
    weight = np.ones((2, 64), np.float32)
    weight[1, 5] = value
    expected = (
        f"w: a value of magnitude {abs(value):.6g} does not fit float16 (largest 65504); "
        "use a preset with a wider dtype: q4bf16_1, q4f32_1, q0bf16 or q0f32"
    )
    for act in (
        lambda: FORMATS["q4f16 NK"].quantize(weight, "w"),
        lambda: cast(weight, "float16", "w"),
    ):
        with pytest.raises(CheckpointError) as caught:
            act()
        assert str(caught.value) == expected
    weight[1, 5] = 65519.0  # rounds to 65504
    assert FORMATS["q4f16 NK"].quantize(weight)["q_scale"][1, 0] == np.float16(65504) / 7
    assert cast(weight, "float16", "w")[1, 5] == 65504
