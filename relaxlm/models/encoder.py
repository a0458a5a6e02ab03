"""What every encoder shares: its entry points, and attention in which tokens see their whole text.

A step takes any number of whole texts as flat tokens, one after the other without padding. There
is no cache: keys and values are those of the step. Models call `EncoderStep.attention`, an
abstract operator that `compiler/passes/lower_encoder_attention.py` turns into a kernel.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op, spec

from relaxlm.errors import ConfigError
from relaxlm.models.architecture import Architecture, entry_point
from relaxlm.models.base import Positions
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import take_rows
from relaxlm.models.weights import Role

ENCODER_ATTENTION = "relaxlm.encoder_attention"


class EncoderConfig(DecoderConfig):
    """The configuration fields that decide what an encoder computes.

    The sizes are those of a decoder; there is no cache, so neither are there windows that drop
    tokens, nor a head.
    """

    is_encoder: ClassVar[bool] = True

    model_task: Literal["embedding"] = "embedding"
    is_decoder: Literal[False]
    add_cross_attention: Literal[False]

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> "DecoderConfig":
        # Older folders name no task, and there is no other.
        raw = {**raw, "model_task": "embedding"}
        if (raw.get("context_window_size") or 0) > 0:
            # Folders published for MLC have the length of the table only here.
            raw.setdefault("max_position_embeddings", raw["context_window_size"])
        return super().read(raw, where)

    def for_context(self, context: int) -> "EncoderConfig":
        if context > self.longest_text:
            raise ConfigError(
                f"context_window_size = {context}: this model has positions for "
                f"{self.longest_text} tokens and no others. Set it to at most that"
            )
        return self

    def with_window(self, window: int, sinks: int) -> "EncoderConfig":
        if window > 0 or sinks > 0:
            raise ConfigError(
                f"sliding_window_size = {window}, attention_sink_size = {sinks}: an encoder reads "
                "a text at once and keeps nothing of it. Leave both out"
            )
        return self


class EncoderStep(Positions):
    """One step as an encoder sees it: the tokens of b texts, and where each text begins.

    Args:
        row_offsets: [b + 1] int32; text i has the rows row_offsets[i] .. row_offsets[i + 1].
    """

    def __init__(self, config: DecoderConfig, positions: Tensor, row_offsets: Tensor) -> None:
        super().__init__(config, positions)
        self.row_offsets = row_offsets

    def attention(self, qkv: Tensor) -> Tensor:
        """Every token attends to all tokens of its text.

        Args:
            qkv: [n, q_heads + 2 kv_heads, head_dim], the heads of queries, keys and values.

        Returns:
            [n, q_heads * head_dim], in the dtype of qkv.
        """
        n, _, dim = qkv.shape
        heads = self.config.num_attention_heads
        out = Tensor.placeholder((n, heads * dim), qkv.dtype)
        return op.extern(ENCODER_ATTENTION, [qkv, self.row_offsets, heads, self.scale], out)


class Encoder(Architecture):
    """An encoder with its entry points.

    Subclasses make `config`, and say what the first layer reads and what the layers are.
    """

    # What transformers calls the part that is not a head.
    base_name: ClassVar[str]

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids and positions [n] to the vectors the first layer reads [n, hidden]."""
        raise NotImplementedError

    def blocks(self) -> Sequence[nn.Module]:
        """The layers, each called as `block(x, step, index)`."""
        raise NotImplementedError

    def last(self, x: Tensor) -> Tensor:
        """What is done behind the last layer: [m, hidden] -> [m, hidden]."""
        return x

    def embeddings(
        self, input_ids: Tensor, positions: Tensor, row_offsets: Tensor, rows: Tensor
    ) -> Tensor:
        """Token ids [n] and the rows wanted [r] to their last states [r, hidden] float32."""
        *_, x = self._layers(self.embed(input_ids, positions), positions, row_offsets)
        return op.astype(self.last(take_rows(x, rows)), "float32")

    def hidden_states(self, input_ids: Tensor, positions: Tensor, row_offsets: Tensor) -> tuple:
        """The state before the first layer and after each, and what comes of the last one.

        Float32 [n, hidden] each.
        """
        x = self.embed(input_ids, positions)
        states = [x, *self._layers(x, positions, row_offsets)]
        states.append(self.last(states[-1]))
        return tuple(op.astype(state, "float32") for state in states)

    def _layers(self, x: Tensor, positions: Tensor, row_offsets: Tensor) -> Iterator[Tensor]:
        step = EncoderStep(self.config, positions, row_offsets)
        for index, layer in enumerate(self.blocks()):
            x = layer(x, step, index)
            yield x

    def export_spec(self) -> dict:
        ids, offsets = spec.Tensor(["n"], "int32"), spec.Tensor(["offsets"], "int32")
        step = {"input_ids": ids, "positions": ids, "row_offsets": offsets}
        return {
            "embeddings": entry_point(**step, rows=spec.Tensor(["r"], "int32")),
            "hidden_states": entry_point(**step),
        }

    def _role(self, name: str, shape: tuple[int, ...]) -> Role:
        if name.endswith("word_embeddings.weight"):
            return "embedding"
        # Tables of positions and of token types are small, and added to every token.
        return "vector" if "_embeddings." in name else super()._role(name, shape)

    def _other_names(self, name: str) -> tuple[str, ...]:
        """Those of a model with a head have the base model's name in front."""
        return (f"{self.base_name}.{name}",)
