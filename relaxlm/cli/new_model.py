"""`relaxlm new_model`."""

from pathlib import Path
from typing import Annotated

import typer


def new_model(
    config: Annotated[
        Path, typer.Argument(help="config.json of a Hugging Face model, or its folder.")
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Folder with weights; only names and shapes are read."),
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="A checkout of relaxlm, or any folder for two files."),
    ] = Path("."),
) -> None:
    """Draft a model file and its parity test, and list what could not be inferred."""
    from relaxlm.compiler.new_model_files import draft, write
    from relaxlm.models import MODELS, raw_config
    from relaxlm.quantization.checkpoint import Checkpoint

    raw, where = raw_config(config)
    tensors = None
    if checkpoint is not None:
        tensors = {name: shape for name, (shape, _) in Checkpoint.open(checkpoint).names().items()}
    found = draft(raw, where, tensors)
    if not found.module:
        file = f"relaxlm/models/{MODELS[found.family]}.py"
        if found.supported:
            typer.echo(f"{where}: relaxlm runs this model; model_type {found.model_type} is {file}")
            return
        typer.echo(f"{where}: model_type {found.model_type} is {file}, but not all of it is there:")
        for point in found.open_points:
            typer.echo(f"  - {point}")
        return
    model, test = write(found, output)
    typer.echo("Inferred:")
    for sentence in found.inferred:
        typer.echo(f"  - {sentence}")
    typer.echo("Open points:" if found.open_points else "No open points.")
    for point in found.open_points:
        typer.echo(f"  - {point}")
    typer.echo(
        f"Wrote {model} and {test}. Next:\n"
        f"  1. compare with transformers/models/{found.module}/modeling_{found.module}.py, and "
        "settle the open points\n"
        f'  2. add "{found.model_type}": "{found.module}" to MODELS in relaxlm/models/__init__.py\n'
        "  3. give `absent` what the type's configuration class in transformers fills in\n"
        f"  4. python -m pytest {test}, with a variant for every value that real models have\n"
        "  5. docs/add-a-model.md has the rest"
    )
