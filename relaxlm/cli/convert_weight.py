"""`relaxlm convert_weight`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def convert_weight(
    source: Annotated[
        Path,
        typer.Argument(
            help="Hugging Face folder with config.json and the weights (*.safetensors or *.bin), "
            "or the path of its config.json.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder to write; created if it does not exist."),
    ],
    quantization: Annotated[
        str, typer.Option("--quantization", help="How to store the weights, such as q4f16_1.")
    ],
    model_task: Annotated[
        Literal["chat", "embedding"] | None,
        typer.Option(
            "--model-task",
            help="embedding: for vectors of texts; the output head is left out. Default: embedding "
            "where the folder has sentence-transformers' files or the model is an encoder.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="File to write the error of every parameter to, as JSON."),
    ] = None,
) -> None:
    """Quantize a checkpoint's weights and write them in the MLC container."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from relaxlm.files import format_bytes
    from relaxlm.models import ignored_sources, load_config, parameter_specs
    from relaxlm.quantization.convert import open_float_checkpoint, plan_conversion
    from relaxlm.quantization.schemes import get_scheme

    scheme = get_scheme(quantization)
    open_float_checkpoint(source)  # so that a folder of GGUF or GPTQ files is called that first
    config = load_config(source, model_task)
    plan = plan_conversion(source, scheme, output, parameter_specs(config), ignored_sources(config))
    free = plan.check_disk_space()
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{source}: {plan.source_parameters:,} weights, {format_bytes(plan.source_bytes)}\n"
        f"{scheme.name} takes {format_bytes(plan.disk_estimate)} of disk "
        f"({format_bytes(free)} free) and about {format_bytes(plan.memory_estimate)} of memory",
        markup=False,
    )
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=plan.source_bytes)
        done = plan.run(lambda read, _, name: bar.update(task, completed=read, description=name))
    speed = done.source_bytes / max(done.seconds, 1e-9)
    memory = "" if done.peak_memory is None else f", peak memory {format_bytes(done.peak_memory)}"
    console.print(
        f"{output}: {format_bytes(done.stored_bytes)} in {done.shards} "
        f"{'file' if done.shards == 1 else 'files'}, "
        f"{done.bits_per_weight:.3f} bits per weight, {done.seconds:.1f} s "
        f"({format_bytes(speed)}/s){memory}",
        markup=False,
    )
    console.print("largest errors (relative RMS, largest absolute):")
    for error in done.worst():
        console.print(
            f"  {error.relative_rms:8.2e}  {error.max_abs:8.2e}  {error.name} {list(error.shape)}",
            markup=False,
        )
    if report is not None:
        report.write_text(done.to_json() + "\n", encoding="utf-8")
        console.print(f"the error of every parameter: {report}", markup=False)
