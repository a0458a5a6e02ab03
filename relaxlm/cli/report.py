"""What several commands print: progress of a compilation, and memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from relaxlm.files import format_bytes
from relaxlm.runtime.metadata import LibraryMetadata


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
