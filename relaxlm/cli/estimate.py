"""`relaxlm estimate`."""

from pathlib import Path
from typing import Annotated

import typer


def estimate(
    source: Annotated[
        Path, typer.Argument(help="Folder or path with a config.json or mlc-chat-config.json.")
    ],
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="Preset, such as q4f16_1.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="As for compile.")] = "auto",
    arch: Annotated[str | None, typer.Option("--arch", help="As for compile.")] = None,
    overrides: Annotated[str | None, typer.Option("--overrides", help="As for compile.")] = None,
) -> None:
    """Say how much memory a model will need; nothing is converted or compiled, no weights read."""
    from relaxlm.cli.report import print_memory
    from relaxlm.compiler.build import describe_model
    from relaxlm.compiler.request import CompileRequest

    request = CompileRequest.read(source, quantization, device, arch, overrides)
    # Of a library with several versions, the one that takes the most.
    info = max(
        (
            describe_model(one.config, one.raw, one.scheme, one.device, one.options)
            for one in (request, *request.further)
        ),
        key=lambda info: info.step_bytes,
    )
    typer.echo(f"{source}: {info.model_type}, for {request.device.kind}")
    print_memory(info)
