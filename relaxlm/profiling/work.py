"""What a step has to do, whatever the kernels: bytes that it reads and operations it computes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import ml_dtypes  # noqa: F401  teaches NumPy the names bfloat16 and float8_e4m3fn
import numpy as np

from relaxlm.models import load_config, parameter_specs
from relaxlm.models.weights import Role
from relaxlm.runtime.metadata import LibraryMetadata, TensorInfo


@dataclass(frozen=True)
class Work:
    """Of a model, per step and token.

    Attributes:
        weight_bytes: stored, of all that a decoding step of one sequence reads: everything but an
            embedding that isn't the output head as well, and experts that are not chosen.
        layer_weights: numbers in the matrices that every token passes.
        head_weights: numbers in the output head, which only rows with logits pass.
        cache_bytes: of the KV cache, per token of the context.
        state_bytes: of recurrent layers, per sequence.
        pair_operations: of attention, per token and token that it sees, in all layers.
        scan_operations: of recurrences, per token, in all layers.
    """

    weight_bytes: int
    layer_weights: int
    head_weights: int
    cache_bytes: int
    state_bytes: int
    pair_operations: int
    scan_operations: int

    @staticmethod
    def of(info: LibraryMetadata) -> "Work":
        """The work of a library's model."""
        config = load_config(info.model_config_json)
        specs = parameter_specs(config)
        sizes = dict.fromkeys(get_args(Role), 0)
        for spec in specs:
            sizes[spec.role] += math.prod(spec.shape)
        unread = 0
        if sizes["lm_head"]:  # then the embedding is a table of which a step reads single rows
            [name] = [spec.name for spec in specs if spec.role == "embedding"]
            stem = name.removesuffix("weight")  # .q_weight and .q_scale where it is quantized
            unread = sum(nbytes(tensor) for tensor in info.params if tensor.name.startswith(stem))
        chosen = 1.0  # the share of the experts' weights that a token passes
        if sizes["expert"]:
            chosen = config.num_experts_per_tok / config.num_experts  # type: ignore[attr-defined]
            stems = tuple(
                spec.name.removesuffix("weight") for spec in specs if spec.role == "expert"
            )
            stored = sum(nbytes(tensor) for tensor in info.params if tensor.name.startswith(stems))
            unread += round(stored * (1 - chosen))
        attending = {tensor.name.split(".")[0] for tensor in info.kv_cache.tensors}
        return Work(
            weight_bytes=info.memory.params - unread,
            layer_weights=sizes["linear"] + round(sizes["expert"] * chosen),
            head_weights=sizes["lm_head"] or sizes["embedding"],
            cache_bytes=info.kv_cache.bytes_per_token,
            state_bytes=info.state.bytes_per_sequence,
            # A product with a key and one with a value: a multiplication and an addition each.
            pair_operations=4 * config.num_attention_heads * config.head_dim * len(attending),
            scan_operations=sum(
                scan_operations(tensor.shape)
                for tensor in info.state.tensors
                if is_scan_state(tensor.name)
            ),
        )

    def decode_bytes(self, context: int, batch: int) -> int:
        """What one step reads at least, `context` tokens being in each of `batch` caches."""
        return self.weight_bytes + batch * (context * self.cache_bytes + self.state_bytes)

    def operations(self, tokens: int, context: int, rows: int) -> int:
        """Multiplications and additions of matrices, attention and recurrences.

        Args:
            tokens: new ones of one sequence.
            context: tokens that it has before them.
            rows: of logits.
        """
        pairs = tokens * context + tokens * (tokens + 1) // 2
        matrices = tokens * self.layer_weights + rows * self.head_weights
        return 2 * matrices + self.pair_operations * pairs + self.scan_operations * tokens


def is_scan_state(name: str) -> bool:
    """Whether a state tensor is the one that `linear_scan` keeps (`models/state.py`)."""
    return name.endswith(".scan")


def scan_operations(shape: Sequence[int]) -> int:
    """Of `linear_scan`, per token, on a state [heads, K, V].

    Each number fades, gets a product and is multiplied and added for the output. What is removed or
    replaced before is not counted: not every recurrence does it.
    """
    return 5 * math.prod(shape)


def nbytes(tensor: TensorInfo) -> int:
    """Of one parameter."""
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
