"""`relaxlm embed`."""

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from relaxlm.cli.arguments import Device, ModelFolder, ModelLib, Opt, Overrides, Threads

# Texts that are tokenized at a time, and whose vectors are written together.
_BLOCK = 1024


def embed(
    folder: ModelFolder,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="A text; may be given several times.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            "--texts",
            help="File with one text per line (-: standard input, which is read where no text is "
            "given at all).",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="*.npy for an array [texts, numbers] of float32, *.jsonl for one JSON object per "
            "text, with text and embedding. Default: JSON lines to standard output.",
        ),
    ] = None,
    prompt_name: Annotated[
        str | None,
        typer.Option(
            "--prompt-name",
            help="Which of the model's prompts to put in front of every text, such as query or "
            "document. Default: the one that the model names as its default, if it does.",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What to put in front of every text instead.")
    ] = None,
    dimensions: Annotated[
        int | None,
        typer.Option(
            "--dimensions",
            min=1,
            help="Numbers of each vector to keep, brought to length 1 again; for models that were "
            "trained for it (Matryoshka). Default: all.",
        ),
    ] = None,
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate", help="Cut off the end of a text that is too long for the model."
        ),
    ] = False,
    model_lib: ModelLib = None,
    device: Device = "auto",
    overrides: Overrides = None,
    opt: Opt = None,
    threads: Threads = None,
) -> None:
    """Turn texts into vectors, with an embedding model or any other.

    How states become vectors is in the folder's mlc-chat-config.json, under embedding_metadata:
    gen_config takes it from the files of sentence-transformers. A text that is empty or too long is
    an error.
    """
    if text and texts is not None:
        raise typer.BadParameter("--text and --texts: give one of them")
    from relaxlm.cli.loading import load_module
    from relaxlm.cli.replies import cleaned, use_utf8
    from relaxlm.cli.vectors import open_output, read_lines
    from relaxlm.errors import RequestError

    use_utf8()
    given = iter([cleaned(one) for one in text]) if text else read_lines(texts)
    done = 0
    with open_output(output) as out:
        module = load_module(folder, model_lib, device, overrides, None, threads, opt)
        while block := list(islice(given, _BLOCK)):
            if "" in block:
                number = done + 1 + block.index("")
                raise RequestError(f"text {number} is empty: leave it out, or write something")
            try:
                vectors = module.embed_text(block, prompt_name, prompt, dimensions, truncate)
            except RequestError as error:
                where = f"of the texts from number {done + 1} on, counted from 0: " if done else ""
                raise RequestError(f"{where}{error}") from None
            out.write(block, vectors)
            done += len(block)
        if not done:
            raise RequestError("no text to embed: expected at least one")
    if output is not None:
        numbers = vectors.shape[1]
        typer.echo(f"wrote {output}: {done} vectors of {numbers} numbers", err=True)
