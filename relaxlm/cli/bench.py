"""`relaxlm bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relaxlm.cli.arguments import CompileOverrides, Device, ModelFolder, ModelLib, Opt, Threads

if TYPE_CHECKING:
    from relaxlm.profiling.benchmark import Benchmark


def bench(
    folder: ModelFolder,
    model_lib: ModelLib = None,
    device: Device = "auto",
    overrides: CompileOverrides = None,
    opt: Opt = None,
    prompt: Annotated[
        str, typer.Option("--prompt", help="Lengths of prompts, in tokens: 512,2048.")
    ] = "512",
    context: Annotated[
        str, typer.Option("--context", help="Tokens in the cache before decoding: 128,4096.")
    ] = "128",
    batch: Annotated[
        str,
        typer.Option(
            "--batch",
            help="Sequences that are decoded together: 1,8. More than one "
            "with the first --context only.",
        ),
    ] = "1,8",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of which the median counts.")] = 5,
    threads: Threads = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="File to write all numbers to.")
    ] = None,
) -> None:
    """Measure a model's speed on this machine: prompts, decoding, several sequences at once.

    Memory that decoding reads is compared with a loop that only reads, measured in turns with it.
    """
    import os
    from json import dumps

    from rich.console import Console

    from relaxlm.cli.report import cache_name, compile_progress
    from relaxlm.profiling.benchmark import STEPS, run
    from relaxlm.profiling.session import Session
    from relaxlm.runtime.threads import VARIABLE, set_threads

    set_threads(threads)
    prompts, contexts = _numbers("--prompt", prompt), _numbers("--context", context)
    batches = _numbers("--batch", batch)
    decodes = [(tokens, 1) for tokens in contexts if 1 in batches]
    decodes += [(contexts[0], count) for count in batches if count > 1]
    room = [(1, tokens) for tokens in prompts]
    room += [(count, tokens + STEPS + 1) for tokens, count in decodes]
    with compile_progress(f"load {folder.name}") as progress:
        session = Session.load(folder, model_lib, device, overrides, room, progress, opt)
    info = session.executor.metadata
    typer.echo(
        f"{folder}: {info.model_type}, {info.quantization}, {cache_name(info)}; "
        f"{session.executor.library.device}, {os.environ[VARIABLE]} threads"
    )
    # Nothing is shown where output is no terminal.
    with Console(stderr=True).status("") as status:
        found = run(session, prompts, decodes, rounds, status.update)
    for line in _table(found):
        typer.echo(line)
    if json is not None:
        about = {"folder": str(folder), "library": str(session.executor.library.path)}
        content = {**about, "metadata": info.model_dump(), **found.as_json()}
        json.write_text(dumps(content, indent=2) + "\n", encoding="utf-8")


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{option} {text!r}: expected numbers above 0, such as 1,8")
    return numbers


def _table(found: "Benchmark") -> list[str]:
    from relaxlm.profiling.columns import aligned

    rows = [["", "tok/s", "ms", "spread", "GOPS", "GB/s", "of read"]]
    for row in found.rows:
        title = f"prompt of {row.tokens}"
        if row.kind == "decode":
            title = f"decode after {row.tokens}"
            title += f", {row.batch} sequences" if row.batch > 1 else ""
        speed, share = row.bytes_per_second, row.share_of_read
        rows.append(
            [
                title,
                f"{row.tokens_per_second:.1f}",
                f"{row.seconds * 1e3:.2f}",
                f"{row.spread:.0%}",
                f"{row.operations_per_second / 1e9:.0f}",
                "" if speed is None else f"{speed / 1e9:.1f}",
                "" if share is None else f"{share:.0%}",
            ]
        )
    lines = aligned(rows)
    if found.read_bytes_per_second is not None:
        speed = found.read_bytes_per_second / 1e9
        lines.append(f"reading the weights and nothing else, meanwhile: {speed:.1f} GB/s")
    return lines
