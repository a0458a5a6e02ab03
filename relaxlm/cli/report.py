"""What several commands print: progress of a compilation, and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from relaxlm.files import format_bytes
from relaxlm.runtime.metadata import LibraryMetadata

if TYPE_CHECKING:
    from relaxlm.compiler.cuda_report import KernelReport


@contextmanager
def compile_progress(what: str) -> Iterator[Callable[[str, float], None]]:
    """A progress bar over the stages of a compilation; nothing where output is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda stage, share: bar.update(task, completed=share, description=f"{what}: {stage}")


def cache_name(info: LibraryMetadata) -> str:
    """What a library caches keys and values in, in words."""
    return f"{info.kv_cache.dtype} cache" if info.kv_cache.tensors else "no KV cache"


def memory_lines(info: LibraryMetadata, context: int | None = None) -> list[str]:
    """Parameters, KV cache, states and temporary buffers, one line each, and their sum.

    Args:
        context: tokens, where less than the library's context is used.
    """
    limits, cache = info.limits, info.kv_cache
    tokens = limits.sliding_window_size or context or limits.context_window_size
    kv_cache, state = tokens * cache.bytes_per_token, info.state.bytes_per_sequence
    temporary = info.step_bytes
    total = info.memory.params + kv_cache + state + temporary
    window = "sliding window" if limits.sliding_window_size else "context"
    lines = [f"  parameters        {format_bytes(info.memory.params):>9}  {info.quantization}"]
    if cache.tensors:
        lines.append(
            f"  KV cache          {format_bytes(kv_cache):>9}  {cache.dtype}, "
            f"{format_bytes(cache.bytes_per_token)} per token, {tokens} tokens of {window}"
        )
    if state:
        lines.append(
            f"  recurrent states  {format_bytes(state):>9}  of one sequence, however long it is"
        )
    return [
        *lines,
        f"  temporary buffers {format_bytes(temporary):>9}  "
        f"steps of up to {limits.prefill_chunk_size} tokens",
        f"  total             {format_bytes(total):>9}",
    ]


def print_memory(info: LibraryMetadata) -> None:
    typer.echo("memory:")
    for line in memory_lines(info):
        typer.echo(line)


def print_stages(seconds: Mapping[str, float]) -> None:
    """What `--verbose` says of any compilation."""
    stages = (f"{stage} {value:.1f} s" for stage, value in seconds.items())
    typer.echo("compiled: " + ", ".join(stages))


def print_kernels(reports: list[KernelReport]) -> None:
    """What `--verbose` says of a CUDA library's kernels; those that spill first."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    from relaxlm.compiler.cuda_report import worst_first

    reports = worst_first(reports)
    spilling = {report.kernel for report in reports if report.spills}
    archs = sorted({report.arch for report in reports}, key=lambda arch: (len(arch), arch))
    typer.echo(
        f"kernels: {len({report.kernel for report in reports})} for {', '.join(archs)}; "
        f"{len(spilling) or 'none'} {'spills' if len(spilling) == 1 else 'spill'}; at most "
        f"{max(report.registers for report in reports)} registers and "
        f"{format_bytes(max(report.shared for report in reports))} of shared memory"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("kernel", no_wrap=True)
    table.add_column("arch", no_wrap=True)
    for name in ("registers", "shared B", "spill stores B", "loads B", "stack B"):
        table.add_column(name, justify="right")
    last = ""
    for report in reports:
        numbers = (
            *(report.registers, report.shared),
            *(report.spill_stores, report.spill_loads, report.stack),
        )
        name = report.kernel if report.kernel != last else ""
        table.add_row(name, report.arch, *map(str, numbers), style="red" if report.spills else None)
        last = report.kernel
    # All of it, where a file or a program reads it.
    console = Console(highlight=False)
    wanted = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.width = max(wanted, 1) if not console.is_terminal else console.width
    console.print(table)
