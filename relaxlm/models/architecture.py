"""What every model shares: where its parameters come from, and what they are called."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.exporter import Exporter
from tvm.relax.frontend.nn.spec import ModuleSpec

from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Float32Parameter
from relaxlm.models.weights import ParameterSpec, Role, Source


def entry_point(**arguments: Any) -> dict:
    """The signature of a method that takes these and every parameter."""
    return {**arguments, "$": {"param_mode": "plain", "effect_mode": "none"}}


def renamed(name: str, parts: Mapping[str, str]) -> str:
    """A dotted name with some of its parts replaced."""
    name = f".{name}."
    for ours, theirs in parts.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name[1:-1]


class Architecture(nn.Module):
    """A model with the entry points of a library and parameters out of a checkpoint."""

    config: DecoderConfig

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

    def export_spec(self) -> dict:
        """Signatures of the entry points, for `export_tvm`."""
        raise NotImplementedError

    def export_tvm(self, spec: dict, debug: bool = False, allow_extern: bool = False) -> Any:
        """As in `nn.Module`, with parameters under their published names."""
        methods = ModuleSpec.from_raw(spec, self)
        # The exporter takes parameters from the attributes of a module, and reads nothing else.
        methods.module = nn.Module()
        for name, parameter in self.stored_parameters():
            setattr(methods.module, renamed(name, self.published_names), parameter)
        return Exporter(debug=debug).build(methods)[: 3 if allow_extern else 2]

    def stored_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that a library reads, by our name for them."""
        yield from self.named_parameters()

    def parameter_specs(self) -> list[ParameterSpec]:
        """Every parameter in model order, with the checkpoint tensors it is made of."""
        return [
            ParameterSpec(
                renamed(name, self.published_names),
                shape,
                "float32" if is_float32 else self._role(name, shape),
                self._with_all_names(self._sources(name, shape)),
                tuple(map(self._with_all_names, self._other_sources(name, shape))),
            )
            for name, shape, is_float32 in (
                (
                    name,
                    tuple(int(extent) for extent in parameter.shape),
                    isinstance(parameter, Float32Parameter),
                )
                for name, parameter in self.stored_parameters()
            )
        ]

    def ignored_sources(self) -> tuple[str, ...]:
        """Patterns of checkpoint tensors that may stay unused."""
        return self.ignored

    def _role(self, name: str, shape: tuple[int, ...]) -> Role:
        is_vector = len(shape) == 1 or "norm." in name or not name.endswith(".weight")
        return "vector" if is_vector else "linear"

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

    def _other_sources(self, name: str, shape: tuple[int, ...]) -> Sequence[tuple[Source, ...]]:
        """What a parameter is made of in checkpoints that are cut otherwise."""
        return ()

    def _checkpoint_name(self, name: str) -> str:
        return renamed(name, self.checkpoint_names)

    def _with_all_names(self, sources: Sequence[Source]) -> tuple[Source, ...]:
        return tuple(map(self._with_names, sources))

    def _with_names(self, source: Source) -> Source:
        """A source with all that checkpoints call it, and what is tied to it."""
        return replace(source, other_names=self._other_names(source.name))

    def _other_names(self, name: str) -> tuple[str, ...]:
        """What else checkpoints call a tensor."""
        return ()

    def fused_rows(self, part: str) -> tuple[int, ...]:
        """Output rows of each tensor that a fused parameter is made of."""
        config = self.config
        if part == "gate_up_proj":
            return (config.intermediate_size, config.intermediate_size)
        key_value = config.num_key_value_heads * config.head_dim
        return (config.num_attention_heads * config.head_dim, key_value, key_value)
