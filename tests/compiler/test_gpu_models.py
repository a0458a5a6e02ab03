"""Whole models compiled for Metal and OpenCL, run by the emulation, give the logits of the CPU.

`tests/models` compares the CPU with transformers.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from relaxlm import models
from relaxlm.compiler import build
from relaxlm.compiler.kernels import gpu_attention
from relaxlm.compiler.plain_gpu import refuse_for_plain_gpu
from relaxlm.compiler.platforms import this_platform
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import UnsupportedError
from relaxlm.quantization.kv_cache import KV_FORMATS
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime import executor
from relaxlm.runtime.generation import GenerationConfig, SamplingState
from relaxlm.runtime.sampling import sample
from tests import reference
from tests.compiler.cuda_emulation import needs_compiler
from tests.compiler.gpu_emulation import GpuEmulation, has_opencl_driver
from tests.compiler.test_cuda_model_logits import FAMILIES, random_parameters
from tests.models import (
    parity,
    test_alibi,
    test_deepseek,
    test_encoders,
    test_gpt_oss,
    test_llama4,
    test_moe_2,
)
from tests.models.parity import Compiled, tiny_config

IDS = np.random.default_rng(5).integers(0, parity.VOCAB, 7)
# A vocabulary of 20 blocks, the last of which is partly filled.
RAW = tiny_config("llama", num_hidden_layers=1, sliding_window=None, vocab_size=5003)

# Kernels of a layer: two norms, four products, of which one is gated, what brings queries to the
# products and keys and values to the pages, and attention.
LAYER = 8
# And beside layers: the embedding, the tables of rotations, what queries see, two choices of rows,
# the last norm, and the head.
BESIDES = 7
STEPS = 3


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """A context in which `Compiled` compiles for a GPU, and its kernels run on the CPU."""

    def compile_model(*arguments, **options):
        built = build.compile_model(*arguments, **options)
        built.executable = built.executable.mod  # runs as it is, and cannot be exported
        return built

    @contextmanager
    def context(kind, driver=False):
        with monkeypatch.context() as patch, GpuEmulation(kind, "random", driver) as gpu:
            patch.setattr(parity, "compile_model", compile_model)
            # What starts the kernels is this machine's.
            device = replace(resolve_device(kind), platform=this_platform())
            patch.setattr(parity, "resolve_device", lambda _: device)
            patch.setattr(executor, "_device", lambda library: gpu.device)
            yield gpu

    return context


def check_logits(
    emulated: Callable, kind: str, preset: str, tolerance: float, driver: bool = False
) -> None:
    params = random_parameters(RAW, get_scheme(preset))
    with emulated(kind, driver) as gpu:
        compiled = Compiled(RAW, params, preset)
        results = compiled.run([IDS, IDS[:5]], [3, 1, 3])
        if not driver:
            # Steps of 6, 2 and 4 rows.
            assert gpu.started() == STEPS * (LAYER + BESIDES)
        check_choices(compiled)
        compiled.executor.copy_pages(np.array([0, 1], "int32"), np.array([40, 63], "int32"))
        for tensor in compiled.executor._kv:
            pages = tensor.numpy()
            assert pages[0].any()
            np.testing.assert_array_equal(pages[[40, 63]], pages[[0, 1]])
    assert ("half" in "".join(gpu.sources)) == (preset == "q4f16_1")
    expected = Compiled(RAW, params, preset, opt="O2").run([IDS, IDS[:5]], [3, 1, 3])
    for ours, theirs in zip(results, expected, strict=True):
        assert reference.relative_error(ours, theirs) < tolerance


def check_choices(compiled: Compiled) -> None:
    """Tokens are those of all logits, of which a CPU reads few."""
    settings = [{"temperature": 0}, {"temperature": 0.5, "top_k": 2}, {"temperature": 0.3}]
    settings.append({"temperature": 0.2, "top_p": 0.5})
    seq = compiled.sequences.add()
    tables = compiled.sequences.batch([(seq, 4)])
    executor, rows = compiled.executor, np.arange(4, dtype=np.int32)
    chosen = []
    for whole in (False, True):
        states = [
            SamplingState(GenerationConfig(**one, seed=i), [1], 5003, 0)
            for i, one in enumerate(settings)
        ]
        step = executor.compute(tables, IDS[:4], rows)
        if whole:
            chosen.append(sample(step.all(), states))
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step, "_download", lambda: pytest.fail("all logits were read"))
            logits, *known = step.seen_by(range(4), states)
            chosen.append(sample(logits, states, *known))
    assert chosen[0] == chosen[1] and len({one.token for one in chosen[0]}) > 1
    compiled.sequences.free(seq)


@needs_compiler
@pytest.mark.parametrize(
    ("kind", "preset", "tolerance"),
    [("metal", "q4f16_1", 4e-3), ("metal", "q0f32", 2e-6), ("opencl", "q4f16_1", 4e-3)],
)
def test_logits_are_those_of_the_cpu(
    emulated: Callable, kind: str, preset: str, tolerance: float
) -> None:
    check_logits(emulated, kind, preset, tolerance)


ATTENTION = {
    "alibi": test_alibi.mpt(n_layers=1),
    "latents": {
        **test_deepseek.VARIANTS["v3"],
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
    },
    "chunks": {
        **test_llama4.VARIANTS["scout"],
        "num_hidden_layers": 1,
        "attention_chunk_size": 11,
    },
}


@needs_compiler
@pytest.mark.parametrize("family", ATTENTION)
def test_attention_of_families_is_that_of_the_cpu(
    emulated: Callable, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    # Even contexts of a few tokens are cut into parts, one per page.
    monkeypatch.setattr(gpu_attention, "PART_TOKENS", 16)
    raw, preset = ATTENTION[family], "q0f32"
    params, rng = random_parameters(raw, get_scheme(preset)), np.random.default_rng(6)
    # In tiles of rows, then token by token.
    prompts = [rng.integers(0, parity.VOCAB, count) for count in (20, 19)]
    with emulated("opencl"):
        results = Compiled(raw, params, preset).run(prompts, [17, 1, 2])
    expected = Compiled(raw, params, preset, opt="O2").run(prompts, [17, 1, 2])
    for ours, theirs in zip(results, expected, strict=True):
        assert reference.relative_error(ours, theirs) < 3e-6


MIXTURES = {
    # A softmax, and an expert that every token passes.
    "qwen2_moe": {**FAMILIES["qwen2_moe"], "num_hidden_layers": 1},
    # Sigmoids, biases, and groups of experts.
    "glm4_moe": test_moe_2.VARIANTS["glm4_moe"],
    # Two that are close to each other.
    "phimoe": {**test_moe_2.VARIANTS["phimoe"], "num_hidden_layers": 1},
    # A softmax of the chosen; experts with biases.
    "gpt_oss": test_gpt_oss.config(),
}


@needs_compiler
@pytest.mark.parametrize(
    ("family", "kind", "preset", "tolerance"),
    [
        ("qwen2_moe", "metal", "q4f16_1", 4e-3),
        ("glm4_moe", "metal", "q0f32", 2e-6),
        ("phimoe", "opencl", "q0f32", 2e-6),
        ("gpt_oss", "opencl", "q4f32_1", 2e-6),
    ],
)
def test_mixtures_of_experts_are_those_of_the_cpu(
    emulated: Callable, family: str, kind: str, preset: str, tolerance: float
) -> None:
    raw = MIXTURES[family]
    params = random_parameters(raw, get_scheme(preset))
    with emulated(kind):
        # More rows of an expert than are multiplied one by one, and single tokens.
        (result,) = Compiled(raw, params, preset).run([IDS], [5, 1, 1])
    (expected,) = Compiled(raw, params, preset, opt="O2").run([IDS], [5, 1, 1])
    assert reference.relative_error(result, expected) < tolerance


@needs_compiler
def test_states_of_an_encoder_are_those_of_the_cpu(emulated: Callable) -> None:
    """In float32, `tests/web` compares vectors of texts."""
    raw, preset, tolerance = test_encoders.bert(num_hidden_layers=1), "q4f16_1", 4e-3
    params, batch = random_parameters(raw, get_scheme(preset)), test_encoders.texts(1, 7, 40)
    with emulated("metal"):
        results = Compiled(raw, params, preset).run(batch, [])
    expected = Compiled(raw, params, preset, opt="O2").run(batch, [])
    for ours, theirs in zip(results, expected, strict=True):
        assert reference.relative_error(ours, theirs) < tolerance


@needs_compiler
@pytest.mark.skipif(not has_opencl_driver(), reason="there is no PoCL")
def test_logits_of_an_opencl_driver_are_those_of_the_cpu(emulated: Callable) -> None:
    check_logits(emulated, "opencl", "q4f32_1", 2e-6, driver=True)


@pytest.mark.parametrize(
    ("raw", "size"),
    [
        (tiny_config("llama", head_dim=4096), 4096),
        (test_encoders.bert(hidden_size=4096, num_attention_heads=2), 2048),
    ],
    ids=["decoder", "encoder"],
)
def test_heads_without_kernels_are_refused(raw: dict, size: int) -> None:
    config, scheme = models.load_config(raw), get_scheme("q4f16_1")
    for device in ("metal", "opencl", "rocm"):
        with pytest.raises(UnsupportedError) as caught:
            refuse_for_plain_gpu(config, scheme, KV_FORMATS["float16"], device)
        assert str(caught.value) == (
            f"{raw['model_type']}: head_dim = {size} is not supported on {device}: its kernels go "
            "up to 1024. Compile for the CPU: --device cpu"
        )


def test_numbers_without_kernels_are_refused() -> None:
    config, q4 = models.load_config(RAW), get_scheme("q4f16_1")
    refuse_for_plain_gpu(config, q4, KV_FORMATS["float16"], "rocm")
    with pytest.raises(UnsupportedError) as caught:
        refuse_for_plain_gpu(config, get_scheme("q4bf16_1"), KV_FORMATS["float16"], "metal")
    assert str(caught.value) == (
        "quantization q4bf16_1 is not supported on metal, for which there are no kernels in "
        "bfloat16. Use a preset in float16 or float32, such as q4f16_1"
    )
    for name in ("float8_e4m3", "bfloat16"):
        with pytest.raises(UnsupportedError) as caught:
            refuse_for_plain_gpu(config, q4, KV_FORMATS[name], "opencl")
        assert str(caught.value) == (
            f"kv_cache_dtype = {name} is not supported on opencl: its kernels have float16 and "
            'float32. Use --overrides "kv_cache_dtype=float16"'
        )
