"""Limits and the cache's format: where they come from, and what is refused."""

import pytest

from relaxlm import models
from relaxlm.compiler.options import CompileOptions, check_opt, parse_overrides
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import ConfigError
from relaxlm.quantization.schemes import get_scheme
from tests.models.parity import tiny_config

CONFIG = models.load_config(tiny_config("llama", max_position_embeddings=512))


def resolve(chat: dict | None = None, overrides: str = "", opt: str = "O2") -> CompileOptions:
    return CompileOptions.resolve(CONFIG, get_scheme("q4f16_1"), chat, overrides, opt)


def test_the_model_decides_where_nothing_is_said() -> None:
    options = resolve()
    assert options.context_window_size == 512
    assert options.prefill_chunk_size == 512
    assert options.sliding_window_size == 0
    assert options.kv_format.name == "float16"


def test_overrides_win_over_the_file_and_the_file_over_the_model() -> None:
    chat = {"context_window_size": 256, "prefill_chunk_size": 64, "sliding_window_size": -1}
    options = resolve(chat, "context_window_size=128; kv_cache_dtype=fp8")
    assert options.context_window_size == 128
    assert options.prefill_chunk_size == 64
    assert options.sliding_window_size == 0
    assert options.kv_format.name == "float8_e4m3"


def test_limits_are_brought_into_agreement() -> None:
    options = resolve(overrides="context_window_size=32;max_batch_size=64")
    assert (options.prefill_chunk_size, options.max_batch_size) == (32, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "context=5",
            "--overrides: 'context=5' is not understood, expected KEY=VALUE separated by ';' with "
            "a key of: context_window_size, prefill_chunk_size, max_batch_size, "
            "sliding_window_size, attention_sink_size, kv_cache_dtype",
        ),
        (
            "context_window_size=-4",
            "--overrides: context_window_size='-4', expected a whole number of tokens from 1 on",
        ),
        (
            "attention_sink_size=x",
            "--overrides: attention_sink_size='x', expected a whole number of tokens from 0 on",
        ),
        (
            "attention_sink_size=4",
            "attention_sink_size = 4 has no effect without a sliding window: set "
            "sliding_window_size, too, or leave it out",
        ),
        (
            "kv_cache_dtype=int4",
            "kv_cache_dtype = 'int4' is not a KV-cache format. Known: float32, float16, bfloat16, "
            "float8_e4m3 (short: f32, f16, bf16, fp8)",
        ),
    ],
)
def test_malformed_overrides_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(overrides=text)
    assert str(error.value) == message


def test_optimisation_options_have_one_spelling() -> None:
    assert resolve(opt="").opt == resolve(opt=" act_quant=0 ; O2").opt == "O2"
    options = resolve(opt="act_quant=1")
    assert (options.opt, options.opt_level, options.act_quant) == ("O2;act_quant=1", 2, True)
    options = resolve(opt="O3;act_quant=0")
    assert (options.opt, options.opt_level, options.act_quant) == ("O3", 3, False)
    options = resolve(opt="batch_invariant=1;task_rows=256;act_quant=1;O1")
    assert options.opt == "O1;act_quant=1;batch_invariant=1;task_rows=256"
    assert options.batch_invariant and not resolve(opt="batch_invariant=0").batch_invariant


def test_cuda_graphs_are_for_cuda_and_for_models_that_write() -> None:
    options, scheme = resolve(opt="cuda_graph=1;O1"), get_scheme("q4f16_1")
    assert options.opt == "O1;cuda_graph=1" and options.cuda_graph
    assert not resolve(opt="cuda_graph=0").cuda_graph
    check_opt(options, scheme, resolve_device("cuda", "sm_80"))
    with pytest.raises(ConfigError, match="cuda_graph=1 is for device 'cuda', not 'cpu'"):
        check_opt(options, scheme, resolve_device("cpu"))
    embedder = CONFIG.model_copy(update={"model_task": "embedding"})
    with pytest.raises(ConfigError, match="cuda_graph=1 is for models that write"):
        CompileOptions.resolve(embedder, scheme, opt="cuda_graph=1")


@pytest.mark.parametrize("part", ["O7", "act_quant=2", "act_quant", "batch_invariant", "O2=1"])
def test_unknown_optimisation_options_are_refused(part: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(opt=f"O1;{part}")
    assert str(error.value) == (
        f"--opt O1;{part}: {part!r} is not understood, expected one of O1, O2, O3, "
        "act_quant=0 or act_quant=1, batch_invariant=0 or batch_invariant=1, cuda_graph=0 or "
        "cuda_graph=1, or a number for ahead or task_rows, several separated by ';'"
    )


def test_parse_overrides_ignores_spaces_and_empty_parts() -> None:
    assert parse_overrides(" max_batch_size = 4 ;; ") == {"max_batch_size": 4}
    assert parse_overrides(None) == {}
