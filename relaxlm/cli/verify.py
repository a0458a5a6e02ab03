"""`relaxlm verify`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from relaxlm.cli.arguments import CompileOverrides, Device, Opt


def verify(
    source: Annotated[Path, typer.Argument(help="The original checkpoint: a Hugging Face folder.")],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="LIB|FOLDER",
            help="Folder made by convert_weight and gen_config, or a compiled library.",
        ),
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights", help="A library's converted folder. Default: the folder it lies in."
        ),
    ] = None,
    model_lib: Annotated[
        Path | None,
        typer.Option("--model-lib", help="A folder's library. Default: compiled just in time."),
    ] = None,
    device: Device = "auto",
    overrides: CompileOverrides = None,
    opt: Opt = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="Text to compare on; may be given several times."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="File with one text per line.")
    ] = None,
    max_length: Annotated[
        int, typer.Option("--max-length", min=1, help="Tokens of each text that are compared.")
    ] = 256,
    reference: Annotated[
        Literal["both", "float", "dequantized"],
        typer.Option(
            "--reference",
            help="float: the checkpoint in float32, which shows what quantization costs. "
            "dequantized: the values that the library stores, which shows whether it computes "
            "right.",
        ),
    ] = "both",
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", help="Largest mean KL from the checkpoint, in nats per token."),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            "--min-top1",
            min=0,
            max=1,
            help="Smallest share of tokens that the checkpoint and the library agree on.",
        ),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(
            "--min-cosine",
            max=1,
            help="Of embedding models: the smallest cosine of a text's vectors, the checkpoint's "
            "and the library's.",
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error",
            help="Largest error of a logit, in standard deviations of the logits, against the "
            "values that the library stores; of a state for embedding models.",
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="File to write all numbers to.")
    ] = None,
) -> None:
    """Compare a library's results with the original model in transformers.

    Without --threshold, --min-top1, --min-cosine and --max-error, what is allowed depends on the
    preset. Embedding models are compared by the states of their last norm and the vectors that
    texts become of them.
    """
    from json import dumps

    from rich.console import Console

    from relaxlm.cli.report import cache_name, compile_progress
    from relaxlm.errors import RequestError
    from relaxlm.files import format_bytes
    from relaxlm.verification.prompts import DEFAULT_PROMPTS
    from relaxlm.verification.report import report
    from relaxlm.verification.verify import Thresholds, prepare

    texts = list(prompt or [])
    if prompts is not None:
        lines = prompts.read_text(encoding="utf-8").splitlines()
        texts += [line for line in lines if line.strip()]
        if not texts:
            raise RequestError(f"{prompts} has no text, expected one prompt per line")
    with compile_progress(f"compile {target.name}") as progress:
        job = prepare(
            source,
            target,
            texts or DEFAULT_PROMPTS,
            weights=weights,
            model_lib=model_lib,
            device=device,
            overrides=overrides,
            opt=opt,
            max_length=max_length,
            reference=reference,
            progress=progress,
        )
    info, memory = job.library.metadata, job.memory_estimate()
    typer.echo(
        f"{job.library.path}: {info.model_type}, {info.quantization}, {job.library.device}, "
        f"{cache_name(info)}; weights in {job.weights.path}"
    )
    parts = zip(("the original", "the library", "results"), memory, strict=True)
    typer.echo(
        f"needs about {format_bytes(sum(memory))} of memory: "
        + ", ".join(f"{name} {format_bytes(size)}" for name, size in parts)
    )
    # Nothing is shown where output is no terminal.
    with Console(stderr=True).status("") as status:
        limits = Thresholds(max_error, threshold, min_top1, min_cosine)
        found = job.run(limits, status.update)
    for line in report(found):
        typer.echo(line)
    if json is not None:
        json.write_text(dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")
    found.check()
    typer.echo("verified")
