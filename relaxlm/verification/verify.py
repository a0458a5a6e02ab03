"""Runs a library and the original model over the same texts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from relaxlm import models
from relaxlm.errors import ConfigError, LibraryError, RequestError
from relaxlm.models.config import DecoderConfig
from relaxlm.models.weights import ParameterSpec
from relaxlm.quantization.convert import open_float_checkpoint
from relaxlm.quantization.kv_cache import KVFormat, get_kv_format
from relaxlm.quantization.schemes import Scheme, get_scheme
from relaxlm.runtime.chat_config import ChatConfigFile, Pooling
from relaxlm.runtime.embedding import pooled
from relaxlm.runtime.library import Library, check_device, refuse_compile_options
from relaxlm.runtime.metadata import LibraryMetadata
from relaxlm.runtime.params import WeightFolder
from relaxlm.runtime.tokenizer import Tokenizer
from relaxlm.verification.compiled import CompiledModel
from relaxlm.verification.kept_weights import checkpoint_tensors, has_all, keep_weights
from relaxlm.verification.limits import (
    Limits,
    damage_limits,
    damage_vector_limits,
    exact_limits,
    exact_vector_limits,
)
from relaxlm.verification.metrics import compare_logits, compare_vectors, layer_error
from relaxlm.verification.reference import Reference, check_packages
from relaxlm.verification.results import Comparison, PromptResult, ReferenceKind, Verification

# Fields of a configuration that say how large a model is; the others say what it computes.
_SIZES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
# torch, transformers, the compiler, and blocks of logits and weights that are being compared.
_BASE_MEMORY = 800_000_000

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Thresholds:
    """Limits given by hand; None: the default of the preset, see `limits.py`.

    `kl` and `top1` hold against the checkpoint, `max_error` against the values that the library
    stores; where only one of the two references is used, all hold against that one. Vectors of
    texts have a `cosine`, which holds against the checkpoint, in place of `kl` and `top1`.
    """

    max_error: float | None = None
    kl: float | None = None
    top1: float | None = None
    cosine: float | None = None

    def check(self, for_embeddings: bool) -> None:
        """
        Raises:
            ConfigError: a limit of what the library does not compute.
        """
        if for_embeddings and (self.kl is not None or self.top1 is not None):
            raise ConfigError(
                "--threshold and --min-top1 are limits of logits, and the library is for "
                "embeddings: give --min-cosine or --max-error"
            )
        if not for_embeddings and self.cosine is not None:
            raise ConfigError(
                "--min-cosine is a limit of embeddings, and the library computes logits: give "
                "--threshold, --min-top1 or --max-error"
            )


@dataclass(frozen=True)
class Job:
    """A verification that has been checked as far as files and configurations tell.

    Attributes:
        texts: each prompt and its token ids.
        pooling: how the states of a text become its vector, of a library for embeddings.
        settings: differences between the configurations, in words.
    """

    source: Path
    library: Library
    weights: WeightFolder
    config: DecoderConfig
    specs: list[ParameterSpec]
    texts: list[tuple[str, list[int]]]
    references: tuple[ReferenceKind, ...]
    settings: tuple[str, ...]
    pooling: Pooling | None = None

    @property
    def routed(self) -> bool:
        """Whether a router chooses experts."""
        return any(spec.role == "expert" for spec in self.specs)

    @property
    def scheme(self) -> Scheme:
        return get_scheme(self.library.metadata.quantization)

    @property
    def cache(self) -> KVFormat:
        return get_kv_format(self.library.metadata.kv_cache.dtype)

    @property
    def activations(self) -> str:
        """The dtype in which the library computes, or "rounded" for act_quant=1."""
        from relaxlm.compiler.pipeline import compute_dtype

        if "act_quant=1" in self.library.metadata.opt.split(";"):
            return "rounded"
        return compute_dtype(self.library.metadata.target.kind, self.scheme)

    def memory_estimate(self) -> tuple[int, int, int]:
        """Bytes of the original model in float32, of the library, and of the results compared."""
        info = self.library.metadata
        original = 4 * sum(math.prod(spec.shape) for spec in self.specs)
        if self.routed:  # transformers has all experts in one tensor: they are there twice
            original *= 2
        temporary = max(info.step_bytes, info.memory.temporary["hidden_states"])
        tokens = sum(len(ids) for _, ids in self.texts)
        longest = max(len(ids) for _, ids in self.texts)
        row = info.hidden_size if self.pooling else info.vocab_size
        per_token = row + (len(self.config.windows) + 1) * info.hidden_size
        results = 4 * (tokens + longest) * per_token
        return original + _BASE_MEMORY, info.memory.params + temporary, results

    def run(
        self, thresholds: Thresholds | None = None, progress: Progress = lambda text: None
    ) -> Verification:
        """Run the library, then the original, and compare.

        Raises:
            CheckpointError: transformers does not load the checkpoint.
            WeightsError: the folder's weights are not those of the library.
            ConfigError: a threshold of what the library does not compute.
        """
        info, layers = self.library.metadata, self.config.num_hidden_layers
        thresholds = thresholds or Thresholds()
        thresholds.check(self.pooling is not None)
        progress("the library")
        compiled = CompiledModel(self.library, self.weights, max(len(i) for _, i in self.texts))
        results = [compiled.run(ids) for _, ids in self.texts]
        progress("loading the original")
        reference = Reference(self.source, layers, self.pooling is not None)
        comparisons = []
        if "float" in self.references:
            comparisons.append(self._compare("float", reference, results, progress))
        progress("comparing the weights")
        state = reference.state
        if not has_all(state, self.specs):
            state = checkpoint_tensors(self.source)
        differences = keep_weights(state, self.specs, self.scheme, self.weights)
        if "dequantized" in self.references:
            if state is not reference.state:
                progress("loading the values that the library stores")
                reference.replace_weights(state)
            comparisons.append(self._compare("dequantized", reference, results, progress))
        return Verification(
            self.source,
            self.library.path,
            self.weights.path,
            info.quantization,
            info.target.kind,
            info.kv_cache.dtype,
            tuple(_with_thresholds(comparisons, thresholds)),
            tuple(differences),
            self.settings,
        )

    def _compare(
        self, kind: ReferenceKind, reference: Reference, results: Sequence, progress: Progress
    ) -> Comparison:
        exact = kind == "dequantized" or is_exact(self.library.metadata, self.weights)
        cache = self.cache if exact and self.library.metadata.kv_cache.tensors else None
        limits, prompts = self._limits(exact), []
        for number, ((text, ids), (found, states)) in enumerate(
            zip(self.texts, results, strict=True), start=1
        ):
            progress(f"{kind} reference, text {number} of {len(self.texts)}")
            expected, expected_states = reference.run(ids, cache)
            layers = (
                layer_error(theirs, ours, limits.rerouted)
                for theirs, ours in zip(expected_states, states, strict=True)
            )
            distance = (
                compare_logits(expected, found, ids)
                if self.pooling is None
                else compare_vectors(expected, found, partial(pooled, pooling=self.pooling))
            )
            prompts.append(PromptResult(text, len(ids), distance, tuple(layers)))
        return Comparison(kind, tuple(prompts), limits)

    def _limits(self, exact: bool) -> Limits:
        # An encoder's metadata names a cache, too, and has none.
        cache = self.cache.name if self.library.metadata.kv_cache.tensors else "float32"
        if self.pooling is not None:
            if exact:
                return exact_vector_limits(self.activations, cache, self.routed)
            return damage_vector_limits(self.scheme, self.activations, cache)
        if exact:
            return exact_limits(self.activations, cache, self.routed)
        return damage_limits(self.scheme, self.activations, cache)


def is_exact(info: LibraryMetadata, weights: WeightFolder) -> bool:
    """Whether a library stores everything in float32, so that nothing is lost of a checkpoint."""
    rounded = any(record.stored_as_bfloat16 for record in weights.records.values())
    return info.quantization == "q0f32" and info.kv_cache.dtype == "float32" and not rounded


def _with_thresholds(comparisons: list[Comparison], given: Thresholds) -> list[Comparison]:
    """With the limits given by hand: KL and top-1 for the first, the largest error for the last."""
    result = []
    for index, comparison in enumerate(comparisons):
        limits = comparison.limits
        if index == 0:
            limits = limits.changed(kl=given.kl, top1=given.top1, cosine=given.cosine)
        if index == len(comparisons) - 1:
            limits = limits.changed(max_error=given.max_error)
        result.append(Comparison(comparison.reference, comparison.prompts, limits))
    return result


def prepare(
    source: Path,
    target: Path,
    prompts: Sequence[str],
    *,
    weights: Path | None = None,
    model_lib: Path | None = None,
    device: str = "auto",
    overrides: str | None = None,
    opt: str | None = None,
    max_length: int = 256,
    reference: Literal["both", "float", "dequantized"] = "both",
    progress: Callable[[str, float], Any] = lambda stage, share: None,
) -> Job:
    """Open everything, compile a folder's library if none is given, and check that all of it fits.

    Args:
        source: the original Hugging Face folder.
        target: a converted folder, or a library.
        weights: a library's converted folder; by default the folder it lies in.
        model_lib: a converted folder's library; compiled just in time by default.
        device, overrides, opt: for just-in-time compilation.
        max_length: tokens of a prompt that are used.
        reference: what to compare with. A library that stores everything in float32 is compared
            with the checkpoint only: it is the same.

    Raises:
        VersionError: torch or transformers are missing.
        CheckpointError: `source` has no weights that can be read.
        ConfigError: options that contradict each other.
        LibraryError: a library that cannot run here, or of another model than `source`.
        WeightsError: the folder has no weights, or damaged ones.
        TokenizerError: no tokenizer in the converted folder, nor in `source`.
        RequestError: a prompt without tokens, or with tokens that the model does not have.
    """
    check_packages()
    open_float_checkpoint(source)
    config = models.load_config(source)
    library, folder = _open(target, weights, model_lib, device, overrides, opt, progress)
    info = library.metadata
    if info.model_task != config.model_task:  # a decoder is compiled for either
        config = models.load_config(source, info.model_task)
    pooling: Pooling | None = None
    if info.model_task == "embedding":
        chat = ChatConfigFile.load(folder.path)
        pooling = chat.embedding(info.is_encoder).pooling_strategy
    settings = _compare_configs(config, library, source)
    chosen: tuple[ReferenceKind, ...] = ("float", "dequantized")
    if reference != "both":
        chosen = (reference,)
    elif is_exact(library.metadata, folder):
        chosen = ("float",)
    length = _longest(max_length, library.metadata, config)
    tokenizer = Tokenizer.load(folder.path if _has_tokenizer(folder.path) else source)
    texts = [(prompt, _encode(prompt, tokenizer, config.vocab_size)[:length]) for prompt in prompts]
    specs = models.parameter_specs(config)
    return Job(source, library, folder, config, specs, texts, chosen, tuple(settings), pooling)


def _open(
    target: Path,
    weights: Path | None,
    model_lib: Path | None,
    device: str,
    overrides: str | None,
    opt: str | None,
    progress: Callable[[str, float], Any],
) -> tuple[Library, WeightFolder]:
    if target.is_dir():
        if weights is not None:
            raise ConfigError(
                f"--weights {weights} goes with a library, but {target} is a folder and has its "
                "own weights: give its library with --model-lib, or leave --weights out"
            )
        folder = WeightFolder(target)
        if model_lib is not None:
            return _load(model_lib, device, overrides, opt), folder
        from relaxlm.runtime.jit import library_for

        return library_for(target, device, overrides, progress, opt), folder
    if model_lib is not None:
        raise ConfigError(
            f"--model-lib {model_lib} goes with a converted folder, but {target} is none: "
            "give the library's weights with --weights FOLDER"
        )
    return _load(target, device, overrides, opt), WeightFolder(weights or target.parent)


def _load(path: Path, device: str, overrides: str | None, opt: str | None) -> Library:
    refuse_compile_options(path, overrides=overrides, opt=opt)
    library = Library.load(path)
    check_device(library, device)
    return library


def _compare_configs(config: DecoderConfig, library: Library, source: Path) -> list[str]:
    """Refuse a library of a model of another size; return other differences, in words."""
    info = library.metadata
    compiled = models.load_config(info.model_config_json)
    sizes = [(name, getattr(compiled, name), getattr(config, name)) for name in _SIZES]
    if different := [size for size in sizes if size[1] != size[2]]:
        differences = "; ".join(
            f"{name} is {ours}, not {theirs}" for name, ours, theirs in different
        )
        raise LibraryError(
            f"{library.path} was compiled for another model than {source}: {differences}. Give the "
            "checkpoint that it was made from, or compile for this one"
        )
    return [
        f"{name}: {ours.get(name)} in the library, {theirs.get(name)} in {source}"
        for ours, theirs in [(_computed(compiled), _computed(config))]
        for name in {**theirs, **ours}
        if ours.get(name) != theirs.get(name)
    ]


def _computed(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a configuration that decide what is computed, sizes aside."""
    fields = config.model_dump(exclude={*_SIZES, "rope", "windows", "max_position_embeddings"})
    ropes = {name: getattr(config, name, None) for name in ("rope", "local_rope")}
    rope = {
        f"{name}.{key}": value
        for name, found in ropes.items()
        if found is not None
        for key, value in found.model_dump().items()
    }
    return fields | rope | {"sliding windows": sorted(set(config.windows))}


def _longest(max_length: int, info: LibraryMetadata, config: DecoderConfig) -> int:
    """Tokens that a text may have: the original has no window but its own."""
    lengths = [max_length, info.limits.context_window_size]
    if info.limits.sliding_window_size != config.sliding_window:
        lengths.append(info.limits.sliding_window_size)
    return min(length for length in lengths if length > 0)


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def _encode(prompt: str, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    ids = tokenizer.encode(prompt)
    if not ids:
        raise RequestError(f"prompt {prompt!r} has no tokens, expected at least one")
    if max(ids) >= vocab_size:
        raise RequestError(
            f"prompt {prompt!r} has the token id {max(ids)}, and the model has {vocab_size} "
            f"tokens; is {tokenizer.where} the tokenizer of this model?"
        )
    return ids
