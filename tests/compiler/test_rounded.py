"""Matmuls with rounded activations inside a whole model, and when a library has them.

How exactly each kernel computes is shown by its own tests; here rows go through producers, fused
or not, and kernels for one, few and many rows, as the pipeline puts them together.
"""

from dataclasses import replace

import numpy as np
import pytest

from relaxlm import models
from relaxlm.compiler.kernels.isa import NEEDS, Isa, best_isa
from relaxlm.compiler.options import CompileOptions, check_opt, opt_for
from relaxlm.compiler.target import DeviceTarget, resolve_device
from relaxlm.errors import ConfigError
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.cpu import architecture, host_cpu_features, missing_features
from tests.compiler.test_passes import lowered, lowering, names
from tests.models import parity
from tests.models.parity import Compiled, tiny_config

# Sizes that are no multiples of 128, so that blocks have rests, and heads whose outputs are as
# wide as the residual stream.
RAW = tiny_config("qwen2", hidden_size=160, intermediate_size=224)


def device_with(isa: Isa) -> DeviceTarget:
    """This CPU as if it had nothing better than `isa`; skips the test if it lacks that."""
    if missing := missing_features(NEEDS[isa]):
        pytest.skip(f"needs {', '.join(missing)}")
    device = resolve_device("cpu")
    without = ("amx", "avx512", "avxvnni")[: list(NEEDS).index(isa)]
    features = tuple(name for name in device.cpu_features if not name.startswith(without))
    assert best_isa(features.__contains__) == isa
    return replace(device, cpu_features=features)


@pytest.mark.parametrize("isa", [isa for isa in NEEDS if architecture() == "x86_64"])
def test_a_model_differs_by_the_rounding_alone(isa: Isa) -> None:
    device = device_with(isa)
    model = parity.reference_model(RAW)
    state = dict(model.state_dict())
    params = parity.stored_parameters(RAW, state, "q4f16_1")
    model.load_state_dict(parity.dequantized_state(RAW, state, "q4f16_1"), strict=False)
    overrides = "kv_cache_dtype=float32"
    compiled = Compiled(RAW, params, "q4f16_1", overrides, "act_quant=1", device)
    ids = np.random.default_rng(7).integers(0, parity.VOCAB, 37)
    expected = parity.reference_logits(model, ids)
    # Many rows, one row, and few.
    (logits,) = compiled.run([ids], [20, 1, 16])
    error = np.linalg.norm(logits - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert 1e-4 < error.max() < 6e-2


def test_norms_and_products_are_written_rounded() -> None:
    # Heads as wide as the stream: every kind of CPU has kernels for rounded rows of that length.
    plan = replace(lowering({**RAW, "num_hidden_layers": 1, "head_dim": 40}), act_quant=True)
    if best_isa(host_cpu_features().__contains__) is None:
        pytest.skip("no dot products here")
    module = lowered(plan, target=resolve_device("cpu").tvm_target())
    kernels = {name.rstrip("0123456789") for name in names(module)}
    assert {"norm_rounded", "add_norm_rounded", "round"} <= kernels
    # But for the last norm of `hidden_states`, which no matmul reads.
    assert not {"norm", "silu_mul", "matmul"} & kernels
    isa = best_isa(host_cpu_features().__contains__)
    assert ("gated_matmul" if isa == "amx" else "silu_mul_rounded") in kernels


def test_it_is_the_default_where_there_are_kernels_for_it() -> None:
    q4, q0 = get_scheme("q4f16_1"), get_scheme("q0f32")
    v2, v3 = (resolve_device("cpu", f"x86-64-v{level}") for level in (2, 3))
    assert opt_for(None, q4, v3) == "O2;act_quant=1"
    assert opt_for("O3", q4, v3) == "O3;act_quant=1"
    assert opt_for("O3;act_quant=0", q4, v3) == "O3"
    assert opt_for(None, q4, v2) == opt_for(None, q0, v3) == "O2"
    assert opt_for(None, q4, resolve_device("cuda", "sm_80")) == "O2"


@pytest.mark.parametrize(
    ("device", "scheme", "message"),
    [
        (("cuda", "sm_80"), "q4f16_1", "is for device 'cpu', not 'cuda'"),
        (("cpu", "x86-64-v2"), "q4f16_1", "x86-64-v2 is not"),
        (("cpu", "x86-64-v3"), "q0f32", "has no kernels for weights in q0f32 on this CPU (avx2)"),
    ],
)
def test_it_is_refused_where_there_are_none(device, scheme: str, message: str) -> None:
    config = models.load_config(RAW)
    options = CompileOptions.resolve(config, get_scheme(scheme), opt="act_quant=1")
    with pytest.raises(ConfigError) as error:
        check_opt(options, get_scheme(scheme), resolve_device(*device))
    assert str(error.value).startswith("--opt act_quant=1 ")
    assert str(error.value).endswith(message + ". Use act_quant=0")
