"""What every decoder shares: the entry points of a compiled library and the view of a step.

A step takes any mix of sequences and lengths as flat tokens (docs/architecture.md). A model does
not see pages, sequences or the format of the cache. It calls `Step.attention`, an abstract
operator that `compiler/passes/lower_paged_attention.py` turns into kernels for one target and
one cache format.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from tvm import relax, te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op, spec
from tvm.relax.frontend.nn.exporter import Exporter
from tvm.relax.frontend.nn.spec import ModuleSpec

from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import (
    Decoder,
    Float32Parameter,
    Head,
    Norm,
    RMSNorm,
    rotate,
    scaled,
    take_rows,
)
from relaxlm.models.weights import ParameterSpec, Role, Source

PAGED_ATTENTION = "relaxlm.paged_attention"
LATENT_ATTENTION = "relaxlm.latent_attention"


class CacheHandle(nn.Object):
    """Stands for the paged KV cache in a model's signature; the lowering replaces it by tensors."""

    def __init__(self, _expr: relax.Expr, _name: str = "cache") -> None:
        super().__init__(_expr=_expr, _name=_name)


class Step:
    """One forward step as a model sees it: n tokens, their positions, and the cache.

    Args:
        positions: [n] int32, absolute position of each token in its own sequence.
    """

    def __init__(self, config: DecoderConfig, positions: Tensor, cache: CacheHandle) -> None:
        self.config, self.cache, self.positions = config, cache, positions
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

    def scale_by_position(self, q: Tensor, beta: float, length: int) -> Tensor:
        """Queries [n, heads, head_dim] times 1 + beta log(1 + floor(position / length))."""
        key = ("scale", beta, length)
        if key not in self._tables:

            def compute(position: te.Tensor) -> te.Tensor:
                def factor(t: tirx.Var) -> tirx.Expr:
                    trained = tirx.floordiv(position[t], length).astype("float32")
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


def _renamed(name: str, parts: Mapping[str, str]) -> str:
    """A dotted name with some of its parts replaced."""
    name = f".{name}."
    for ours, theirs in parts.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name[1:-1]


class CausalLM(nn.Module):
    """A decoder with its entry points. Subclasses make the blocks.

    Args:
        blocks: one per layer, each called as `block(x, step, index)`.
        norm: makes the norm behind the last layer.
    """

    # Parameter name parts that hold several checkpoint tensors, concatenated along the output axis.
    fused: ClassVar[dict[str, tuple[str, ...]]] = {}
    # Patterns of checkpoint tensors that no parameter needs.
    ignored: ClassVar[tuple[str, ...]] = ("*.rotary_emb.inv_freq", "rotary_emb.inv_freq")
    # Whole parts of the names of our modules -> what the family's checkpoints call them, in order.
    checkpoint_names: ClassVar[Mapping[str, str]] = {}
    # The same for parameters of the compiled model, which are called as in folders that are
    # published for MLC.
    published_names: ClassVar[Mapping[str, str]] = {}
    # Added to the weight of every norm: some families store what it differs from 1 by.
    norm_shift: ClassVar[float] = 0.0
    # Whether lm_head has a bias.
    head_bias: ClassVar[bool] = False

    def __init__(
        self, config: DecoderConfig, blocks: Sequence[nn.Module], norm: Norm = RMSNorm
    ) -> None:
        self.config = config
        self.model = Decoder(config, blocks, norm)
        if not config.tie_word_embeddings:
            self.lm_head = Head(config, self.head_bias)

    def forward(
        self, input_ids: Tensor, positions: Tensor, cache: CacheHandle, logit_positions: Tensor
    ) -> Tensor:
        """Token ids [n] and the rows wanted [m] to logits [m, vocab] float32."""
        *_, x = self._layers(self.embed(input_ids), positions, cache)
        return self._logits(self.model.norm(take_rows(x, logit_positions)))

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

    def _logits(self, x: Tensor) -> Tensor:
        if self.config.tie_word_embeddings:
            weight = self.model.embed_tokens.weight
            logits = op.matmul(x, op.permute_dims(weight), out_dtype="float32")
        else:
            logits = self.lm_head(x)
        return scaled(logits, self.config.logits_scale)

    def export_spec(self) -> dict:
        """Signatures of the entry points, for `export_tvm`."""

        def method(**arguments) -> dict:
            return {**arguments, "$": {"param_mode": "plain", "effect_mode": "none"}}

        ids, rows = spec.Tensor(["n"], "int32"), spec.Tensor(["m"], "int32")
        step = {"input_ids": ids, "positions": ids, "cache": spec.Object(CacheHandle)}
        return {
            "forward": method(**step, logit_positions=rows),
            "hidden_states": method(**step),
            "embed": method(input_ids=ids),
        }

    def export_tvm(self, spec: dict, debug: bool = False, allow_extern: bool = False) -> Any:
        """As in `nn.Module`, with parameters under their published names."""
        methods = ModuleSpec.from_raw(spec, self)
        # The exporter takes parameters from the attributes of a module, and reads nothing else.
        methods.module = nn.Module()
        for name, parameter in self.named_parameters():
            setattr(methods.module, _renamed(name, self.published_names), parameter)
        return Exporter(debug=debug).build(methods)[: 3 if allow_extern else 2]

    def parameter_specs(self) -> list[ParameterSpec]:
        """Every parameter in model order, with the checkpoint tensors it is made of."""
        return [
            ParameterSpec(
                _renamed(name, self.published_names),
                shape,
                "float32" if is_float32 else self._role(name, shape),
                tuple(self._with_names(source) for source in self._sources(name, shape)),
            )
            for name, shape, is_float32 in (
                (
                    name,
                    tuple(int(extent) for extent in parameter.shape),
                    isinstance(parameter, Float32Parameter),
                )
                for name, parameter in self.named_parameters()
            )
        ]

    def ignored_sources(self) -> tuple[str, ...]:
        """Patterns of checkpoint tensors that may stay unused."""
        return self.ignored

    def _role(self, name: str, shape: tuple[int, ...]) -> Role:
        if len(shape) == 1 or "norm." in name:
            return "vector"
        if name == "lm_head.weight":
            return "lm_head"
        return "embedding" if name.endswith("embed_tokens.weight") else "linear"

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        for part, pieces in self.fused.items():
            if f".{part}." in name:
                rows = self.fused_rows(part)
                return tuple(
                    Source(self._checkpoint_name(name.replace(part, piece)), (count, *shape[1:]))
                    for piece, count in zip(pieces, rows, strict=True)
                )
        shift = self.norm_shift if name.endswith("norm.weight") else 0.0
        return (Source(self._checkpoint_name(name), shape, shift=shift),)

    def _checkpoint_name(self, name: str) -> str:
        return _renamed(name, self.checkpoint_names)

    def _with_names(self, source: Source) -> Source:
        """A source with all that checkpoints call it, and what is tied to it."""
        source = replace(source, other_names=self._other_names(source.name))
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

    def fused_rows(self, part: str) -> tuple[int, ...]:
        """Output rows of each tensor that a fused parameter is made of."""
        config = self.config
        if part == "gate_up_proj":
            return (config.intermediate_size, config.intermediate_size)
        key_value = config.num_key_value_heads * config.head_dim
        return (config.num_attention_heads * config.head_dim, key_value, key_value)
