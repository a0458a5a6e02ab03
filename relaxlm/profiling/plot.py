"""Draws profiles: the time of each kernel and of each layer."""

from collections.abc import Sequence
from pathlib import Path

from relaxlm.errors import RequestError
from relaxlm.profiling.profile import Part, StepProfile

# Kernels that are shorter than this share of a step are drawn as one.
_SMALL = 0.01
_KERNELS, _LAYERS, _OUTSIDE = "#3b6ea5", "#5a9e6f", "#b0b0b0"


def check_installed() -> None:
    """Refuse to draw where that isn't possible, before anything is measured.

    Raises:
        RequestError: says what to install.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RequestError(
            "drawing needs matplotlib, which is not installed: pip install 'relaxlm[plot]'"
        ) from None


def draw(steps: Sequence[StepProfile], path: Path, title: str) -> None:
    """Write a picture: per step, the kernels' times on the left and the layers' on the right."""
    check_installed()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 1 + 5 * len(steps)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(len(steps), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), step in zip(panels, steps, strict=True):
        _draw_kernels(left, step)
        _draw_layers(right, step)
    figure.savefig(path, dpi=110)


def _draw_kernels(axes, step: StepProfile) -> None:
    parts, small = [], Part("others", "")
    for part in step.kernels:
        if part.seconds >= _SMALL * step.seconds:
            parts.append(part)
        else:
            small.calls += part.calls
            small.seconds += part.seconds
            small.nbytes += part.nbytes
    if small.calls:
        parts.append(small)
    names = [f"{part.name}\n{part.on}" if part.on else part.name for part in parts]
    names.append("outside kernels")
    times = [part.seconds * 1e3 for part in parts] + [step.outside * 1e3]
    colors = [_KERNELS] * len(parts) + [_OUTSIDE]
    bars = axes.barh(range(len(names)), times, color=colors)
    notes = [_speeds(part, step) for part in parts] + [f" {step.outside / step.seconds:.1%}"]
    axes.bar_label(bars, notes, fontsize=8, padding=2)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(times) * 1.35)  # room for the notes
    axes.set_xlabel("ms per step, all calls together")
    speed = step.tokens / step.seconds
    axes.set_title(f"{step.title}: {step.seconds * 1e3:.1f} ms, {speed:.0f} tok/s", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_layers(axes, step: StepProfile) -> None:
    names = [part.name for part in step.layers]
    times = [part.seconds * 1e3 for part in step.layers]
    axes.bar(range(len(names)), times, color=_LAYERS)
    # The names of all layers of a deep model would overlap.
    every = -(-len(names) // 30)
    shown = [i for i, name in enumerate(names) if i % every == 0 or not name.isdigit()]
    axes.set_xticks(shown, [names[i] for i in shown], fontsize=8, rotation=90)
    axes.set_xlabel("layer; before: the embedding, after: the output head")
    axes.set_ylabel("ms")
    axes.set_title("time of each layer", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _speeds(part: Part, step: StepProfile) -> str:
    text = f" {part.seconds / step.seconds:.0%}, {part.nbytes / part.seconds / 1e9:.1f} GB/s"
    if part.operations:
        text += f", {part.operations / part.seconds / 1e9:.0f} GOPS"
    return text
