"""`relaxlm gen_config`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def gen_config(
    source: Annotated[
        Path,
        typer.Argument(
            help="Hugging Face folder with config.json and the tokenizer, or its config.json."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder to write; created if it does not exist."),
    ],
    quantization: Annotated[
        str, typer.Option("--quantization", help="Preset of the weights, such as q4f16_1.")
    ],
    conv_template: Annotated[
        str | None,
        typer.Option(
            "--conv-template",
            help="Named conversation template (chatml, llama-2, ...) to use in place of the "
            "model's own chat template.",
        ),
    ] = None,
    context_window_size: Annotated[
        int | None,
        typer.Option(
            "--context-window-size",
            help="Longest conversation, in tokens. Default: what the model was trained for.",
        ),
    ] = None,
    sliding_window_size: Annotated[
        int | None,
        typer.Option(
            "--sliding-window-size",
            help="Tokens that attention looks back to in every layer; -1 for all.",
        ),
    ] = None,
    attention_sink_size: Annotated[
        int | None,
        typer.Option(
            "--attention-sink-size",
            help="First tokens of a conversation that stay visible behind a sliding window.",
        ),
    ] = None,
    prefill_chunk_size: Annotated[
        int | None,
        typer.Option(
            "--prefill-chunk-size",
            help="Tokens of a prompt that are computed at once. Default: 2048, or the context.",
        ),
    ] = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option(
            "--max-batch-size", help="Sequences that are computed together. Default: 128."
        ),
    ] = None,
    tensor_parallel_shards: Annotated[
        int | None,
        typer.Option("--tensor-parallel-shards", help="Devices to split the model over: 1."),
    ] = None,
    model_task: Annotated[
        Literal["chat", "embedding"] | None,
        typer.Option(
            "--model-task",
            help="embedding: for vectors of texts. Default: embedding where the folder has "
            "sentence-transformers' files or the model is an encoder.",
        ),
    ] = None,
    pooling: Annotated[
        Literal["cls", "mean", "last", "max"] | None,
        typer.Option(
            "--pooling",
            help="What an embedding model's vector is made of: the state of the first token, the "
            "mean of all, that of the last one, or the largest numbers. Default: what the folder "
            "says, or else cls for an encoder and last for a decoder.",
        ),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            help="Whether an embedding model's vectors have length 1. Default: what the folder "
            "says, or else they have.",
        ),
    ] = None,
) -> None:
    """Write the chat configuration and the tokenizer files of a converted model."""
    from relaxlm.compiler.gen_config import generate_config

    path = generate_config(
        source,
        quantization,
        output,
        conv_template,
        context_window_size=context_window_size,
        sliding_window_size=sliding_window_size,
        attention_sink_size=attention_sink_size,
        prefill_chunk_size=prefill_chunk_size,
        max_batch_size=max_batch_size,
        tensor_parallel_shards=tensor_parallel_shards,
        model_task=model_task,
        pooling=pooling,
        normalize=normalize,
        note=lambda text: typer.echo(f"note: {text}"),
    )
    typer.echo(f"wrote {path}")
