"""`relaxlm tune`."""

from pathlib import Path
from typing import Annotated

import typer

from relaxlm.cli.arguments import Threads


def tune(
    folder: Annotated[
        Path, typer.Argument(help="Folder made by gen_config: the model whose matrices count.")
    ],
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.01, help="Of each comparison of candidates.")
    ] = 1.0,
    threads: Threads = None,
) -> None:
    """Search the CPU kernels' parameters on this machine, for every later compile here.

    What is found is kept in the cache, by the model of the CPU. Needs a machine that does nothing
    else; takes about a minute.
    """
    from relaxlm.compiler.kernels.tuning import NAMES, Tuning, processor, save
    from relaxlm.compiler.request import CompileRequest
    from relaxlm.files import cache_folder
    from relaxlm.profiling.search import Search
    from relaxlm.runtime.threads import set_threads

    set_threads(threads)
    defaults = ";".join(f"{name}={getattr(Tuning(), name)}" for name in NAMES)
    request = CompileRequest.read(folder, device="cpu", opt=defaults)  # not what was found before
    typer.echo(f"{processor()}; speeds as shares of the fastest:")
    found = Search(request, seconds, typer.echo).run()
    for name in NAMES:
        value, default = getattr(found.tuning, name), getattr(Tuning(), name)
        typer.echo(f"{name} = {value}" + (f" (default: {default})" if value != default else ""))
    typer.echo(f"wrote {save(cache_folder(), found.tuning, found.as_json())}")
