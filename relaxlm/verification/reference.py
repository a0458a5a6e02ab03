"""The original model in transformers and torch, on the CPU in float32: what a library is held to.

torch and transformers are imported inside functions, and nowhere but in this folder: relaxlm runs
without them.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from relaxlm.errors import CheckpointError, UnsupportedError, VersionError
from relaxlm.files import read_json_object
from relaxlm.quantization.kv_cache import KVFormat
from relaxlm.verification.kept_weights import checkpoint_tensors

_EXTRA = 'pip install "relaxlm[test]"'
_TORCH = "2.13.0"
# Models that are one of another name, which transformers knows.
_KNOWN_AS = {"kimi_k2": "deepseek_v3"}
# The plain attention of an architecture, a function of its file.
_ATTENTION = "eager_attention_forward"


class Reference:
    """A model of transformers.

    Attributes:
        state: name in transformers -> torch tensor; writing to it changes the model.
    """

    state: dict[str, Any]
    _model: Any
    _layers: Any

    def __init__(self, checkpoint: Path, layers: int, for_embeddings: bool = False) -> None:
        """Load a Hugging Face folder, every weight widened to float32.

        Args:
            layers: how many the model has.
            for_embeddings: without an output head, for the states of the last norm.

        Raises:
            VersionError: torch or transformers cannot be imported.
            CheckpointError: transformers does not load the folder, or misses some of its weights.
        """
        check_packages()
        import torch
        import transformers

        self._checkpoint, self._count = checkpoint, layers
        self._for_embeddings = for_embeddings
        kind: Any = transformers.AutoModelForCausalLM
        if for_embeddings:
            kind = transformers.AutoModel
        config = _own_config(checkpoint)
        if config is None:
            self._load(kind, str(checkpoint))
        else:
            with torch.device("meta"):  # for its class: `kind` itself asks for a folder
                kind = type(kind.from_config(config))
            self._load(kind, None, config=config, state_dict=checkpoint_tensors(checkpoint))

    def replace_weights(self, weights: dict[str, Any]) -> None:
        """Load the same model with other weights, in the memory of those of now.

        Args:
            weights: name in the checkpoint -> float32 torch tensor.

        Raises:
            CheckpointError: transformers misses some.
        """
        kind, config = type(self._model), self._model.config
        self.state, self._layers, self._model = {}, None, None
        self._load(kind, None, config=config, state_dict=weights)

    def _load(self, kind: Any, source: str | None, **options: Any) -> None:
        import torch
        import transformers

        with _quiet(transformers):
            try:
                model, found = kind.from_pretrained(
                    source,
                    dtype=torch.float32,
                    # The plain formula; others may reorder sums or skip masked parts.
                    attn_implementation="eager",
                    local_files_only=True,
                    output_loading_info=True,
                    **options,
                )
            except Exception as error:  # of many kinds, by model and version
                reason = str(error).strip().split("\n", 1)[0]
                place = "a model" if self._for_embeddings else "a language model"
                raise CheckpointError(
                    f"{self._checkpoint}: transformers {transformers.__version__} does not load it "
                    f"as {place} ({type(error).__name__}: {reason}). relaxlm was tested with the "
                    f"packages of {_EXTRA}"
                ) from error
        absent = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
        # What other tasks make of the states; many checkpoints are without it.
        absent = [name for name in absent if not name.startswith("pooler.")]
        if absent:
            # transformers would go on with random numbers in their place.
            raise CheckpointError(
                f"{self._checkpoint}: transformers misses weights in it, or they have other "
                f"shapes: {', '.join(absent[:5])}{' and more' if len(absent) > 5 else ''}"
            )
        self._model = model.eval()
        self._layers = _find_layers(model, self._count)
        self.state = dict(model.state_dict())

    def run(
        self, ids: list[int], cache: KVFormat | None = None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """One text in one go.

        Args:
            cache: rounds keys and values as this format stores them; None: they stay as they are.

        Returns:
            results: [n, vocab] float32 logits, or [n, hidden] float32 states of the last norm.
            states: the residual stream [n, hidden] before the first layer and after each. Taken at
                the layers themselves: of what transformers returns as hidden states, the last one
                has been through the final norm.
        """
        import torch

        states: list[Any] = []

        def before(module: Any, arguments: tuple, options: dict) -> None:
            states.append(arguments[0] if arguments else options["hidden_states"])

        def after(module: Any, arguments: tuple, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        if cache is not None and cache.dtype != "float32":
            attention: Any = _through_cache(self._layers[0], cache)
        else:
            attention = nullcontext()
        hooks = [self._layers[0].register_forward_pre_hook(before, with_kwargs=True)]
        hooks += [layer.register_forward_hook(after) for layer in self._layers]
        try:
            with attention, torch.no_grad():
                # Encoders have no cache that they could be told not to use.
                options = {} if self._for_embeddings else {"use_cache": False}
                output = self._model(torch.tensor([ids]), **options)
        finally:
            for hook in hooks:
                hook.remove()
        results = output.last_hidden_state if self._for_embeddings else output.logits
        return results[0].numpy(), [state[0].numpy() for state in states]


def _own_config(checkpoint: Path) -> Any:
    """The configuration to load a checkpoint's values with, None where transformers reads it.

    It does not know every name; and quantized checkpoints, which it decodes on GPUs alone or with
    further packages, stand for values that relaxlm reads itself.
    """
    import transformers

    raw = read_json_object(checkpoint / "config.json", CheckpointError)
    name = raw.pop("model_type", None)
    quantized = raw.pop("quantization_config", None) is not None
    if not quantized and name not in _KNOWN_AS:
        return None
    return transformers.AutoConfig.for_model(_KNOWN_AS.get(name, name), **raw)


def check_packages() -> None:
    """Import torch and transformers.

    Raises:
        VersionError: one of them is not there, or does not work.
    """
    try:
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM  # noqa: F401
    except Exception as error:  # a broken installation raises OSError and others
        reason = str(error).strip().split("\n", 1)[0]
        raise VersionError(
            "verify runs the original model with torch and transformers, which cannot be imported "
            f"({reason}): {_EXTRA}, which brings torch=={_TORCH}"
        ) from error


@contextmanager
def _through_cache(layer: Any, format: KVFormat) -> Iterator[None]:
    """Keys and values of a model of transformers go through a cache format meanwhile."""
    import torch

    architecture = sys.modules[type(layer).__module__]
    plain = getattr(architecture, _ATTENTION, None)
    if plain is None:
        raise UnsupportedError(
            f"verify cannot round the cache of {architecture.__name__} to {format.name}: compile "
            'for verification with --overrides "kv_cache_dtype=float32", or give --reference float'
        )

    def attention(module: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
        kept = (
            torch.from_numpy(format.dequantize(*format.quantize(x.numpy()))) for x in (key, value)
        )
        return plain(module, query, *kept, *rest, **options)

    setattr(architecture, _ATTENTION, attention)
    try:
        yield
    finally:
        setattr(architecture, _ATTENTION, plain)


def _find_layers(model: Any, count: int) -> Any:
    """The list of decoder layers, whatever a model calls it."""
    from torch.nn import ModuleList

    lists = [m for m in model.modules() if isinstance(m, ModuleList) and len(m) == count]
    assert lists, f"no list of {count} layers in {type(model).__name__}"
    return lists[0]


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bar and notes on loading."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
