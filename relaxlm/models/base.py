"""What every decoder shares: the entry points of a compiled library and the view of a step.

A step takes any mix of sequences and lengths as flat tokens (docs/architecture.md). A model does
not see pages, sequences or the format of the cache. It calls `Step.attention`, an abstract
operator that `compiler/passes/lower_paged_attention.py` turns into kernels for one target and
one cache format.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax, te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op, spec

from relaxlm.models.architecture import Architecture, entry_point
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import (
    Decoder,
    Float32Linear,
    Norm,
    RMSNorm,
    rotate,
    scaled,
    take_rows,
)
from relaxlm.models.weights import Role, Source

PAGED_ATTENTION = "relaxlm.paged_attention"
LATENT_ATTENTION = "relaxlm.latent_attention"


class CacheHandle(nn.Object):
    """Stands for the paged KV cache in a model's signature; the lowering replaces it by tensors."""

    def __init__(self, _expr: relax.Expr, _name: str = "cache") -> None:
        super().__init__(_expr=_expr, _name=_name)


class Positions:
    """What follows from the positions of a step's tokens.

    Args:
        positions: [n] int32, absolute position of each token in its own sequence.
    """

    def __init__(self, config: DecoderConfig, positions: Tensor) -> None:
        self.config, self.positions = config, positions
        self.scale = config.attention_scale
        self._tables: dict[Any, Any] = {}

    def rotary(self, x: Tensor, layer: int) -> Tensor:
        """Rotate [n, heads, head_dim] by each token's position, as the layer does it."""
        rope = self.config.layer_rope(layer)
        if rope is None:
            return x
        if rope not in self._tables:
            frequencies = rope.inverse_frequencies(self.config.head_dim)
            self._tables[rope] = _cos_sin(self.positions, frequencies, rope.attention_factor)
        cos, sin = self._tables[rope]
        return rotate(x, cos, sin, self.config.rope_in_pairs)

    def scale_by_position(self, q: Tensor, beta: float, length: int, first: int = 0) -> Tensor:
        """Queries [n, heads, head_dim] times 1 + beta log(1 + floor(position / length)).

        Positions are counted from `first`.
        """
        key = ("scale", beta, length, first)
        if key not in self._tables:

            def compute(position: te.Tensor) -> te.Tensor:
                def factor(t: tirx.Var) -> tirx.Expr:
                    trained = tirx.floordiv(position[t] + first, length).astype("float32")
                    return 1 + tirx.const(beta, "float32") * tirx.log(1 + trained)

                return te.compute(position.shape, factor, name="position_scale")

            self._tables[key] = op.tensor_expr_op(compute, "position_scale", [self.positions])

        def compute_scaled(q: te.Tensor, factor: te.Tensor) -> te.Tensor:
            return te.compute(
                q.shape,
                lambda t, h, i: (q[t, h, i].astype("float32") * factor[t]).astype(q.dtype),
                name="scale_by_position",
            )

        return op.tensor_expr_op(compute_scaled, "scale_by_position", [q, self._tables[key]])


class Step(Positions):
    """One forward step as a model sees it: n tokens, their positions, and the cache."""

    def __init__(self, config: DecoderConfig, positions: Tensor, cache: CacheHandle) -> None:
        super().__init__(config, positions)
        self.cache = cache

    def attention(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cap: float = 0.0,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Append k and v to the cache of `layer`, then attend from q to all that it holds.

        Args:
            q: [n, num_attention_heads, head_dim], already rotated.
            k, v: [n, num_key_value_heads, head_dim]; k already rotated.
            cap: scores s become cap tanh(s / cap), unless it is 0 (Gemma 2).
            sink_logits: [num_attention_heads], what the softmax of every query head counts like
                the score of a token without a value: `self.sinks` of gpt-oss's attention.

        Returns:
            [n, num_attention_heads, head_dim], in the dtype of q.
        """
        window, sinks = self.config.windows[layer], self.config.attention_sinks
        return self.with_cache(
            PAGED_ATTENTION,
            [
                q,
                k,
                v,
                layer,
                window,
                sinks if window else 0,
                self.scale,
                float(cap),
                *([] if sink_logits is None else [op.astype(sink_logits, "float32")]),
            ],
            q,
        )

    def latent_attention(
        self,
        layer: int,
        q_latent: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        scale: float,
    ) -> Tensor:
        """Append a latent and a rotated key to the cache of `layer`, then attend to all of them.

        All heads share them: scores are those of q_latent with the latents plus those of q_rope
        with the keys, times `scale`. What each layer caches says `config.latent_cache`.

        Args:
            q_latent: [n, heads, latent], queries times what would make keys of latents.
            q_rope: [n, heads, rope], already rotated.
            latent: [n, latent].
            k_rope: [n, rope], already rotated.

        Returns:
            [n, heads, latent], the weighted latents, in the dtype of q_latent.
        """
        arguments = [q_latent, q_rope, latent, k_rope, layer, float(scale)]
        return self.with_cache(LATENT_ATTENTION, arguments, q_latent)

    def with_cache(self, operator: str, arguments: Sequence[Any], like: Tensor) -> Tensor:
        """Call an abstract operator that reads and writes the cache.

        Args:
            arguments: tensors, numbers and strings; the operator gets the cache in front of them.
            like: has the shape and dtype of the result.
        """
        # nn.op.extern only takes tensors and numbers; the handle travels as if it were a tensor.
        handle = Tensor.__new__(Tensor)
        handle._expr = self.cache._expr
        return op.extern(operator, [handle, *arguments], Tensor.placeholder(like.shape, like.dtype))


def _cos_sin(
    positions: Tensor, inverse_frequencies: np.ndarray, factor: float
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle times a factor, once for all layers that share them.

    Returns:
        Two [n, rotary_dim / 2] float32.
    """
    frequencies = Tensor.from_const(inverse_frequencies)

    def scaled(value: tirx.Expr) -> tirx.Expr:
        return value if factor == 1 else value * tirx.const(factor, "float32")

    def table(name: str) -> Tensor:
        function = {"cos": tirx.cos, "sin": tirx.sin}[name]

        def compute(position: te.Tensor, frequency: te.Tensor) -> te.Tensor:
            return te.compute(
                (position.shape[0], frequency.shape[0]),
                lambda t, i: scaled(function(position[t].astype("float32") * frequency[i])),
                name=name,
            )

        return op.tensor_expr_op(compute, f"rope_{name}", [positions, frequencies])

    return table("cos"), table("sin")


class CausalLM(Architecture):
    """A decoder with its entry points. Subclasses make the blocks.

    Args:
        blocks: one per layer, each called as `block(x, step, index)`.
        norm: makes the norm behind the last layer.
        head_bias: whether lm_head has a bias.
    """

    def __init__(
        self,
        config: DecoderConfig,
        blocks: Sequence[nn.Module],
        norm: Norm = RMSNorm,
        head_bias: bool = False,
    ) -> None:
        self.config = config
        self.model = Decoder(config, blocks, norm)
        if not config.tie_word_embeddings:
            self.lm_head = Float32Linear(config.hidden_size, config.vocab_size, head_bias)

    def forward(
        self, input_ids: Tensor, positions: Tensor, cache: CacheHandle, logit_positions: Tensor
    ) -> Tensor:
        """Token ids [n] and the rows wanted [m] to logits [m, vocab] float32."""
        return self._logits(self._rows(input_ids, positions, cache, logit_positions))

    def embeddings(
        self, input_ids: Tensor, positions: Tensor, cache: CacheHandle, rows: Tensor
    ) -> Tensor:
        """Token ids [n] and the rows wanted [r] to the final norm's output [r, hidden] float32."""
        return op.astype(self._rows(input_ids, positions, cache, rows), "float32")

    def hidden_states(self, input_ids: Tensor, positions: Tensor, cache: CacheHandle) -> tuple:
        """The residual stream before the first layer and after each, and the final norm of it.

        Float32 [n, hidden] each.
        """
        x = self.embed(input_ids)
        states = [x, *self._layers(x, positions, cache)]
        states.append(self.model.norm(states[-1]))
        return tuple(op.astype(state, "float32") for state in states)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids [n] to the vectors the first layer reads [n, hidden]."""
        return scaled(self.model.embed_tokens(input_ids), self.config.embedding_scale)

    def _layers(self, x: Tensor, positions: Tensor, cache: CacheHandle) -> Iterator[Tensor]:
        step = Step(self.config, positions, cache)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, step, index)
            yield x

    def _rows(
        self, input_ids: Tensor, positions: Tensor, cache: CacheHandle, rows: Tensor
    ) -> Tensor:
        *_, x = self._layers(self.embed(input_ids), positions, cache)
        return self.model.norm(take_rows(x, rows))

    def _logits(self, x: Tensor) -> Tensor:
        if self.config.tie_word_embeddings:
            weight = self.model.embed_tokens.weight
            logits = op.matmul(x, op.permute_dims(weight), out_dtype="float32")
        else:
            logits = self.lm_head(x)
        return scaled(logits, self.config.logits_scale)

    def export_spec(self) -> dict:
        ids = spec.Tensor(["n"], "int32")
        step = {"input_ids": ids, "positions": ids, "cache": spec.Object(CacheHandle)}
        methods = {
            "forward": entry_point(**step, logit_positions=spec.Tensor(["m"], "int32")),
            "embeddings": entry_point(**step, rows=spec.Tensor(["r"], "int32")),
            "hidden_states": entry_point(**step),
        }
        if not self.config.has_head:
            del methods["forward"]
        return methods

    def stored_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().stored_parameters():
            if self.config.has_head or not name.startswith("lm_head."):
                yield name, parameter

    def ignored_sources(self) -> tuple[str, ...]:
        if self.config.has_head:
            return self.ignored
        names = map(self._checkpoint_name, ("lm_head.weight", "lm_head.bias"))
        return (*self.ignored, *names)

    def _role(self, name: str, shape: tuple[int, ...]) -> Role:
        if name == "lm_head.weight":
            return "lm_head"
        return "embedding" if name.endswith("embed_tokens.weight") else super()._role(name, shape)

    def _with_names(self, source: Source) -> Source:
        source = super()._with_names(source)
        if not (
            self.config.tie_word_embeddings
            and source.name == self._checkpoint_name("model.embed_tokens.weight")
        ):
            return source
        head = self._checkpoint_name("lm_head.weight")
        return replace(source, twins=(head, *self._other_names(head)))

    def _other_names(self, name: str) -> tuple[str, ...]:
        """What else checkpoints call a tensor.

        Those of a base model without head have no part for it. Where a model also reads pictures,
        transformers has written "language_model" in front, and since release 4.52 within.
        """
        base = self._checkpoint_name("model.embed_tokens").partition(".")[0] + "."
        if not name.startswith(base):
            return (f"language_model.{name}",)
        inner = name.removeprefix(base)
        return (inner, f"language_model.{name}", f"model.language_model.{inner}")
