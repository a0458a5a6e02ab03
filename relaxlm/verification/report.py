"""A verification as text of at most 80 columns."""

from collections.abc import Sequence

from relaxlm.verification.limits import Limits
from relaxlm.verification.metrics import Distance, LogitDistance, VectorDistance
from relaxlm.verification.results import (
    REFERENCES,
    Comparison,
    Verification,
    cosine_text,
    layer_name,
)

_PROMPT = 14
_MOST_WEIGHTS = 10


def report(verification: Verification) -> list[str]:
    """The lines of a report: weights, then each reference with its prompts, then the layers."""
    lines = _weights(verification)
    for comparison in verification.comparisons:
        lines += ["", *_prompts(comparison)]
    return [*lines, "", *_layers(verification.comparisons)]


def _weights(verification: Verification) -> list[str]:
    made = f"what {verification.quantization} makes of the checkpoint"
    wrong = verification.wrong_weights
    rounding = len(verification.weights) - len(wrong)
    lines = []
    if rounding:
        lines.append(f"weights: {rounding} differ by rounding from {made}")
    if wrong:
        lines.append(f"weights: {len(wrong)} are not {made}")
        lines.append("  share of values  largest difference")
        for difference in wrong[:_MOST_WEIGHTS]:
            numbers = f"{difference.share:>17.2%}{difference.max_error:>20.1e}"
            lines += [numbers, f"    {difference.name}"]
        if len(wrong) > _MOST_WEIGHTS:
            lines.append(f"    and {len(wrong) - _MOST_WEIGHTS} more")
    return lines or [f"weights: exactly {made}"]


def _prompts(comparison: Comparison) -> list[str]:
    total, counts = comparison.total, [prompt.tokens for prompt in comparison.prompts]
    head: tuple[str, ...]
    head = ("tokens", "max err", "mean err", "KL mean", "KL max", "top-1", "NLL", "NLL lib")
    numbers = "logits"
    if isinstance(total, VectorDistance):
        head, numbers = ("tokens", "max err", "mean err", "cosine"), "states"
    rows = [
        _row(_shortened(prompt.prompt), prompt.tokens, prompt.distance)
        for prompt in comparison.prompts
    ]
    verdict = "exceeded" if comparison.exceeded() else "kept"
    lines = [
        f"against {REFERENCES[comparison.reference]}:",
        _aligned("", head),
        *rows,
        _row("all", sum(counts), total),
        f"largest error: {total.relative_error:.1e} standard deviations of the {numbers} "
        f"({total.spread:.3g})",
    ]
    if comparison.limits.rerouted:
        lines.append(
            f"tokens beyond: {comparison.rerouted} of {total.rows}, allowed "
            f"{comparison.limits.rerouted:.0%} (rounding may choose other experts)"
        )
    return [*lines, f"limits: {_limits(comparison.limits)}: {verdict}"]


def _row(name: str, tokens: int, distance: Distance) -> str:
    if isinstance(distance, VectorDistance):
        largest, mean = f"{distance.max_error:.1e}", f"{distance.mean_error:.1e}"
        return _aligned(name, (str(tokens), largest, mean, cosine_text(distance.cosine)))
    assert isinstance(distance, LogitDistance)
    errors = (distance.max_error, distance.mean_error, distance.kl_mean, distance.kl_max)
    likelihoods = (distance.nll_reference, distance.nll_library)
    cells = (
        str(tokens),
        *(f"{error:.1e}" for error in errors),
        f"{distance.top1:.1%}",
        *(f"{nll:.3f}" for nll in likelihoods),
    )
    return _aligned(name, cells)


def _aligned(name: str, cells: Sequence[str]) -> str:
    widths = (6, 8, 8, 12) if len(cells) == 4 else (6, 8, 8, 8, 8, 7, 6, 7)
    columns = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{name:{_PROMPT}}" + " ".join(columns)


def _shortened(prompt: str) -> str:
    """A prompt on one line, in plain characters, so that columns stay in line."""
    line = " ".join(prompt.split()).encode("ascii", "replace").decode()
    return line if len(line) < _PROMPT else line[: _PROMPT - 4] + "..."


def _limits(limits: Limits) -> str:
    texts = []
    if limits.max_error is not None:
        texts.append(f"largest error {limits.max_error:.1e} deviations")
    if limits.kl is not None:
        texts.append(f"KL mean {limits.kl:.1e}")
    if limits.top1 is not None:
        texts.append(f"top-1 {limits.top1:.1%}")
    if limits.cosine is not None:
        texts.append(f"cosine {cosine_text(limits.cosine)}")
    return ", ".join(texts)


def _layers(comparisons: Sequence[Comparison]) -> list[str]:
    """One line for the vectors after the embedding and after each layer, for all references."""
    judged = next((c for c in comparisons if c.expected_layers is not None), None)
    expected = judged.expected_layers if judged else None
    head = [f"{'after':12}", *(f"{'vs ' + c.reference:>16}" for c in comparisons)]
    if expected:
        head.append(f"{'expected below':>16}")
    lines = ["relative error of a token's vector (the worst token):", "".join(head)]
    for index in range(len(comparisons[0].layers)):
        cells = [f"{layer_name(index):12}", *(f"{c.layers[index]:>16.1e}" for c in comparisons)]
        if expected:
            cells.append(f"{expected[index]:>16.1e}")
        if judged and judged.first_diverging == index:
            cells.append("  <- first")
        lines.append("".join(cells))
    return lines
