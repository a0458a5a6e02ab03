import sys
from subprocess import run

import pytest

from relaxlm.errors import ConfigError
from relaxlm.models.weights import ParameterSpec, Role
from relaxlm.quantization.schemes import SCHEMES, get_scheme


def spec(role: Role, shape: tuple[int, ...] = (96, 80)) -> ParameterSpec:
    return ParameterSpec("model.x.weight", shape, role, ())


def test_the_presets_are_those_of_the_issue() -> None:
    assert list(SCHEMES) == [
        *("q0f32", "q0f16", "q0bf16", "q4f16_0", "q4f16_1", "q4f16_2", "q4f32_1"),
        *("q4bf16_0", "q4bf16_1", "q3f16_0", "q3f16_1", "q8f16_1"),
    ]
    assert all(scheme.name == name for name, scheme in SCHEMES.items())


@pytest.mark.parametrize(
    "name, weight, scale",
    [
        ("q4f16_1", ((96, 12), "uint32"), ((96, 3), "float16")),
        ("q4f16_0", ((12, 96), "uint32"), ((3, 96), "float16")),
        ("q4f16_2", ((96, 12), "uint32"), ((96, 3), "float16")),
        ("q4f32_1", ((96, 12), "uint32"), ((96, 3), "float32")),
        ("q4bf16_0", ((12, 96), "uint32"), ((3, 96), "bfloat16")),
        ("q4bf16_1", ((96, 12), "uint32"), ((96, 3), "bfloat16")),
        ("q3f16_0", ((8, 96), "uint32"), ((2, 96), "float16")),
        ("q3f16_1", ((96, 8), "uint32"), ((96, 2), "float16")),
        ("q8f16_1", ((96, 24), "uint32"), ((96, 3), "float16")),
    ],
)
def test_a_linear_weight_becomes_codes_and_scales(name: str, weight: tuple, scale: tuple) -> None:
    assert get_scheme(name).storage(spec("linear")) == {
        "model.x.q_weight": weight,
        "model.x.q_scale": scale,
    }


@pytest.mark.parametrize("name", ["q4f16_0", "q4bf16_0", "q3f16_0"])
def test_transposed_presets_keep_embedding_rows_together(name: str) -> None:
    scheme = get_scheme(name)
    assert scheme.storage(spec("embedding"))["model.x.q_weight"][0][0] == 96
    assert scheme.storage(spec("lm_head"))["model.x.q_weight"][0][1] == 96


def test_q4f16_2_keeps_embedding_and_head_in_float16() -> None:
    scheme = get_scheme("q4f16_2")
    for role in ("embedding", "lm_head"):
        assert scheme.storage(spec(role)) == {"model.x.weight": ((96, 80), "float16")}


@pytest.mark.parametrize("name", SCHEMES)
def test_vectors_are_never_quantized(name: str) -> None:
    scheme = get_scheme(name)
    assert scheme.storage(spec("vector", (80,))) == {"model.x.weight": ((80,), scheme.dtype)}


@pytest.mark.parametrize("name, dtype", [("q0f32", "float32"), ("q0bf16", "bfloat16")])
def test_unquantized_presets_store_every_role_in_their_dtype(name: str, dtype: str) -> None:
    for role in ("linear", "embedding", "lm_head"):
        assert get_scheme(name).storage(spec(role)) == {"model.x.weight": ((96, 80), dtype)}


def test_an_unknown_preset_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError) as caught:
        get_scheme("q5f16_1")
    assert str(caught.value) == (
        "quantization 'q5f16_1' is not known, expected one of: q0f32, q0f16, q0bf16, q4f16_0, "
        "q4f16_1, q4f16_2, q4f32_1, q4bf16_0, q4bf16_1, q3f16_0, q3f16_1, q8f16_1"
    )


def test_schemes_do_not_import_tvm() -> None:
    code = "import sys, relaxlm.quantization.schemes; sys.exit('tvm' in sys.modules)"
    assert run([sys.executable, "-c", code]).returncode == 0
