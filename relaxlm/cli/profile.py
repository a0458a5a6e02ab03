"""`relaxlm profile`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relaxlm.cli.arguments import CompileOverrides, ModelFolder, ModelLib, Opt, Threads

if TYPE_CHECKING:
    from relaxlm.profiling.profile import Part, StepProfile


def profile(
    folder: ModelFolder,
    model_lib: ModelLib = None,
    overrides: CompileOverrides = None,
    opt: Opt = None,
    prompt: Annotated[
        int, typer.Option("--prompt", min=1, help="Tokens of the prompt that is profiled.")
    ] = 512,
    context: Annotated[
        int, typer.Option("--context", min=1, help="Tokens in the cache before decoding.")
    ] = 128,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Sequences that are decoded together.")
    ] = 1,
    layers: Annotated[bool, typer.Option("--layers", help="Print a line per layer, too.")] = False,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Of which the median counts.")
    ] = 10,
    threads: Threads = None,
    png: Annotated[
        Path | None, typer.Option("--png", help="Picture to draw; needs relaxlm[plot].")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="File to write all numbers to.")
    ] = None,
) -> None:
    """Show where the time goes on a CPU: per kernel and layer, for a prompt and for decoding.

    GB/s counts what a kernel has to read and write once, GOPS the multiplications and additions of
    matrices and attention.
    """
    from json import dumps

    from rich.console import Console

    from relaxlm.cli.report import compile_progress
    from relaxlm.profiling.profile import ROOM, profile_decode, profile_prefill
    from relaxlm.profiling.session import Session
    from relaxlm.runtime.threads import set_threads

    if png is not None:
        from relaxlm.profiling.plot import check_installed

        check_installed()
    set_threads(threads)
    room = [(1, prompt), (batch, context + 2 * rounds + ROOM)]
    with compile_progress(f"load {folder.name}") as progress:
        session = Session.load(folder, model_lib, "cpu", overrides, room, progress, opt)
    # Nothing is shown where output is no terminal.
    with Console(stderr=True).status("profile"):
        steps = [
            profile_prefill(session, prompt, rounds),
            profile_decode(session, context, batch, rounds),
        ]
    for i, step in enumerate(steps):
        for line in _table(step, layers):
            typer.echo(line)
        if i + 1 < len(steps):
            typer.echo()
    if json is not None:
        content = {"folder": str(folder), "steps": [step.as_json() for step in steps]}
        json.write_text(dumps(content, indent=2) + "\n", encoding="utf-8")
    if png is not None:
        from relaxlm.profiling.plot import draw

        draw(steps, png, str(folder))
        typer.echo(f"\nwrote {png}")


def _table(step: "StepProfile", layers: bool) -> list[str]:
    from relaxlm.profiling.columns import aligned

    speed = step.tokens / step.seconds
    lines = [f"{step.title}: {step.seconds * 1e3:.2f} ms, {speed:.1f} tok/s"]
    header = ["calls", "ms", "share", "MB", "GB/s", "GOPS"]
    rows = [["kernel", "works on", *header]]
    rows += [[part.name, part.on, *_numbers(part, step)] for part in step.kernels]
    outside = [f"{step.outside * 1e3:.3f}", f"{step.outside / step.seconds:.1%}", "", "", ""]
    rows.append(["outside kernels", "", "", *outside])
    lines += aligned(rows, left=2)
    if layers:
        rows = [["layer", *header], *([p.name, *_numbers(p, step)] for p in step.layers)]
        lines += ["", *aligned(rows)]
    return lines


def _numbers(part: "Part", step: "StepProfile") -> list[str]:
    return [
        str(part.calls),
        f"{part.seconds * 1e3:.3f}",
        f"{part.seconds / step.seconds:.1%}",
        f"{part.nbytes / 1e6:.2f}",
        f"{part.nbytes / part.seconds / 1e9:.1f}",
        f"{part.operations / part.seconds / 1e9:.0f}" if part.operations else "",
    ]
