"""`relaxlm demo`."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

QUESTIONS = (
    "Who are you?",
    "Tell me a story about a fox.",
    "What is 17 + 25?",
)


def demo(
    quantization: Annotated[
        str, typer.Option("--quantization", help="How to store the weights.")
    ] = "q4f16_1",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or metal.")] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write. Default: in relaxlm's cache."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Go on with a chat. Default: in a terminal."),
    ] = None,
) -> None:
    """Convert, compile and run the tiny model that comes with relaxlm. Needs no network.

    The model is a toy that this project trained itself on text about a made-up village. It knows
    nothing else; it is there to show every step on real input.
    """
    from relaxlm import ChatModule, GenerationConfig, StreamToStdout
    from relaxlm.cli.build import build
    from relaxlm.compiler.target import resolve_device
    from relaxlm.demo import MODEL_DIR
    from relaxlm.runtime.jit import cache_folder

    target = resolve_device(device)
    folder = output or cache_folder() / "demo" / quantization
    typer.echo(
        "This is a toy model that the project trained itself: it knows a made-up village, short\n"
        f"stories and small sums, and nothing else.\n\n$ relaxlm build {MODEL_DIR} "
        f"--quantization {quantization} --device {device} -o {folder}"
    )
    started = time.perf_counter()
    build(MODEL_DIR, folder, quantization, device)
    library = next(folder.glob(f"*-{target.name}{target.suffix}"))
    built = time.perf_counter() - started
    module = ChatModule(folder, model_lib=library)
    typer.echo(f"\nbuilt in {built:.1f} s, loaded in {module.load_seconds:.1f} s\n")
    settings = GenerationConfig(temperature=0.0)
    for question in QUESTIONS:
        typer.echo(f"> {question}")
        module.generate(question, settings, StreamToStdout(callback_interval=1))
        typer.echo(f"  [{module.stats()}]\n")
    command = f"relaxlm chat {folder} --model-lib {library}"
    if chat if chat is not None else sys.stdin.isatty() and sys.stdout.isatty():
        from relaxlm.cli.chat import chat as start_chat

        typer.echo(f"$ {command}")
        start_chat(folder, model_lib=library)
    else:
        typer.echo(f"Chat with it: {command}")
    typer.echo(f"Serve it, with a page to chat in: relaxlm serve {folder} --model-lib {library}")
