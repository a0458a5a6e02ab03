"""Steps of a compiled tiny model, compared with the same model in NumPy."""

import math

import numpy as np
import pytest

from relaxlm.errors import ContextOverflowError, RequestError, WeightsError
from relaxlm.runtime.cache_size import pages_per_sequence
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.generator import Generator
from relaxlm.runtime.library import Library
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.params import WeightFolder
from relaxlm.runtime.scoring import token_logits, token_logprobs
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.step_tables import text_tables
from relaxlm.runtime.tokenizer import Tokenizer
from tests.numpy_llama import llama_logits
from tests.reference import relative_error
from tests.tiny_model import CONFIG, VOCAB, TinyModel, compile_library, convert

PAGE = 16
IDS = np.random.default_rng(1).integers(0, VOCAB, 200)


def load(model: TinyModel, library=None, pages: int = 40) -> tuple[Generator, PagedSequences]:
    executor = Executor(Library.load(library or model.library), WeightFolder(model.folder), pages)
    limits = executor.limits
    sequences = PagedSequences(
        PagePool(pages), PAGE, limits.sliding_window_size, limits.attention_sink_size
    )
    return Generator(executor, sequences, Tokenizer.load(model.folder)), sequences


@pytest.fixture(scope="module")
def loaded(tiny: TinyModel) -> tuple[Generator, PagedSequences]:
    return load(tiny)


def run(generator: Generator, steps: list[tuple[int, int]], ids: np.ndarray) -> np.ndarray:
    """Logits of the last token of each sequence, [b, vocab]."""
    last = np.cumsum([n for _, n in steps]).astype(np.int32) - 1
    return generator.step(steps, ids.astype(np.int32), last).all()


def test_logits_are_those_of_the_reference_in_chunks_and_token_by_token(tiny, loaded):
    generator, sequences = loaded
    expected = llama_logits(tiny.weights, CONFIG, IDS[:100])
    seq, done = sequences.add(), 0
    for n in (37, 16, 1, 1, 1, 31, 13):
        logits = run(generator, [(seq, n)], IDS[done : done + n])
        done += n
        np.testing.assert_allclose(logits[0], expected[done - 1], rtol=1e-4, atol=1e-4)
    sequences.free(seq)


def test_forks_that_diverge_within_a_page_do_not_touch_each_other(tiny, loaded):
    generator, sequences = loaded
    trunk, tails = IDS[:25], IDS[100:130].reshape(3, 10)
    seqs = [sequences.add()]
    run(generator, [(seqs[0], 25)], trunk)
    seqs += [sequences.fork(seqs[0]) for _ in range(2)]
    for i in range(10):
        logits = run(generator, [(seq, 1) for seq in seqs], tails[:, i])
    for row, tail in zip(logits, tails, strict=True):
        expected = llama_logits(tiny.weights, CONFIG, np.concatenate([trunk, tail]))[-1]
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-4)
    sequences.check()
    for seq in seqs:
        sequences.free(seq)


def test_a_sliding_window_forgets_all_but_the_sinks_in_constant_space(tiny, tmp_path):
    window, sinks, chunk = 40, 20, 32
    library = compile_library(
        tiny.folder,
        tmp_path / "window.so",
        f"sliding_window_size={window};attention_sink_size={sinks};prefill_chunk_size={chunk}",
    )
    pages = pages_per_sequence(10**6, chunk, PAGE, window, sinks)
    generator, sequences = load(tiny, library, pages)
    expected = llama_logits(tiny.weights, CONFIG, IDS, window, sinks)
    everything = llama_logits(tiny.weights, CONFIG, IDS)
    assert np.abs(expected[-1] - everything[-1]).max() > 0.1  # the window matters

    seq, done, used = sequences.add(), 0, []
    for n in [chunk] * 3 + [1] * 60 + [20] + [1] * 24:
        logits = run(generator, [(seq, n)], IDS[done : done + n])
        done += n
        used.append(sequences.pool.used)
        np.testing.assert_allclose(logits[0], expected[done - 1], rtol=1e-4, atol=1e-4)
    assert done == 200
    # Decoding needs the sinks, the window, and the page that the window is leaving.
    assert max(used[-20:]) <= math.ceil(sinks / PAGE) + math.ceil(window / PAGE) + 1
    assert max(used) <= pages


@pytest.mark.parametrize(
    ("name", "bytes_of_head", "low", "high"),
    [("f16", 32, 5e-5, 1e-3), ("fp8", 16 + 4, 5e-3, 0.1)],
)
def test_cache_formats_store_less_and_stay_close(tiny, tmp_path, name, bytes_of_head, low, high):
    library = compile_library(tiny.folder, tmp_path / "kv.so", f"kv_cache_dtype={name}")
    generator, sequences = load(tiny, library)
    # keys and values of 2 heads in 2 layers
    assert generator.executor.memory().kv_cache == 40 * PAGE * 2 * 2 * 2 * bytes_of_head
    expected = llama_logits(tiny.weights, CONFIG, IDS[:60])
    logits = np.concatenate(list(token_logits(generator, IDS[:60])))
    assert low < relative_error(logits, expected) < high
    assert len(sequences) == 0


def test_memory_is_what_is_allocated(tiny, loaded):
    generator, _ = loaded
    memory = generator.executor.memory()
    assert memory.params == sum(array.nbytes for array in tiny.weights.values())
    assert memory.kv_cache == 40 * PAGE * 2 * 2 * 2 * 16 * 4
    assert memory.total == memory.params + memory.kv_cache + memory.temporary
    assert memory.temporary >= 256 * (96 * 2 + 64) * 4  # of a step of 256 tokens, at least


def test_embeddings_are_the_rows_that_are_wanted_of_the_final_norm(loaded):
    generator, sequences = loaded
    seqs, ids = [sequences.add(), sequences.add()], IDS[:30].astype(np.int32)
    tables = sequences.batch([(seqs[0], 9), (seqs[1], 21)])
    rows = np.array([29, 0, 8, 8], np.int32)
    found = generator.executor.embeddings(tables, ids, rows)
    expected = generator.executor.hidden_states(tables, ids)[-1][rows]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # More rows than the library computes logits of.
    every = np.arange(30, dtype=np.int32)
    assert generator.executor.embeddings(tables, ids, every).shape == (30, 64)
    for seq in seqs:
        sequences.free(seq)


def test_hidden_states_start_with_the_embedding_and_end_with_the_final_norm(tiny, loaded):
    generator, sequences = loaded
    seq, ids = sequences.add(), IDS[:9].astype(np.int32)
    states = generator.executor.hidden_states(sequences.batch([(seq, 9)]), ids)
    sequences.free(seq)
    assert [state.shape for state in states] == [(9, 64)] * 4
    np.testing.assert_array_equal(states[0], tiny.weights["model.embed_tokens.weight"][ids])
    normed = states[-2] / np.sqrt((states[-2] ** 2).mean(-1, keepdims=True) + 1e-5)
    normed *= tiny.weights["model.norm.weight"]
    np.testing.assert_allclose(states[-1], normed, rtol=1e-5, atol=1e-5)
    logits = normed @ tiny.weights["lm_head.weight"].T
    expected = llama_logits(tiny.weights, CONFIG, ids)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_weights_from_memory_are_those_of_the_folder(tiny, loaded):
    folder = WeightFolder(tiny.folder)
    params = {name: folder.load(name) for name in folder.records}
    executor = Executor.from_arrays(Library.load(tiny.library), params, 4)
    sequences = PagedSequences(PagePool(4), PAGE)
    other = Generator(executor, sequences, loaded[0].tokenizer)
    logits = run(other, [(sequences.add(), 20)], IDS[:20])
    expected = llama_logits(tiny.weights, CONFIG, IDS[:20])[-1]
    np.testing.assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-4)


# Bad input


def steps(loaded, sizes: list[int], ids: np.ndarray | None = None, rows: int = 1) -> str:
    """The error of a step of new sequences, which are freed again."""
    generator, sequences = loaded
    seqs = [sequences.add() for _ in sizes]
    ids = np.zeros(sum(sizes), np.int32) if ids is None else ids
    try:
        with pytest.raises((RequestError, ContextOverflowError)) as raised:
            generator.step(list(zip(seqs, sizes, strict=True)), ids, np.zeros(rows, np.int32))
    finally:
        for seq in seqs:
            sequences.free(seq)
    return str(raised.value)


def test_a_step_is_no_larger_than_the_library_was_compiled_for(tiny, loaded):
    assert steps(loaded, [257]) == (
        f"a step with 257 tokens: {tiny.library} was compiled for 256; "
        'compile with --overrides "prefill_chunk_size=257"'
    )
    most = loaded[0].executor.limits.max_batch_size
    assert steps(loaded, [most + 1], rows=most + 1) == (
        f"a step with {most + 1} rows of logits: {tiny.library} was compiled for {most}; "
        f'compile with --overrides "max_batch_size={most + 1}"'
    )


def test_a_step_has_no_more_sequences_than_the_library_was_compiled_for(tiny, loaded, monkeypatch):
    executor = loaded[0].executor
    fewer = executor.limits.model_copy(update={"max_batch_size": 2})
    monkeypatch.setattr(executor, "limits", fewer)
    assert steps(loaded, [1, 1, 1]) == (
        f"a step with 3 sequences: {tiny.library} was compiled for 2; "
        'compile with --overrides "max_batch_size=3"'
    )


@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_a_token_outside_the_vocabulary_is_refused(loaded, wrong):
    message = f"token id {wrong} is outside the model's vocabulary of 320"
    ids = np.array([1, 2, wrong, 3], np.int32)
    assert steps(loaded, [4], ids) == message
    tables = text_tables([4])  # the ids are looked at first
    with pytest.raises(RequestError) as raised:
        loaded[0].executor.embeddings(tables, ids, np.zeros(1, np.int32))
    assert str(raised.value) == message


def test_weights_of_another_preset_are_refused(tiny, tmp_path):
    folder = convert(tiny.source, tmp_path / "tiny-q4f32_1", "q4f32_1")
    with pytest.raises(WeightsError) as raised:
        Executor(Library.load(tiny.library), WeightFolder(folder), 4)
    assert str(raised.value).startswith(
        f"{folder}: the weights do not fit the model: 10 missing (model.embed_tokens.weight; "
    )
    assert str(raised.value).endswith(
        "Were both made from the same model with the same quantization?"
    )


# Scoring


def test_log_probabilities_of_a_text_are_those_of_the_reference(tiny, loaded):
    generator, sequences = loaded
    for count in (2, 16, 17, 130):  # steps of several sizes, the last one with a single row
        ids = IDS[:count]
        logits = llama_logits(tiny.weights, CONFIG, ids)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = expected[np.arange(count - 1), ids[1:]]
        found = token_logprobs(generator, ids.tolist())
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert len(sequences) == 0
    with pytest.raises(ValueError, match="a text of 1 tokens predicts nothing"):
        token_logprobs(generator, [3])
