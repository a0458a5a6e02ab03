"""`relaxlm build`."""

from pathlib import Path
from typing import Annotated

import typer


def build(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write. Default: dist/NAME-QUANTIZATION."),
    ] = None,
    quantization: Annotated[
        str, typer.Option("--quantization", help="Preset, such as q4f16_1.")
    ] = "q4f16_1",
    device: Annotated[str, typer.Option("--device", help="As for compile.")] = "auto",
    arch: Annotated[str | None, typer.Option("--arch", help="As for compile.")] = None,
    conv_template: Annotated[
        str | None, typer.Option("--conv-template", help="As for gen_config.")
    ] = None,
    overrides: Annotated[str | None, typer.Option("--overrides", help="As for compile.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="As for compile.")] = False,
) -> None:
    """Convert, configure and compile a model in one go."""
    from relaxlm.cli.compile import compile
    from relaxlm.cli.convert_weight import convert_weight
    from relaxlm.cli.gen_config import gen_config
    from relaxlm.compiler.sentence_transformers import read as read_sentence_transformer
    from relaxlm.compiler.target import resolve_device
    from relaxlm.models import load_config
    from relaxlm.quantization.convert import open_float_checkpoint
    from relaxlm.runtime.jit import keep

    # What can be wrong with the options shows before the long work.
    target = resolve_device(device, arch)
    open_float_checkpoint(source)
    config = load_config(source)
    read_sentence_transformer(source if source.is_dir() else source.parent)
    name = (source if source.is_dir() else source.parent).resolve().name
    folder = output or Path("dist") / f"{name}-{quantization}"
    library = folder / f"{name}-{quantization}-{target.name}{target.suffix}"
    typer.echo(f"1/3 convert_weight -> {folder}")
    convert_weight(source, folder, quantization)
    typer.echo(f"2/3 gen_config -> {folder}")
    gen_config(source, folder, quantization, conv_template)
    typer.echo(f"3/3 compile -> {library}")
    compile(folder, library, device, None, arch, overrides, verbose=verbose)
    if arch is None and target.platform.is_here and target.suffix != ".wasm":
        keep(library, folder, device, overrides)
    if target.suffix == ".wasm":
        typer.echo("It runs in browsers and in Node.js: docs/web.md")
    elif not target.platform.is_here:
        typer.echo(f"It runs on {target.platform.name}: docs/targets.md")
    elif config.model_task == "embedding":
        typer.echo(f"Embed texts: relaxlm embed {folder} --model-lib {library} --text ...")
    else:
        typer.echo(f"Chat with it: relaxlm chat {folder} --model-lib {library}")
