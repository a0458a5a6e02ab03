"""The tables that `compare.py` prints, as Markdown."""

import os
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OURS = "relaxlm"


def markdown(
    results: Mapping[str, Mapping[str, Any]], cases: Mapping[str, tuple[str, int]], threads: int
) -> str:
    """All tables.

    Args:
        results: model -> the fields of `compare.Found`.
        cases: key -> its name, and the tokens that one value's seconds are for.
    """
    read = [v for found in results.values() for values in found["read"].values() for v in values]
    lines = [f"{processor()}, {threads} threads"]
    if read:
        low, middle, high = (
            f"{v / 1e9:.1f}" for v in (min(read), statistics.median(read), max(read))
        )
        lines[0] += f"; read bandwidth {middle} GB/s in the median, {low} to {high} during the run"
    lines[0] += "."
    for model, found in results.items():
        lines += ["", f"**{model}**", "", *_table(found, cases)]
        lines += ["", *_notes(found)]
    return "\n".join(lines).rstrip() + "\n"


def _table(found: Mapping[str, Any], cases: Mapping[str, tuple[str, int]]) -> list[str]:
    names = list(found["about"])
    peers = [name for name in names if name != OURS]
    ratio = OURS in names and bool(peers)
    rows = [["", *names, *(["relaxlm / best peer"] if ratio else [])]]
    for key, seconds in found["seconds"].items():
        title, tokens = cases[key]
        measured = {name: values for name, values in seconds.items() if values}
        speeds = {name: tokens / statistics.median(values) for name, values in measured.items()}
        row = [f"{title}, tok/s"]
        for name in names:
            if name not in speeds:
                row.append("-")
                continue
            share = _share_of_read(found, key, name, 1 / speeds[name]) if tokens == 1 else None
            row.append(f"{speeds[name]:.{1 if speeds[name] < 100 else 0}f}" + _percent(share))
        rows.append(row + _ratio(speeds, peers, ratio, max))
    for field, title, scale, digits in (
        ("load", "load, s", 1, 2),
        ("first_token", "start to first token of a prompt of 512, s", 1, 2),
        ("peak_bytes", "peak memory then, MB", 1e6, 0),
    ):
        values = {name: start[field] / scale for name, start in found["start"].items()}
        if values:
            row = [title, *(f"{values[n]:.{digits}f}" if n in values else "-" for n in names)]
            rows.append(row + _ratio(values, peers, ratio, min))
    header, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return [header, "|" + "---|" * len(rows[0]), *body]


def _ratio(values: Mapping[str, float], peers: list[str], wanted: bool, best: Any) -> list[str]:
    if not wanted:
        return []
    others = [values[name] for name in peers if name in values]
    if OURS not in values or not others:
        return ["-"]
    return [f"{values[OURS] / best(others):.2f}"]


def _share_of_read(found: Mapping[str, Any], key: str, name: str, seconds: float) -> float | None:
    """What a step reaches of the read loop's speed: weights and cache, each read once."""
    about, read = found["about"][name], found["read"].get(key)
    if not read or "weight_bytes" not in about:
        return None
    context = {"decode": 128, "decode-4096": 4096}[key]
    nbytes = about["weight_bytes"] + context * about["kv_bytes_per_token"]
    return nbytes / seconds / statistics.median(read)


def _percent(share: float | None) -> str:
    return "" if share is None else f" ({share:.0%})"


def _notes(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"- {name}: {about['version']}, {about['format']}, "
        f"{about['weight_bytes'] / 1e6:.0f} MB of weights, "
        f"{about['kv_bytes_per_token'] / 1e3:.1f} kB of cache per token"
        for name, about in found["about"].items()
    ]
    if found["compile_seconds"]:
        lines.append(f"- `relaxlm compile` takes {found['compile_seconds']:.0f} s, once.")
    lines += [f"- {name}: {error}" for name, errors in found["errors"].items() for error in errors]
    return lines


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} logical processors"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} logical processors"
