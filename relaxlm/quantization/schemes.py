"""The presets: what each name stores for every kind of parameter.

`SCHEMES` is the only place where a preset is defined. The converter, the IR transform and the
NumPy reference all take a `Scheme` from here, so they cannot disagree.

    name      q<bits><dtype>_<variant>; bits 0 means not quantized
    dtype     of scales and of everything that is not quantized: f16, bf16 or f32
    variant   0: linear weights and head transposed; 1: all row by row; 2: as 1, but embedding and
              head stay in floating point
"""

from dataclasses import dataclass, replace

from relaxlm.errors import ConfigError
from relaxlm.models.weights import ParameterSpec, Role
from relaxlm.quantization.groupwise import GroupQuant

__all__ = ["SCHEMES", "GroupQuant", "Scheme", "get_scheme"]


@dataclass(frozen=True)
class Scheme:
    """How a preset stores the parameters of a model; None means in `dtype`, not quantized."""

    name: str
    dtype: str
    linear: GroupQuant | None
    embedding: GroupQuant | None
    lm_head: GroupQuant | None

    def for_role(self, role: Role) -> GroupQuant | None:
        """The format of a parameter with this role; vectors are never quantized."""
        formats: dict[Role, GroupQuant | None] = {
            "linear": self.linear,
            "expert": self.linear,
            "embedding": self.embedding,
            "lm_head": self.lm_head,
            "vector": None,
            "float32": None,
        }
        return formats[role]

    def plain_dtype(self, role: Role) -> str:
        """The dtype of a parameter that is not quantized."""
        return "float32" if role == "float32" else self.dtype

    def storage(self, spec: ParameterSpec) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype) of the stored tensors of one parameter, in storage order."""
        quant = self.for_role(spec.role)
        if quant is None:
            return {spec.name: (spec.shape, self.plain_dtype(spec.role))}
        stem = stem_of(spec.name)
        return {f"{stem}.{part}": stored for part, stored in quant.storage(spec.shape).items()}


def stem_of(name: str) -> str:
    """ "model.norm.weight" -> "model.norm"; a quantized parameter's tensors are named after it."""
    assert name.endswith(".weight"), f"a quantized parameter is called *.weight, not {name}"
    return name.removesuffix(".weight")


def _float(name: str, dtype: str) -> Scheme:
    return Scheme(name, dtype, linear=None, embedding=None, lm_head=None)


def _group(name: str, bits: int, group: int, dtype: str) -> Scheme:
    rows = GroupQuant(bits, group, "NK", dtype)
    variant = name[-1]
    if variant == "0":
        # A row of the embedding is a token, looked up one at a time, so it is never transposed.
        columns = replace(rows, layout="KN")
        return Scheme(name, dtype, linear=columns, embedding=rows, lm_head=columns)
    if variant == "2":
        return Scheme(name, dtype, linear=rows, embedding=None, lm_head=None)
    assert variant == "1", name
    return Scheme(name, dtype, linear=rows, embedding=rows, lm_head=rows)


_ALL = (
    _float("q0f32", "float32"),
    _float("q0f16", "float16"),
    _float("q0bf16", "bfloat16"),
    _group("q4f16_0", 4, 32, "float16"),
    _group("q4f16_1", 4, 32, "float16"),
    _group("q4f16_2", 4, 32, "float16"),
    _group("q4f32_1", 4, 32, "float32"),
    _group("q4bf16_0", 4, 32, "bfloat16"),
    _group("q4bf16_1", 4, 32, "bfloat16"),
    _group("q3f16_0", 3, 40, "float16"),
    _group("q3f16_1", 3, 40, "float16"),
    _group("q8f16_1", 8, 32, "float16"),  # relaxlm's own; the others are the MLC ecosystem's
)

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ALL}


def get_scheme(name: str) -> Scheme:
    """Look a preset up by name.

    Raises:
        ConfigError: there is no such preset; the message lists those there are.
    """
    try:
        return SCHEMES[name]
    except KeyError:
        raise ConfigError(
            f"quantization '{name}' is not known, expected one of: {', '.join(SCHEMES)}"
        ) from None
