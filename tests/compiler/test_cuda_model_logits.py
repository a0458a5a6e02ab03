"""Whole models compiled for CUDA, run by the emulation, give the logits of transformers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import tvm

from relaxlm import models
from relaxlm.compiler import build
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.groupwise import FLOAT_DTYPES
from relaxlm.quantization.schemes import Scheme, get_scheme
from relaxlm.runtime import executor
from relaxlm.runtime.generation import GenerationConfig, SamplingState
from relaxlm.runtime.peaks import BLOCK
from relaxlm.runtime.sampling import sample
from tests import reference
from tests.compiler.cuda_emulation import CudaEmulation, needs_compiler, needs_cpu_memory
from tests.models import parity, test_deepseek
from tests.models.parity import Compiled, tiny_config

pytestmark = [needs_compiler, needs_cpu_memory]
RAW = tiny_config("llama")
IDS = np.random.default_rng(5).integers(0, parity.VOCAB, 20)


@pytest.fixture
def cuda_models(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """A context in which `Compiled` compiles for CUDA, and its kernels run on the CPU."""

    def compile_model(*arguments, **options):
        built = build.compile_model(*arguments, **options)
        built.executable = built.executable.mod  # runs as it is, and cannot be exported
        return built

    @contextmanager
    def context() -> Iterator[None]:
        with monkeypatch.context() as patch, CudaEmulation("random"):
            patch.setattr(parity, "compile_model", compile_model)
            patch.setattr(parity, "resolve_device", lambda _: resolve_device("cuda", "sm_80"))
            patch.setattr(build, "cuda_compilation", lambda *_: nullcontext())
            patch.setattr(executor, "_device", lambda library: tvm.cuda(0))
            yield

    return context


@pytest.mark.parametrize(
    ("scheme", "vocab", "tolerance"), [("q0f32", 6 * BLOCK, 2e-6), ("q4f16_1", parity.VOCAB, 4e-3)]
)
def test_logits_match_transformers_and_pages_are_copied(
    cuda_models: Callable, scheme: str, vocab: int, tolerance: float
) -> None:
    raw = {**RAW, "vocab_size": vocab}
    model = parity.reference_model(raw)
    state = dict(model.state_dict())
    params = parity.stored_parameters(raw, state, scheme)
    with cuda_models():
        compiled = Compiled(raw, params, scheme)
        (logits,) = compiled.run([IDS], [17, 1, 2])
        assert greedy(compiled, [18, 19]) == logits[[18, 19]].argmax(-1).tolist()
        before = list(compiled.executor._staged[9]._tensors)
        assert greedy(compiled, [3]) == logits[[3]].argmax(-1).tolist()
        after = compiled.executor._staged[9]._tensors
        # Nothing moves, and only what has another length gets another tensor.
        same = [old is new for old, new in zip(before, after, strict=True)]
        assert same == [True] * 8 + [False]
        compiled.executor.copy_pages(np.array([0, 1], "int32"), np.array([40, 63], "int32"))
        for tensor in compiled.executor._kv:
            pages = tensor.numpy()
            assert pages[0].any()
            np.testing.assert_array_equal(pages[[40, 63]], pages[[0, 1]])
    if scheme != "q0f32":
        model.load_state_dict(parity.dequantized_state(raw, state, scheme))
    error = reference.relative_error(logits, parity.reference_logits(model, IDS))
    assert error < tolerance


def greedy(compiled: Compiled, rows: list[int]) -> list[int]:
    """The tokens behind rows of a step, chosen from what the GPU's peaks point at."""
    sequences, vocab = compiled.sequences, compiled.executor.vocab_size
    tables = sequences.batch([(sequences.add(), len(IDS))])
    step = compiled.executor.compute(tables, IDS.astype("int32"), np.array(rows, "int32"))
    # The least number of tokens that reach nothing is the largest one alone.
    configs = [GenerationConfig(temperature=0), GenerationConfig(temperature=1, top_p=0)]
    states = [SamplingState(configs[i % 2], [1], vocab, 0) for i in range(len(rows))]
    seen = step.seen_by(range(len(rows)), states)
    return [chosen.token for chosen in sample(seen.logits, states, seen.peaks, seen.blocks)]


FAMILIES = {
    # Experts that a router chooses, and one that every token passes.
    "qwen2_moe": tiny_config(
        "qwen2_moe",
        moe_intermediate_size=40,
        num_experts=6,
        num_experts_per_tok=3,
        shared_expert_intermediate_size=24,
        norm_topk_prob=True,
    ),
    # Latents, groups of experts.
    "deepseek_v3": test_deepseek.VARIANTS["v3"],
}


def random_parameters(raw: dict, scheme: Scheme) -> dict[str, np.ndarray]:
    """Stored name -> array, with no norm at 1."""
    rng, stored = np.random.default_rng(4), {}
    for spec in models.parameter_specs(models.load_config(raw)):
        norm, quant = "norm" in spec.name, scheme.for_role(spec.role)
        values = rng.uniform(0.5, 1.5, spec.shape) if norm else rng.normal(0, 0.08, spec.shape)
        names = scheme.storage(spec)
        arrays = list(quant.quantize(values).values()) if quant is not None else [values]
        for (name, (_, dtype)), array in zip(names.items(), arrays, strict=True):
            stored[name] = array.astype(FLOAT_DTYPES.get(dtype, dtype))
    return stored


@pytest.mark.parametrize(
    ("family", "preset", "tolerance"),
    [
        ("qwen2_moe", "q0f32", 2e-6),
        ("deepseek_v3", "q0f32", 2e-6),
        # Activations in float16, and in float32 on the CPU.
        ("deepseek_v3", "q4f16_1", 4e-3),
    ],
)
def test_family_matches_the_cpu(
    cuda_models: Callable, family: str, preset: str, tolerance: float
) -> None:
    """tests/models compares the CPU with transformers."""
    raw = FAMILIES[family]
    params = random_parameters(raw, get_scheme(preset))
    with cuda_models():
        compiled = Compiled(raw, params, preset)
        results = compiled.run([IDS, IDS[:9]], [6, 1, 13])
    expected = Compiled(raw, params, preset, opt="O2").run([IDS, IDS[:9]], [6, 1, 13])
    for ours, theirs in zip(results, expected, strict=True):
        assert reference.relative_error(ours, theirs) < tolerance


def test_fp8_cache_matches_the_cpu(cuda_models: Callable) -> None:
    params = parity.stored_parameters(RAW, dict(parity.reference_model(RAW).state_dict()), "q0f32")
    with cuda_models():
        compiled = Compiled(RAW, params, "q0f32", "kv_cache_dtype=fp8")
        results = compiled.run([IDS, IDS[:9]], [6, 1, 13])
    expected = Compiled(RAW, params, "q0f32", "kv_cache_dtype=fp8").run([IDS, IDS[:9]], [6, 1, 13])
    for ours, theirs in zip(results, expected, strict=True):
        assert reference.relative_error(ours, theirs) < 1e-5
