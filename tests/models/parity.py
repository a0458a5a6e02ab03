"""Compare a compiled model with transformers: tiny random checkpoints, both sides on the CPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

from relaxlm import models
from relaxlm.compiler.build import compile_model
from relaxlm.compiler.options import CompileOptions
from relaxlm.compiler.target import DeviceTarget, resolve_device
from relaxlm.models.weights import ParameterSpec, found_in
from relaxlm.quantization.schemes import Scheme, get_scheme
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.library import Library
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.state_slots import StateSlots
from relaxlm.runtime.step_tables import text_tables
from tests.shared_kernels import shared_kernels

VOCAB = 131
SLOTS = 16


def tiny_config(model_type: str, **change) -> dict:
    """A config.json of two small layers; every value that could be mistaken for another differs."""
    return {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
        **change,
    }


def reference_model(raw: dict) -> transformers.PreTrainedModel:
    """The model transformers builds from a config.json, with no weight left at its default."""
    config = transformers.AutoConfig.for_model(**raw)
    torch.manual_seed(3)
    kind = transformers.AutoModelForCausalLM
    if models.load_config(raw).is_encoder:
        kind = transformers.AutoModel
    model = kind.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                "norm" in name.lower() or ".ln_" in name
            ):  # ones by default, which would hide a swapped norm
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):  # zeros by default, which would hide a missing one
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 0.08)
        for name, buffer in model.named_buffers():
            # A router's, which is no parameter; GPT-2's of that name are masks.
            if name.endswith("bias") and buffer.is_floating_point():
                buffer.normal_(0, 0.3)
    return model.eval()


def stored_parameters(raw: dict, state: dict[str, torch.Tensor], scheme_name: str) -> dict:
    """Checkpoint tensors as the scheme stores them: the fused ones joined, matrices quantized."""
    scheme = get_scheme(scheme_name)
    stored = {}
    for spec in _specs(raw, state):
        for source in spec.sources:  # converting compares them
            assert tuple(state[source.name].shape) == source.shape, source.name
        parts = [source.values(state[source.name].numpy()) for source in spec.sources]
        value = np.concatenate([part.reshape(-1) for part in parts]).reshape(spec.shape)
        quant = scheme.for_role(spec.role)
        names = list(scheme.storage(spec))
        arrays = list(quant.quantize(value).values()) if quant else [_cast(value, scheme, spec)]
        stored |= dict(zip(names, arrays, strict=True))
    return stored


def dequantized_state(raw: dict, state: dict[str, torch.Tensor], scheme_name: str) -> dict:
    """The checkpoint with every value replaced by what the scheme keeps of it."""
    scheme, result = get_scheme(scheme_name), {}
    for spec in _specs(raw, state):
        quant = scheme.for_role(spec.role)
        for source in spec.sources:
            # Two parameters may be parts of one tensor.
            tensor = result.get(source.name, state[source.name]).numpy().copy()
            value = source.values(tensor)
            value = value.reshape(-1, spec.shape[-1]) if quant else value
            kept = quant.dequantize(quant.quantize(value), value.shape) if quant else None
            if kept is None:
                kept = _cast(value, scheme, spec).astype(np.float32)
            source.put_back(tensor, kept)
            result[source.name] = torch.from_numpy(tensor)
    return result


def _specs(raw: dict, state: dict[str, torch.Tensor]) -> list[ParameterSpec]:
    return found_in(models.parameter_specs(models.load_config(raw)), state)


def _cast(value: np.ndarray, scheme: Scheme, spec: ParameterSpec) -> np.ndarray:
    import ml_dtypes

    dtype = scheme.plain_dtype(spec.role)
    return value.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


class Compiled:
    """A compiled tiny model with its cache and page tables."""

    def __init__(
        self,
        raw: dict,
        params: dict,
        scheme: str,
        overrides: str = "",
        opt: str = "O2",
        device: DeviceTarget | None = None,
    ) -> None:
        config, device = models.load_config(raw), device or resolve_device("cpu")
        recurrent = any(map(config.layer_states, range(config.num_hidden_layers)))
        if recurrent and "max_batch_size" not in overrides:
            # A step cannot be repeated for further rows of logits: see `run`.
            overrides = ";".join(filter(None, (overrides, "max_batch_size=256")))
        options = CompileOptions.resolve(config, get_scheme(scheme), None, overrides, opt)
        with shared_kernels():
            built = compile_model(config, raw, get_scheme(scheme), device, options)
        library = Library(built.executable, built.metadata, Path("memory"))
        self.limits = built.metadata.limits
        self.executor = Executor.from_arrays(library, params, 64, SLOTS if recurrent else 0)
        self.sequences = PagedSequences(
            PagePool(64),
            built.metadata.kv_cache.page_size,
            self.limits.sliding_window_size,
            self.limits.attention_sink_size,
            states=StateSlots(PagePool(SLOTS)) if recurrent else None,
        )

    def run(self, prompts: list[np.ndarray], chunks: list[int]) -> list[np.ndarray]:
        """Feed sequences together, `chunks` tokens of each per step; returns every row's logits.

        Logits come `max_batch_size` rows at a time, so a step is repeated for further rows, unless
        that would change a recurrent layer's state once more. An encoder takes whole texts, and
        gives their states.
        """
        if self.executor.metadata.is_encoder:
            tables = text_tables([len(prompt) for prompt in prompts])
            flat = np.concatenate(prompts).astype(np.int32)
            states = self.executor.embeddings(tables, flat, np.arange(len(flat), dtype=np.int32))
            return np.split(states, tables.row_offsets[1:-1])
        ids = [self.sequences.add() for _ in prompts]
        rows: list[list[np.ndarray]] = [[] for _ in prompts]
        done = 0
        for chunk in chunks:
            pieces = [prompt[done : done + chunk] for prompt in prompts]
            tables = self.sequences.batch(
                [(seq, len(piece)) for seq, piece in zip(ids, pieces, strict=True)]
            )
            self.executor.copy_pages(*self.sequences.take_copies())
            flat = np.concatenate(pieces).astype(np.int32)
            wanted = np.arange(len(flat), dtype=np.int32)
            step = self.limits.max_batch_size
            assert self.sequences.states is None or len(flat) <= step, "too long for one step"
            logits = np.concatenate(
                [
                    # Appending the same keys twice to the same slots changes nothing.
                    self.executor.forward(tables, flat, wanted[i : i + step])
                    for i in range(0, len(wanted), step)
                ]
            )
            for i, (start, end) in enumerate(
                zip(tables.row_offsets, tables.row_offsets[1:], strict=False)
            ):
                rows[i].append(logits[start:end])
            done += chunk
        for seq in ids:
            self.sequences.free(seq)
        return [np.concatenate(part) for part in rows]


def reference_logits(model: transformers.PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """[n] token ids to [n, vocab] float32, or to the last states of an encoder [n, hidden]."""
    with torch.no_grad():
        output = model(torch.from_numpy(ids[None].astype(np.int64)))
    found = output.logits if "logits" in output else output.last_hidden_state
    return found[0].float().numpy()


def check_parity(raw: dict) -> None:
    """Logits are those of transformers for one prefill, for chunks, and token by token."""
    model = reference_model(raw)
    params = stored_parameters(raw, dict(model.state_dict()), "q0f32")
    compiled = Compiled(raw, params, "q0f32")
    # 70 tokens: past several pages, past the windows, past the original lengths of ropes.
    ids = np.random.default_rng(5).integers(0, VOCAB, 70)
    expected = reference_logits(model, ids)
    for chunks in ([70], [16, 1, 33, 20], [1] * 70):
        (logits,) = compiled.run([ids], chunks)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5, err_msg=str(chunks))


def check_transcription(
    raw: dict,
    state: dict[str, torch.Tensor],
    reference: Callable[[dict, dict[str, np.ndarray], np.ndarray], np.ndarray],
    scheme: str = "q0f32",
) -> None:
    """Logits are those of a transcription of the published code: in float32 as `check_parity`, of a
    preset as `check_quantized`."""
    exact = scheme == "q0f32"
    stored = stored_parameters(raw, state, scheme)
    compiled = Compiled(raw, stored, scheme, "" if exact else "kv_cache_dtype=float32")
    length, steps = (70, ([70], [16, 1, 33, 20], [1] * 70)) if exact else (37, ([20, 1, 16],))
    ids = np.random.default_rng(5).integers(0, VOCAB, length)
    kept = state if exact else dequantized_state(raw, state, scheme)
    expected = reference(raw, {name: tensor.numpy() for name, tensor in kept.items()}, ids)
    for chunks in steps:
        (logits,) = compiled.run([ids], chunks)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5, err_msg=str(chunks))


def check_text_part(outer: dict) -> None:
    """The text part of a model that reads pictures, too, gives that part's logits, also quantized.

    Args:
        outer: config.json, with `text_config`.
    """
    model = reference_model(outer["text_config"])
    state = dict(model.state_dict())
    inner = {name.replace("model.", "model.language_model.", 1): name for name in state}
    named = {name: state[of] for name, of in inner.items()}
    ids = np.random.default_rng(7).integers(0, VOCAB, 37)
    for scheme in ("q0f32", "q4f16_1"):
        stored = stored_parameters(outer, named, scheme)
        compiled = Compiled(outer, stored, scheme, "kv_cache_dtype=float32")
        (logits,) = compiled.run([ids], [20, 1, 16])
        if scheme != "q0f32":
            kept = dequantized_state(outer, named, scheme)
            model.load_state_dict({inner[name]: kept[name] for name in kept}, strict=False)
        np.testing.assert_allclose(logits, reference_logits(model, ids), rtol=1e-4, atol=2e-5)


def compiled_and_reference(
    raw: dict, scheme: str, overrides: str
) -> tuple[Compiled, transformers.PreTrainedModel]:
    """A compiled tiny model, and transformers with the values that the scheme keeps."""
    model = reference_model(raw)
    state = dict(model.state_dict())
    compiled = Compiled(raw, stored_parameters(raw, state, scheme), scheme, overrides)
    model.load_state_dict(dequantized_state(raw, state, scheme), strict=False)
    return compiled, model


def check_quantized(raw: dict, scheme: str = "q4f16_1") -> None:
    """A preset computes what transformers computes with the values that the preset keeps."""
    cache = "" if models.load_config(raw).is_encoder else "kv_cache_dtype=float32"
    compiled, model = compiled_and_reference(raw, scheme, cache)
    ids = np.random.default_rng(7).integers(0, VOCAB, 37)
    (logits,) = compiled.run([ids], [20, 1, 16])
    np.testing.assert_allclose(logits, reference_logits(model, ids), rtol=1e-4, atol=1e-5)
