"""`relaxlm package`."""

from pathlib import Path
from typing import Annotated

import typer


def package(
    folder: Annotated[Path, typer.Argument(help="Folder made by convert_weight and gen_config.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    web: Annotated[
        bool,
        typer.Option("--web", help="For browsers: a page of static files, for any web server."),
    ] = False,
    model_lib: Annotated[
        list[Path] | None,
        typer.Option(
            "--model-lib",
            help="Library compiled for wasm or webgpu; may be given for both. Default: both are "
            "compiled now.",
        ),
    ] = None,
    overrides: Annotated[str | None, typer.Option("--overrides", help="As for compile.")] = None,
) -> None:
    """Put a model, its libraries and a chat page into one folder, ready to be used elsewhere."""
    from relaxlm.cli.compile import compile
    from relaxlm.errors import ConfigError, UnsupportedError
    from relaxlm.runtime.library import refuse_compile_options
    from relaxlm.web.package import package_web

    if not web:
        raise ConfigError("package: say what for: --web (browsers)")
    libraries = list(model_lib or ())
    for library in libraries:
        refuse_compile_options(library, overrides=overrides)
    if not libraries:
        for device in ("webgpu", "wasm"):
            library = output.parent / f".{output.name}-{device}.wasm"
            try:
                compile(folder, library, device, None, None, overrides)
                libraries.append(library)
            except UnsupportedError as error:
                typer.echo(f"note: not for {device}: {error}")
        if not libraries:
            raise ConfigError(f"{folder}: the model can be compiled for none of webgpu and wasm")
    try:
        package_web(folder, libraries, output)
    finally:
        for library in libraries if not model_lib else ():
            library.unlink()
    typer.echo(f"wrote {output}; look at it: python -m http.server --directory {output}")
