"""Decoders that know positions by learned vectors, which are added to those of the tokens."""

from collections.abc import Iterator, Sequence
from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.errors import ConfigError
from relaxlm.models.base import CacheHandle, CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import LayerNorm, Norm
from relaxlm.models.weights import Role


class LearnedConfig(DecoderConfig):
    """`rope` is None: a table has a vector for each of `max_position_embeddings` positions."""

    rope: None  # type: ignore[assignment]

    @classmethod
    def _rope(cls, values: Any) -> Any:
        return None

    def for_context(self, context: int) -> DecoderConfig:
        if context > self.max_position_embeddings:
            raise ConfigError(
                f"context_window_size = {context}: this model has learned positions for "
                f"{self.max_position_embeddings} tokens and no others. Set it to at most that"
            )
        return self

    def with_window(self, window: int, sinks: int) -> DecoderConfig:
        if window > 0:
            raise ConfigError(
                f"sliding_window_size = {window}: this model has learned positions for "
                f"{self.max_position_embeddings} tokens, so a text cannot go on beyond them. "
                "Leave it out"
            )
        return super().with_window(window, sinks)


class LearnedPositions(CausalLM):
    def __init__(
        self, config: LearnedConfig, blocks: Sequence[nn.Module], norm: Norm = LayerNorm
    ) -> None:
        super().__init__(config, blocks, norm)
        self.model.embed_positions = nn.Embedding(
            config.max_position_embeddings, config.hidden_size
        )

    def hidden_states(self, input_ids: Tensor, positions: Tensor, cache: CacheHandle) -> tuple:
        first, *others = super().hidden_states(input_ids, positions, cache)
        added = op.astype(self.model.embed_positions(positions), "float32")
        return (first + added, *others)

    def _layers(self, x: Tensor, positions: Tensor, cache: CacheHandle) -> Iterator[Tensor]:
        return super()._layers(x + self.model.embed_positions(positions), positions, cache)

    def _role(self, name: str, shape: tuple[int, ...]) -> Role:
        return "embedding" if "embed_positions" in name else super()._role(name, shape)
