"""How far a library may be from a reference, by what its preset, cache and device round.

Two questions, two sets of limits.

`exact_limits`: does the library compute what its own values say? The reference has the weights
and the cache that the library stores, so only the order of sums and the rounding of activations are
left. Measured on random Llamas and a Qwen3 of 2 to 24 layers (hidden 64 to 256, 200 tokens) and a
trained Llama of 260 thousand weights; largest error of a logit in standard deviations of the
logits, mean KL, and relative error of a token's vector after the first and the last layer:

    activations  cache      largest error  KL     first layer  last layer
    float32      float32    1.1e-05        4e-12  2e-06        3e-06
    float32      float16    4.0e-03        5e-07  6e-04        3e-03
    float32      bfloat16   7.8e-03        2e-06  2e-03        6e-03
    float32      fp8        8.0e-03        7e-07  6e-06        2e-03
    float16      -          2.0e-02        3e-05  3e-03        8e-03
    bfloat16     -          1.7e-01        5e-04  3e-02        5e-02
    rounded      float32    1.2e-01        4e-04  1e-02        3e-02

A cache leaves something because a key that differs in its last bit may be rounded to another
neighbour. The lines without a cache are torch's in that dtype, not a GPU's; "rounded" is
act_quant=1. Limits are about ten times as large, for models whose attention amplifies errors more;
one with doubled weights, chosen to be chaotic, came to 2e-4 in the first line and 3e-1 in the
fourth. A wrong norm, scale or position gives errors from 1e-1 up.

Where a router chooses experts, a number that is rounded can send a token to another one, and its
logits are then another's: of a random Qwen3-MoE with rounded activations, most tokens came to 4e-2
and a few to 3e-1. So a share of the tokens may be beyond the largest error (`REROUTED`), unless
nothing is rounded.

Vectors of texts, 1 - cosine of a random BERT and a Qwen3 of 2 layers: 3e-13 with everything in
float32, 5e-4 with rounded activations and a float16 cache.

`damage_limits`: what does rounding cost against the checkpoint in float32? That depends on the
model, and small ones suffer most. The trained model above on the default prompts, most of them
unlike anything it was trained on:

    preset       KL     top-1      preset            KL     top-1
    q0f16        3e-06  100.0 %    q4f16_1           0.30   63.3 %
    q0bf16       3e-04   97.7 %    q3f16_1           1.6    28.6 %
    q8f16_1      9e-04   96.6 %    q0f32, fp8 cache  0.019  91.4 %

On text like its training data, q4f16_1 came to 0.13 and 84 %. These limits are for mistakes, and
for presets that a model does not bear; whoever knows the model can ask for more.
"""

from dataclasses import dataclass, replace

from relaxlm.quantization.schemes import Scheme


@dataclass(frozen=True)
class Limits:
    """What a comparison may come to; None: it is not judged by this.

    `max_error` is in standard deviations of the logits, `kl` a mean in nats per token, `top1` a
    share of the tokens. `layer` is the error that is expected at most of a vector after the
    embedding; with every layer as much is added. Layers are not judged, they only tell where an
    error begins. `cosine` is the smallest between a text's vector and the reference's. `rerouted`
    is the share of the tokens that `max_error` and `layer` do not hold for: of those with the
    largest errors, which other experts may have seen.
    """

    max_error: float | None
    kl: float | None
    top1: float | None
    layer: float | None = None
    cosine: float | None = None
    rerouted: float = 0.0

    def expected_layers(self, count: int) -> list[float] | None:
        """The relative errors expected at most after the embedding and after each of the layers."""
        if self.layer is None:
            return None
        return [self.layer * (index + 1) for index in range(count + 1)]

    def changed(
        self,
        max_error: float | None = None,
        kl: float | None = None,
        top1: float | None = None,
        cosine: float | None = None,
    ) -> "Limits":
        """With the values that are given in place of these."""
        given = {"max_error": max_error, "kl": kl, "top1": top1, "cosine": cosine}
        return replace(self, **{key: value for key, value in given.items() if value is not None})


# Activations and cache: largest error, KL, layer.
_ACTIVATIONS = {
    "float32": (1e-3, 1e-6, 1e-5),
    "float16": (2e-1, 1e-3, 1e-2),
    "bfloat16": (1.0, 2e-2, 5e-2),
    "rounded": (1.0, 2e-2, 5e-2),
}
_CACHE = {
    "float32": (0.0, 0.0, 0.0),
    "float16": (3e-2, 1e-4, 3e-3),
    "bfloat16": (6e-2, 1e-4, 5e-3),
    "float8_e4m3": (1e-1, 1e-2, 1e-2),
}

# Bits of a linear weight, or the dtype of weights, activations or cache: KL, top-1 agreement.
_DAMAGE: dict[str | int, tuple[float, float]] = {
    "float32": (0.0, 1.0),
    "float16": (1e-4, 0.95),
    "bfloat16": (2e-3, 0.9),
    "rounded": (1e-2, 0.9),
    8: (1e-2, 0.9),
    4: (1.0, 0.5),
    3: (3.0, 0.2),
    "float8_e4m3": (0.1, 0.8),
}

# 1 - cosine of vectors, exact: by activations, and by cache.
_FAR = {"float32": 1e-9, "float16": 1e-3, "bfloat16": 1e-2, "rounded": 1e-2, "float8_e4m3": 1e-2}
# Damage: bits of a linear weight, or the dtype of weights, activations or cache: cosine.
_COSINES: dict[str | int, float] = {
    "float32": 1 - 1e-6,
    "float16": 1 - 1e-4,
    "bfloat16": 1 - 1e-3,
    "rounded": 1 - 1e-2,
    8: 1 - 1e-2,
    4: 0.8,
    3: 0.5,
    "float8_e4m3": 0.95,
}
# A router chooses by numbers that differ little: one that was rounded may choose another expert.
REROUTED = 0.1


def exact_limits(activations: str, cache: str, routed: bool = False) -> Limits:
    """Against a reference with the values that the library stores.

    Args:
        activations: the dtype in which the library computes, or to which matmuls round.
        cache: the name of its cache format.
        routed: whether a router chooses experts.
    """
    pairs = zip(_ACTIVATIONS[activations], _CACHE[cache], strict=True)
    max_error, kl, layer = (max(pair) for pair in pairs)
    rounds = (activations, cache) != ("float32", "float32")
    return Limits(max_error, kl, None, layer, rerouted=REROUTED if routed and rounds else 0.0)


def exact_vector_limits(activations: str, cache: str, routed: bool = False) -> Limits:
    """The same for states and vectors in place of logits."""
    limits = exact_limits(activations, cache, routed)
    return replace(limits, kl=None, cosine=1 - max(_FAR[activations], _FAR[cache]))


def damage_limits(scheme: Scheme, activations: str, cache: str) -> Limits:
    """Against the checkpoint in float32."""
    weights: str | int = scheme.linear.bits if scheme.linear else scheme.dtype
    parts = [_DAMAGE[weights], _DAMAGE[activations], _DAMAGE[cache]]
    return Limits(None, sum(kl for kl, _ in parts), min(top1 for _, top1 in parts))


def damage_vector_limits(scheme: Scheme, activations: str, cache: str) -> Limits:
    """The same for vectors of texts."""
    weights: str | int = scheme.linear.bits if scheme.linear else scheme.dtype
    parts = (weights, activations, cache)
    return Limits(None, None, None, cosine=min(_COSINES[part] for part in parts))
