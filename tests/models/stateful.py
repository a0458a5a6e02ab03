"""Compare models with recurrent layers with a reference, in whatever steps their tokens come."""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from relaxlm import models
from relaxlm.quantization.schemes import get_scheme
from tests.models import parity
from tests.models.parity import VOCAB, Compiled

# [n] token ids to [n, vocab].
Reference = Callable[[np.ndarray], np.ndarray]


def check_states(compiled: Compiled, reference: Reference, atol: float = 1e-5) -> None:
    """One prefill, chunks, single tokens; texts of different lengths in one step; forks."""
    ids = np.random.default_rng(5).integers(0, VOCAB, 50)
    expected = reference(ids)
    for chunks in ([50], [16, 1, 13, 20], [1] * 50):
        (logits,) = compiled.run([ids], chunks)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=atol, err_msg=str(chunks))
    check_mixed_steps(compiled, reference, atol)
    check_few_rows(compiled, ids, expected, atol)


def check_few_rows(compiled: Compiled, ids: np.ndarray, expected: np.ndarray, atol: float) -> None:
    """Steps of which not every row's logits are wanted leave the same states."""
    seq = compiled.sequences.add()
    for first, last in ((0, 17), (17, 40), (40, 50)):
        tables = compiled.sequences.batch([(seq, last - first)])
        wanted = np.array([last - first - 1, 3], np.int32)
        logits = compiled.executor.forward(tables, ids[first:last].astype(np.int32), wanted)
        np.testing.assert_allclose(logits, expected[first + wanted], rtol=1e-4, atol=atol)
    compiled.sequences.free(seq)


def check_mixed_steps(compiled: Compiled, reference: Reference, atol: float) -> None:
    rng = np.random.default_rng(11)
    texts = {name: rng.integers(0, VOCAB, size) for name, size in (("a", 30), ("b", 19), ("c", 7))}
    # The other ends of "a" after 20 tokens.
    texts["fork"] = np.concatenate([texts["a"][:20], rng.integers(0, VOCAB, 9)])
    expected = {name: reference(text) for name, text in texts.items()}
    sequences = {name: compiled.sequences.add() for name in "abc"}
    done = dict.fromkeys(texts, 0)

    def step(**counts: int) -> None:
        """So many further tokens of each text, all in one step."""
        pieces = {name: texts[name][done[name] :][:count] for name, count in counts.items()}
        rows = run_step(compiled, {sequences[name]: piece for name, piece in pieces.items()})
        for (name, count), found in zip(counts.items(), rows, strict=True):
            wanted = expected[name][done[name] : done[name] + count]
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=atol, err_msg=str(counts))
            done[name] += count

    step(a=5)
    step(b=11, a=1)
    step(a=14, c=3, b=1)
    sequences["fork"] = compiled.sequences.fork(sequences["a"])
    done["fork"] = 20
    step(fork=4, b=2)
    step(c=4, a=6, fork=1)
    step(fork=4, a=4, b=5)
    for seq in sequences.values():
        compiled.sequences.free(seq)


def run_step(compiled: Compiled, pieces: Mapping[int, np.ndarray]) -> list[np.ndarray]:
    """One step with so many further tokens of each sequence; the logits of each one's rows."""
    tables = compiled.sequences.batch([(seq, len(piece)) for seq, piece in pieces.items()])
    compiled.executor.copy_pages(*compiled.sequences.take_copies())
    flat = np.concatenate(list(pieces.values())).astype(np.int32)
    logits = compiled.executor.forward(tables, flat, np.arange(len(flat), dtype=np.int32))
    return np.split(logits, tables.row_offsets[1:-1])


def check_transformers(raw: dict, quantized: bool = True, atol: float = 1e-5) -> None:
    """A model, and what 4 bits keep of it, computes what transformers does."""
    model = parity.reference_model(raw)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            vary(name, parameter)
    state = dict(model.state_dict())

    def reference(ids: np.ndarray) -> np.ndarray:
        return parity.reference_logits(model, ids)

    compiled = Compiled(raw, parity.stored_parameters(raw, state, "q0f32"), "q0f32")
    check_states(compiled, reference, atol)
    if not quantized:
        return
    compiled = Compiled(
        raw, parity.stored_parameters(raw, state, "q4f16_1"), "q4f16_1", "kv_cache_dtype=float32"
    )
    model.load_state_dict(parity.dequantized_state(raw, state, "q4f16_1"), strict=False)
    check_quantized(compiled, reference, atol)


def vary(name: str, parameter: torch.Tensor) -> None:
    """Values for what a recurrent layer has besides: rates that differ, filters that count.

    What is kept has to be large enough for the norm behind it not to magnify rounding.
    """
    if name.endswith("A_log"):
        parameter.uniform_(-1.5, 1.0)
    elif name.endswith((".D", "dt_bias")):
        parameter.uniform_(-1.5, 1.5)
    elif "conv" in name and parameter.ndim == 3:
        parameter.normal_(0, 0.5)
    elif "in_proj" in name and name.endswith("weight"):
        parameter.normal_(0, 0.25)


def check_quantized(compiled: Compiled, reference: Reference, atol: float = 1e-5) -> None:
    ids = np.random.default_rng(7).integers(0, VOCAB, 37)
    (logits,) = compiled.run([ids], [20, 1, 16])
    np.testing.assert_allclose(logits, reference(ids), rtol=1e-4, atol=atol)


def check_transcription(
    raw: dict, transcription: Callable[[dict, dict, np.ndarray], np.ndarray]
) -> None:
    """The same against a transcription in NumPy: (config.json, tensors, ids) -> [n, vocab]."""
    state = random_checkpoint(raw)

    def reference_of(state: dict) -> Reference:
        tensors = {name: tensor.numpy() for name, tensor in state.items()}
        return lambda ids: transcription(raw, tensors, ids)

    compiled = Compiled(raw, parity.stored_parameters(raw, state, "q0f32"), "q0f32")
    check_states(compiled, reference_of(state))
    compiled = Compiled(raw, parity.stored_parameters(raw, state, "q4f16_1"), "q4f16_1")
    kept = {**state, **parity.dequantized_state(raw, state, "q4f16_1")}
    check_quantized(compiled, reference_of(kept))


def random_checkpoint(raw: dict) -> dict[str, torch.Tensor]:
    """Tensors with the names and shapes that the model asks for, none at a default."""
    rng, result = np.random.default_rng(3), {}
    for spec in models.parameter_specs(models.load_config(raw)):
        for source in spec.sources:
            last = source.name.removesuffix(".weight").rpartition(".")[2]
            if last == "time_decay":
                values = rng.uniform(-4, 0.5, source.shape)
            elif source.name.endswith("weight") and len(source.shape) == 1:
                values = rng.uniform(0.5, 1.5, source.shape)
            elif len(source.shape) == 3 and source.shape[0] == 1:  # how much of a token is taken
                values = rng.uniform(0, 1, source.shape)
            elif len(source.shape) == 1:
                values = rng.normal(0, 0.5, source.shape)
            else:
                values = rng.normal(0, 0.12, source.shape)
            result[source.name] = torch.from_numpy(values.astype(np.float32))
    return result


def roles(raw: dict) -> dict[str, str]:
    """Name of a parameter -> its role."""
    return {spec.name: spec.role for spec in models.parameter_specs(models.load_config(raw))}


def stored_dtypes(raw: dict, scheme: str = "q4f16_1") -> dict[str, str]:
    """Stored name -> dtype."""
    specs = models.parameter_specs(models.load_config(raw))
    return {n: d for spec in specs for n, (_, d) in get_scheme(scheme).storage(spec).items()}
