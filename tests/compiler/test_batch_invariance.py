"""--opt batch_invariant=1: a token's logits are the same, bit by bit, in whatever steps it came.

Whole models: a prompt in one step, against the same prompt in chunks, token by token, among other
sequences, on other pages and with another number of threads. Kernels: test_invariant_kernels.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from relaxlm import models
from relaxlm.compiler.build import compile_model
from relaxlm.compiler.kernels.isa import NEEDS, Isa, best_isa
from relaxlm.compiler.options import CompileOptions, check_opt
from relaxlm.compiler.target import DeviceTarget, resolve_device
from relaxlm.errors import ConfigError
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.cpu import host_cpu_features, missing_features
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.library import Library, is_batch_invariant
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.state_slots import StateSlots
from relaxlm.runtime.threads import set_threads

VOCAB, CONTEXT, SEQUENCES = 131, 1024, 40
# More than one part of a context that attention keeps apart, 512 tokens, and not full pages.
LENGTH = 605
PAGES = 400


def raw_config(model_type: str) -> dict:
    """A config.json: matrices that tiles can multiply and, of 352, some that end between them."""
    return {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": CONTEXT,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
        **RECURRENT.get(model_type, {}),
    }


# Layers that keep a state: their scans and convolutions go over sequences, not over steps.
RECURRENT = {
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
    },
}


class Model:
    """A compiled random model with its cache and page tables."""

    def __init__(
        self,
        scheme: str,
        opt: str,
        device: DeviceTarget,
        overrides: str = "",
        model_type: str = "qwen2",
    ) -> None:
        raw, stored = raw_config(model_type), get_scheme(scheme)
        config = models.load_config(raw)
        limits = f"max_batch_size={LENGTH};prefill_chunk_size={LENGTH};{overrides}"
        options = CompileOptions.resolve(config, stored, None, limits, opt)
        built = compile_model(config, raw, stored, device, options)
        rng, params = np.random.default_rng(5), dict[str, np.ndarray]()
        dtype = ml_dtypes.bfloat16 if stored.dtype == "bfloat16" else stored.dtype
        for spec in models.parameter_specs(config):
            value = rng.normal(0, 0.1, spec.shape).astype(np.float32)
            if spec.role == "vector":
                value += 1
            quant = stored.for_role(spec.role)
            storage = stored.storage(spec)
            if quant is None:
                kept = np.float32 if spec.role == "float32" else dtype
                params |= dict.fromkeys(storage, value.astype(kept))
                continue
            params |= dict(zip(storage, quant.quantize(value).values(), strict=True))
        self.metadata = built.metadata
        library = Library(built.executable, built.metadata, Path("memory"))
        slots = 2 * SEQUENCES if built.metadata.state.tensors else 0
        self.executor = Executor.from_arrays(library, params, PAGES, slots)
        sizes = built.metadata.limits
        self.sequences = PagedSequences(
            PagePool(PAGES),
            16,
            sizes.sliding_window_size,
            sizes.attention_sink_size,
            states=StateSlots(PagePool(slots)) if slots else None,
        )

    def step(self, parts: Sequence[tuple[int, np.ndarray]]) -> list[np.ndarray]:
        """New tokens of some sequences; the logits of all of them, by sequence."""
        tables = self.sequences.batch([(sequence, len(ids)) for sequence, ids in parts])
        self.executor.copy_pages(*self.sequences.take_copies())
        ids = np.concatenate([ids for _, ids in parts]).astype(np.int32)
        logits = self.executor.forward(tables, ids, np.arange(len(ids), dtype=np.int32))
        return np.split(logits, tables.row_offsets[1:-1])

    def last(self, sequence: int, ids: np.ndarray) -> np.ndarray:
        """One sequence; the logits of its last token, which are the only row of the last layer."""
        tables = self.sequences.batch([(sequence, len(ids))])
        self.executor.copy_pages(*self.sequences.take_copies())
        return self.executor.forward(
            tables, ids.astype(np.int32), np.array([len(ids) - 1], np.int32)
        )[0]

    def whole(self, ids: np.ndarray) -> np.ndarray:
        """A sequence of its own in one step: the logits of all its tokens."""
        sequence = self.sequences.add()
        (logits,) = self.step([(sequence, ids)])
        self.sequences.free(sequence)
        return logits

    def in_chunks(
        self, ids: np.ndarray, sizes: Iterator[int], others: int = 0, seed: int = 0
    ) -> np.ndarray:
        """The same in several steps, in company of random sequences that come and go."""
        rng, rows, done = np.random.default_rng(seed), [], 0
        sequence, company = self.sequences.add(), dict[int, int]()
        while done < len(ids):
            chunk = ids[done : done + next(sizes)]
            parts = [(sequence, chunk)]
            for other in [*company]:
                if company[other] > 200:
                    self.sequences.free(other)
                    del company[other]
            while len(company) < others:
                company[self.sequences.add()] = 0
            for other in company:
                count = int(rng.choice([1, 1, 2, 7, 20]))
                if sum(len(part) for _, part in parts) + count <= LENGTH:
                    parts.insert(
                        int(rng.integers(len(parts) + 1)), (other, rng.integers(0, VOCAB, count))
                    )
                    company[other] += count
            logits = self.step(parts)
            rows.append(logits[[part[0] for part in parts].index(sequence)])
            done += len(chunk)
        for used in (sequence, *company):
            self.sequences.free(used)
        return np.concatenate(rows)


def device_with(isa: Isa | None) -> DeviceTarget:
    """This CPU as if it had nothing better than `isa`; skips the test if it lacks that."""
    device = resolve_device("cpu")
    if isa is None:
        return device
    if missing := missing_features(NEEDS[isa]):
        pytest.skip(f"needs {', '.join(missing)}")
    without = ("amx", "avx512", "avxvnni")[: list(NEEDS).index(isa)]
    features = tuple(name for name in device.cpu_features if not name.startswith(without))
    return replace(device, cpu_features=features)


def prompt(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, LENGTH)


def sizes(*choices: int, start: int = 0) -> Iterator[int]:
    """First `start`, if that is not 0, then random ones."""
    rng = np.random.default_rng(len(choices))
    if start:
        yield start
    while True:
        yield int(rng.choice(choices))


def check_all_ways(model: Model) -> None:
    ids = prompt()
    logits = model.whole(ids)
    assert logits.shape == (LENGTH, VOCAB) and 0.5 < np.abs(logits).max() < 100
    ways = {
        "token by token": model.in_chunks(ids, sizes(1, start=LENGTH - 40)),
        "few at a time": model.in_chunks(ids, sizes(2, 3, 5, 9, 16)),
        "chunks": model.in_chunks(ids, sizes(17, 40, 100)),
        "in a small batch": model.in_chunks(ids, sizes(1, 8, 64), others=3),
        "in a large batch": model.in_chunks(ids, sizes(1, 30, 200), others=SEQUENCES - 1),
    }
    different = [name for name, found in ways.items() if not np.array_equal(found, logits)]
    assert different == []
    sequence = model.sequences.add()
    np.testing.assert_array_equal(model.last(sequence, ids[:-1]), logits[-2])
    np.testing.assert_array_equal(model.last(sequence, ids[-1:]), logits[-1])
    model.sequences.free(sequence)


@pytest.fixture(scope="module")
def native() -> Model:
    """As `compile` makes it here, but for the option."""
    act_quant = int(best_isa(host_cpu_features().__contains__) is not None)
    return Model("q4f16_1", f"O1;act_quant={act_quant};batch_invariant=1", resolve_device("cpu"))


def test_logits_do_not_depend_on_the_steps(native: Model) -> None:
    assert is_batch_invariant(native.metadata)
    check_all_ways(native)


# Pages leave the tables, at steps that depend on the chunks.
WINDOW = ";sliding_window_size=150;attention_sink_size=20"


@pytest.mark.parametrize(
    ("scheme", "act_quant", "isa", "overrides", "model_type"),
    [
        ("q4f32_1", 1, "avx512", "kv_cache_dtype=fp8", "qwen3"),
        ("q8f16_1", 1, "avxvnni", "kv_cache_dtype=f32" + WINDOW, "llama"),
        ("q4f16_1", 1, "avx2", "kv_cache_dtype=f16", "qwen2"),
        ("q4f16_1", 0, None, "kv_cache_dtype=f32", "qwen2"),
        ("q8f16_1", 0, None, "kv_cache_dtype=fp8" + WINDOW, "llama"),
        ("q0f16", 0, None, "kv_cache_dtype=f16", "qwen3"),
        ("q0f32", 0, None, "kv_cache_dtype=f32", "qwen2"),
        ("q4f16_1", 1, "avx512", "kv_cache_dtype=f16", "qwen3_5_text"),
    ],
)
def test_nor_do_those_of_other_presets_and_cpus(
    scheme: str, act_quant: int, isa: Isa | None, overrides: str, model_type: str
) -> None:
    opt = f"O1;act_quant={act_quant};batch_invariant=1"
    check_all_ways(Model(scheme, opt, device_with(isa), overrides, model_type))


def test_threads_make_no_difference(native: Model) -> None:
    ids = prompt()
    found = []
    for threads in (1, 2):
        set_threads(threads)
        found.append(native.whole(ids))
        found.append(native.in_chunks(ids, sizes(1, start=LENGTH - 5)))
    for logits in found[1:]:
        np.testing.assert_array_equal(logits, found[0])


def test_several_rows_verify_what_single_rows_would_say(native: Model) -> None:
    """As speculative decoding does: k + 1 rows, of which some are rolled back."""
    ids = prompt(2)
    expected = native.in_chunks(ids, sizes(1, start=500))
    sequence, done = native.sequences.add(), 500
    native.step([(sequence, ids[:done])])
    for drafted, accepted in ((1, 0), (4, 2), (8, 8), (5, 5), (3, 0), (12, 7)):
        guess = ids[done : done + drafted + 1].copy()
        guess[accepted + 1 :] = (guess[accepted + 1 :] + 1) % VOCAB
        (logits,) = native.step([(sequence, guess)])
        right = accepted + 1
        np.testing.assert_array_equal(logits[:right], expected[done : done + right])
        done += right
        native.sequences.truncate(sequence, done)
    native.sequences.free(sequence)


def test_a_shared_prefix_makes_no_difference(native: Model) -> None:
    ids = prompt(3)
    expected = native.whole(ids)
    first = native.sequences.add()
    native.step([(first, ids[:300])])
    # One fork on full pages, one in the middle of a page, which is copied.
    forks = {native.sequences.fork(first, length): length for length in (288, 300)}
    logits = native.step([(fork, ids[length:450]) for fork, length in forks.items()])
    for length, found in zip(forks.values(), logits, strict=True):
        np.testing.assert_array_equal(found, expected[length:450])
    for sequence in (first, *forks):
        native.sequences.free(sequence)


def test_by_default_logits_depend_on_the_steps() -> None:
    """Else the tests above could not fail."""
    model = Model("q0f32", "O1", resolve_device("cpu"))
    assert not is_batch_invariant(model.metadata)
    ids = prompt()
    logits = model.whole(ids)
    found = model.in_chunks(ids, sizes(1, start=LENGTH - 5))
    assert not np.array_equal(found, logits)
    np.testing.assert_allclose(found, logits, rtol=1e-3, atol=1e-4)


def test_it_is_refused_for_gpus() -> None:
    config, scheme = models.load_config(raw_config("llama")), get_scheme("q0f16")
    options = CompileOptions.resolve(config, scheme, opt="batch_invariant=1")
    with pytest.raises(
        ConfigError, match="--opt batch_invariant=1 is for device 'cpu', not 'cuda'"
    ):
        check_opt(options, scheme, resolve_device("cuda", "sm_80"))
