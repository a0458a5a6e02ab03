"""Models with recurrent layers, compiled for Metal and OpenCL, give the logits of the CPU.

`tests/models` compares the CPU with transformers and published code.
"""

from collections.abc import Callable

import numpy as np
import pytest

from relaxlm.quantization.schemes import get_scheme
from tests import reference
from tests.compiler import test_gpu_models
from tests.compiler.cuda_emulation import needs_compiler
from tests.compiler.gpu_emulation import has_opencl_driver
from tests.compiler.test_cuda_model_logits import random_parameters
from tests.models import parity, test_gated_delta, test_lfm2, test_mamba2, test_rwkv
from tests.models.parity import Compiled

emulated = test_gpu_models.emulated

IDS = np.random.default_rng(8).integers(0, parity.VOCAB, 9)
# As few layers as there are kinds of them.
RAWS = {
    "rwkv7": {**test_rwkv.VARIANTS["rwkv7"], "num_hidden_layers": 2},
    "mamba2": {**test_mamba2.MAMBA, "num_hidden_layers": 1},
    "qwen3_5_text": test_gated_delta.VARIANTS["qwen3_5_text"],
    "lfm2": {**test_lfm2.LFM2, "num_hidden_layers": 2},
}


def check(emulated: Callable, family: str, kind: str, preset: str, driver: bool = False) -> None:
    raw = RAWS[family]
    params = random_parameters(raw, get_scheme(preset))
    # A prompt in two parts beside a shorter one, then a single token, from the states in slots.
    prompts, chunks = [IDS, IDS[:6]], [4, 1, 4]
    with emulated(kind, driver):
        results = Compiled(raw, params, preset).run(prompts, chunks)
    expected = Compiled(raw, params, preset).run(prompts, chunks)
    for ours, theirs in zip(results, expected, strict=True):
        # Activations in float16, and in float32 on the CPU.
        limit = 4e-3 if preset == "q4f16_1" else 2e-6
        assert reference.relative_error(ours, theirs) < limit


@needs_compiler
@pytest.mark.parametrize(
    ("family", "kind", "preset"),
    [("rwkv7", "metal", "q4f16_1"), ("qwen3_5_text", "opencl", "q0f32")],
)
def test_logits_are_those_of_the_cpu(
    emulated: Callable, family: str, kind: str, preset: str
) -> None:
    check(emulated, family, kind, preset)


@needs_compiler
@pytest.mark.skipif(not has_opencl_driver(), reason="there is no PoCL")
@pytest.mark.parametrize("family", ["mamba2", "lfm2"])
def test_logits_of_an_opencl_driver_are_those_of_the_cpu(emulated: Callable, family: str) -> None:
    check(emulated, family, "opencl", "q0f32", driver=True)
