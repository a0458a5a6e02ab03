"""Draws what a load on a server gave: one load in detail, or several side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from relaxlm.profiling.plot import check_installed
from relaxlm.profiling.serving_client import Exchange
from relaxlm.profiling.serving_report import Measured, Spread, gaps

_BINS = 40
# Percentiles, from dark to light.
_COLORS = {"p50": "#24476b", "p90": "#3b6ea5", "p99": "#9dbbdc"}
_LINES = {"p50": "-", "p90": "--", "p99": ":"}
_OUT, _IN, _WAIT = "#5a9e6f", "#b8741a", "#c9c9c9"


def draw(loads: Sequence[tuple[Measured, Sequence[Exchange]]], path: Path, title: str) -> None:
    """Write a picture.

    Raises:
        RequestError: matplotlib is not installed.
    """
    check_installed()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(2, 2)
    if len(loads) == 1:
        _draw_one(axes, *loads[0])
    else:
        _draw_several(axes, [measured for measured, _ in loads])
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _draw_one(axes, measured: Measured, made: Sequence[Exchange]) -> None:
    good = [one for one in made if one.pieces and not one.error]
    start = min(one.start for one in made)
    waits = [(one.pieces[0] - one.start) * 1e3 for one in good]
    between = [gap * 1e3 for one in good for gap in gaps(one)]
    _draw_histogram(axes[0, 0], waits, measured.first, "time to first token")
    _draw_histogram(axes[0, 1], between, measured.gaps, "time between pieces of text")
    _draw_throughput(axes[1, 0], good, start, measured.seconds)
    _draw_requests(axes[1, 1], good, start)


def _draw_histogram(axes, values: list[float], spread: Spread | None, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("ms")
    if spread is None:
        return
    # A few long waits would leave no room for the rest.
    edges = np.linspace(0, max(spread.p99 * 1.25e3, 1e-3), _BINS + 1)
    axes.hist(np.clip(values, 0, edges[-1]), edges, color=_COLORS["p90"])
    for name, style in _LINES.items():
        value = getattr(spread, name) * 1e3
        label = f"{name}: {value:.1f}"
        axes.axvline(value, color="#222222", linewidth=1, linestyle=style, label=label)
    axes.legend(fontsize=8, frameon=False)
    axes.set_ylabel("how many")


def _draw_throughput(axes, good: list[Exchange], start: float, seconds: float) -> None:
    times = [time - start for one in good for time in one.pieces]
    weights = [one.output_tokens / len(one.pieces) for one in good for _ in one.pieces]
    counts, edges = np.histogram(times, _BINS, (0, seconds), weights=weights)
    axes.stairs(counts / (edges[1] - edges[0]), edges, fill=True, color=_OUT)
    axes.set_title("generated tokens per second", fontsize=10)
    axes.set_xlabel("s")


def _draw_requests(axes, good: list[Exchange], start: float) -> None:
    rows = range(len(good))
    begin = [one.start - start for one in good]
    waits = [one.pieces[0] - one.start for one in good]
    rest = [one.end - one.pieces[0] for one in good]
    axes.barh(rows, waits, left=begin, height=0.8, color=_WAIT, label="until the first token")
    ends = [one.pieces[0] - start for one in good]
    axes.barh(rows, rest, left=ends, height=0.8, color=_OUT, label="reply")
    axes.invert_yaxis()
    axes.set_title("each request", fontsize=10)
    axes.set_xlabel("s")
    axes.legend(fontsize=8, frameon=False)


def _draw_several(axes, loads: Sequence[Measured]) -> None:
    names = [one.name for one in loads]
    ticks = range(len(loads))
    speeds = axes[0, 0]
    speeds.plot(ticks, [m.output_tokens / m.seconds for m in loads], "o-", color=_OUT, label="out")
    speeds.plot(ticks, [m.prompt_tokens / m.seconds for m in loads], "o-", color=_IN, label="in")
    speeds.set_title("tokens per second, of all requests together", fontsize=10)
    panels = (
        (axes[0, 1], "time to first token, ms", [m.first for m in loads]),
        (axes[1, 0], "time between pieces of text, ms", [m.gaps for m in loads]),
        (axes[1, 1], "whole reply, ms", [m.whole for m in loads]),
    )
    for panel, title, spreads in panels:
        panel.set_title(title, fontsize=10)
        for name, color in _COLORS.items():
            values = [np.nan if s is None else getattr(s, name) * 1e3 for s in spreads]
            panel.plot(ticks, values, "o-", color=color, label=name)
    for panel in axes.flat:
        panel.set_xticks(ticks, names, fontsize=8)
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color="#e5e5e5")
        panel.legend(fontsize=8, frameon=False)
