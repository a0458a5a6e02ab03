"""Arguments and options that several commands have, and what they say of them."""

from pathlib import Path
from typing import Annotated

import typer

ModelFolder = Annotated[
    Path, typer.Argument(help="Folder made by build, or by convert_weight and gen_config.")
]
ModelLib = Annotated[
    Path | None,
    typer.Option("--model-lib", help="Compiled library. Default: compiled once, and cached."),
]
# Of commands that run a model.
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or metal.")]
Overrides = Annotated[
    str | None,
    typer.Option(
        "--overrides",
        help="As for compile; with --model-lib, what the library was compiled with.",
    ),
]
# Of commands that only measure a library, for which it says nothing beside `--model-lib`.
CompileOverrides = Annotated[
    str | None, typer.Option("--overrides", help="As for compile; not with a library.")
]
Opt = Annotated[
    str | None,
    typer.Option(
        "--opt", help="As for compile: act_quant=0 for exact matmuls; not with a library."
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Default: one per physical core.")
]
ConvTemplate = Annotated[
    str | None,
    typer.Option(
        "--conv-template", help="Named conversation template in place of the folder's own."
    ),
]
