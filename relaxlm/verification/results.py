"""What a verification found, and its verdict."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from relaxlm.errors import VerificationError
from relaxlm.verification.kept_weights import WeightDifference
from relaxlm.verification.limits import Limits
from relaxlm.verification.metrics import LogitDistance, VectorDistance

# The original checkpoint, or what the library stores of it.
ReferenceKind = Literal["float", "dequantized"]
REFERENCES = {
    "float": "the checkpoint in float32",
    "dequantized": "the values that the library stores",
}


@dataclass(frozen=True)
class PromptResult:
    """One text. `layers`: relative error of the worst token's vector, after the embedding first."""

    prompt: str
    tokens: int
    distance: LogitDistance | VectorDistance
    layers: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """The library against one reference, on every prompt."""

    reference: ReferenceKind
    prompts: tuple[PromptResult, ...]
    limits: Limits

    @property
    def total(self) -> LogitDistance | VectorDistance:
        first, *others = (prompt.distance for prompt in self.prompts)
        return sum(others, first)

    @property
    def rerouted(self) -> int:
        """The tokens beyond the largest error, where a router chooses experts."""
        if not self.limits.rerouted or self.limits.max_error is None:
            return 0
        return self.total.rows_beyond(self.limits.max_error)

    @property
    def layers(self) -> list[float]:
        """The worst prompt's error, after the embedding and after each layer."""
        return [max(errors) for errors in zip(*(p.layers for p in self.prompts), strict=True)]

    @property
    def expected_layers(self) -> list[float] | None:
        return self.limits.expected_layers(len(self.layers) - 1)

    @property
    def first_diverging(self) -> int | None:
        """Index into `layers` of the first error that is larger than expected."""
        expected = self.expected_layers
        if expected is None:
            return None
        pairs = enumerate(zip(self.layers, expected, strict=True))
        return next((index for index, (error, most) in pairs if not error <= most), None)

    def exceeded(self) -> list[str]:
        """The limits that do not hold, in words."""
        total, limits, faults = self.total, self.limits, []
        error = total.relative_error_but(limits.rerouted)
        if limits.max_error is not None and not error <= limits.max_error:
            what, plural = ("a logit", "logits")
            if isinstance(total, VectorDistance):
                what, plural = ("a state", "states")
            if limits.rerouted:
                what += f" (without {limits.rerouted:.0%} of the tokens)".replace("%", " %")
            faults.append(
                f"the largest error of {what} is {error:.2g} standard deviations "
                f"of the {plural}, allowed are {limits.max_error:.2g}"
            )
        if isinstance(total, VectorDistance):
            if limits.cosine is not None and not total.cosine >= limits.cosine:
                faults.append(
                    f"the smallest cosine is {cosine_text(total.cosine)}, required are "
                    f"{cosine_text(limits.cosine)}"
                )
            return faults
        if limits.kl is not None and not total.kl_mean <= limits.kl:
            faults.append(f"the mean KL is {total.kl_mean:.2g} nats, allowed are {limits.kl:.2g}")
        if limits.top1 is not None and not total.top1 >= limits.top1:
            faults.append(
                f"top-1 agreement is {total.top1:.1%}, required are {limits.top1:.1%}".replace(
                    "%", " %"
                )
            )
        return faults

    def where(self) -> str:
        """Where the error begins, in words; "" where layers are not judged."""
        expected, first = self.expected_layers, self.first_diverging
        if expected is None:
            return ""
        if first is None:
            last = "the final norm or the head"
            if isinstance(self.total, VectorDistance):
                last = "the final norm"
            return f"Every layer is as exact as expected, so the error begins in {last}."
        return (
            f"First diverging: {layer_name(first)} (relative error {self.layers[first]:.1e}, "
            f"expected at most {expected[first]:.1e})."
        )


@dataclass(frozen=True)
class Verification:
    """The findings of `verify`.

    `weights`: parameters of the folder that are not what the preset makes of the checkpoint.
    `settings`: fields of the configuration in which library and checkpoint differ, in words.
    """

    source: Path
    library: Path
    folder: Path
    quantization: str
    device: str
    kv_cache: str
    comparisons: tuple[Comparison, ...]
    weights: tuple[WeightDifference, ...]
    settings: tuple[str, ...]

    @property
    def wrong_weights(self) -> list[WeightDifference]:
        """Those of `weights` whose difference is more than rounding."""
        return [difference for difference in self.weights if not difference.rounding]

    def failure(self) -> str:
        """What is wrong, in one paragraph; "" if nothing is."""
        parts = [
            f"Against {REFERENCES[comparison.reference]} {fault}."
            for comparison in self.comparisons
            for fault in comparison.exceeded()
        ]
        judged = [comparison.where() for comparison in self.comparisons if comparison.exceeded()]
        parts += [text for text in judged if text][-1:]
        wrong = [difference.name for difference in self.wrong_weights]
        if wrong:
            parts.append(
                f"{len(wrong)} of the parameters in {self.folder} "
                f"{'is' if len(wrong) == 1 else 'are'} not what {self.quantization} makes of "
                f"{self.source}: {', '.join(wrong[:3])}{' and more' if len(wrong) > 3 else ''}."
            )
        if [bool(comparison.exceeded()) for comparison in self.comparisons] == [True, False]:
            parts.append(
                f"It computes exactly what it stores: {self.quantization} with a {self.kv_cache} "
                "cache costs this model as much. Try a preset with more bits."
            )
        if parts and self.settings:
            parts.append(f"Library and checkpoint differ in {'; '.join(self.settings)}.")
        return " ".join(parts)

    def check(self) -> None:
        """
        Raises:
            VerificationError: a limit does not hold, or weights are not the checkpoint's.
        """
        if failure := self.failure():
            raise VerificationError(f"{self.library} does not pass. {failure}")

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file. Errors that are not finite are null."""
        return _finite(
            {
                "source": str(self.source),
                "library": str(self.library),
                "folder": str(self.folder),
                "quantization": self.quantization,
                "device": self.device,
                "kv_cache_dtype": self.kv_cache,
                "passed": not self.failure(),
                "failure": self.failure() or None,
                "weights": [asdict(difference) for difference in self.weights],
                "settings": list(self.settings),
                "comparisons": [_comparison_json(comparison) for comparison in self.comparisons],
            }
        )


def cosine_text(value: float) -> str:
    """With as many digits as tell it from 1."""
    return f"{value:.4f}" if value < 0.999 else f"1 - {1 - value:.1e}"


def layer_name(index: int) -> str:
    """What comes before the vectors at an index of `Comparison.layers`."""
    return "embedding" if index == 0 else f"layer {index - 1}"


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    first = comparison.first_diverging
    layers = comparison.layers
    expected = comparison.expected_layers
    return {
        "reference": comparison.reference,
        "limits": asdict(comparison.limits),
        "exceeded": comparison.exceeded(),
        "total": _distance_json(comparison.total),
        "rerouted": comparison.rerouted,
        "prompts": [
            {"prompt": p.prompt, "tokens": p.tokens, **_distance_json(p.distance)}
            for p in comparison.prompts
        ],
        "first_diverging": None if first is None else layer_name(first),
        "layers": [
            {
                "after": layer_name(index),
                "relative_error": error,
                "expected": expected and expected[index],
            }
            for index, error in enumerate(layers)
        ],
    }


def _distance_json(distance: LogitDistance | VectorDistance) -> dict[str, float]:
    names: tuple[str, ...] = ("rows", "max_error", "mean_error", "spread", "relative_error")
    if isinstance(distance, VectorDistance):
        names += ("vectors", "cosine")
    else:
        names += ("kl_mean", "kl_max", "top1", "nll_reference", "nll_library")
    return {name: getattr(distance, name) for name in names}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
