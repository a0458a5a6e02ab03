"""`relaxlm chat`."""

from pathlib import Path
from typing import Annotated

import typer

from relaxlm.cli.arguments import (
    ConvTemplate,
    Device,
    ModelFolder,
    ModelLib,
    Opt,
    Overrides,
    Threads,
)


def chat(
    folder: ModelFolder,
    model_lib: ModelLib = None,
    device: Device = "auto",
    overrides: Overrides = None,
    opt: Opt = None,
    threads: Threads = None,
    conv_template: ConvTemplate = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Answer this, and exit; no conversation.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="File with one prompt per line (-: standard input). Each is answered on its own, "
            "on one line: line ends in a reply are written as \\n. Empty lines are skipped.",
        ),
    ] = None,
    jsonl: Annotated[
        bool,
        typer.Option(
            "--jsonl",
            help="With --prompt or --prompts: one JSON object per prompt, with reply, "
            "finish_reason, counts of tokens and seconds.",
        ),
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="0: always the most probable token. Default: folder's."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Sample from the most probable tokens of this sum."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Sample from that many tokens; 0: from all.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option("--min-p", help="Leave out tokens below this share of the best one's."),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option("--repetition-penalty", help="Above 1: fewer tokens that were there before."),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option("--presence-penalty", help="Subtracted from logits of the reply's tokens."),
    ] = None,
    frequency_penalty: Annotated[
        float | None,
        typer.Option("--frequency-penalty", help="The same, times how often they are there."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="Longest reply. Default: what the context takes."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Text that ends a reply; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling reproducible.")] = None,
) -> None:
    """Talk to a model.

    In a terminal a conversation, with editing, history, and commands that /help lists; Ctrl-C stops
    a reply. From a pipe the same without editing: one message per line. Replies go to standard
    output, everything else to standard error.
    """
    if prompt is not None and prompts is not None:
        raise typer.BadParameter("--prompt and --prompts: give one of them")
    if jsonl and prompt is None and prompts is None:
        raise typer.BadParameter("--jsonl needs --prompt or --prompts")

    from relaxlm.cli import replies
    from relaxlm.cli.conversation import Conversation
    from relaxlm.cli.loading import load_module, refuse_embedding_model
    from relaxlm.runtime.generation import GenerationConfig

    settings = GenerationConfig(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        max_tokens=max_tokens,
        stop=stop or None,
        seed=seed,
    )
    replies.use_utf8()
    lines = None if prompts is None else replies.read_prompts(prompts)
    refuse_embedding_model(folder)
    module = load_module(folder, model_lib, device, overrides, conv_template, threads, opt)
    module.model.refuse_embedding_model()
    if lines is not None:
        failed = replies.answer_each(module, lines, settings, system, jsonl)
        if failed:
            raise typer.Exit(1)
    elif prompt is not None:
        replies.answer_one(module, replies.cleaned(prompt), settings, system, jsonl)
    else:
        Conversation(module, settings, system).run()
