"""Loading a model for a command: a progress bar while it is compiled, and its memory."""

from pathlib import Path

import typer

from relaxlm.cli.report import compile_progress, memory_lines
from relaxlm.compiler.options import parse_overrides
from relaxlm.runtime.chat_config import ChatConfigFile
from relaxlm.runtime.chat_module import ChatConfig, ChatModule
from relaxlm.runtime.model import no_replies


def refuse_embedding_model(folder: Path) -> None:
    """Before anything is compiled, as far as the folder tells.

    Raises:
        RequestError: the model cannot write a reply.
    """
    if ChatConfigFile.load(folder).model_task == "embedding":
        raise no_replies(folder.resolve().name)


def load_module(
    folder: Path,
    model_lib: Path | None,
    device: str,
    overrides: str | None,
    conv_template: str | None,
    threads: int | None,
    opt: str | None,
) -> ChatModule:
    """Load a model; what is said of it goes to standard error."""
    limits = parse_overrides(overrides)
    config = ChatConfig(**limits, conv_template=conv_template)
    with compile_progress(f"load {folder.name}") as bar:

        def progress(stage: str, share: float) -> None:
            if share == 0:
                typer.echo("compiling the library; it is kept for the next time", err=True)
            bar(stage, share)

        module = ChatModule(
            folder, device, config, model_lib, progress=progress, threads=threads, opt=opt
        )
    info = module.library.metadata
    typer.echo(
        f"{folder}: {info.model_type}, {info.quantization}, {module.library.device}; "
        f"loaded in {module.load_seconds:.1f} s\nmemory:",
        err=True,
    )
    for line in memory_lines(info, module.context_window_size):
        typer.echo(line, err=True)
    return module
