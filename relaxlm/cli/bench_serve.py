"""`relaxlm bench serve`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from relaxlm.cli.arguments import ModelLib

if TYPE_CHECKING:
    from relaxlm.profiling.serving import Load
    from relaxlm.profiling.serving_client import Server


def bench_serve(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Folder made by convert_weight and gen_config, to start a server for."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", help="A running server in place of FOLDER: http://HOST:PORT."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="RELAXLM_API_KEY", help="Key of the server."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Name to ask for. Default: the first listed.")
    ] = None,
    model_lib: ModelLib = None,
    options: Annotated[
        str, typer.Option("--options", help='More for relaxlm serve: "--mode server --threads 2".')
    ] = "",
    concurrency: Annotated[
        str | None,
        typer.Option(
            "--concurrency",
            help="Clients that each ask one request after another; several loads, one after the "
            "other: 1,4,16. Default: 8.",
        ),
    ] = None,
    request_rate: Annotated[
        str | None,
        typer.Option(
            "--request-rate",
            help="In place of --concurrency: requests per second, at random moments: 0.5,2. "
            "inf: all at once.",
        ),
    ] = None,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Of each load.")] = 32,
    prompt_tokens: Annotated[
        str, typer.Option("--prompt-tokens", help="A length, or two to draw from: 100:400.")
    ] = "256",
    output_tokens: Annotated[
        str, typer.Option("--output-tokens", help="The same, of replies.")
    ] = "64",
    shared_prefix: Annotated[
        int,
        typer.Option("--shared-prefix", min=0, help="Tokens that all prompts begin with."),
    ] = 0,
    endpoint: Annotated[
        Literal["chat", "completions"], typer.Option("--endpoint", help="What is asked.")
    ] = "chat",
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.001, help="Seconds that a reply may take.")
    ] = 600,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            help="Of lengths, words and arrivals. A server that has answered the same prompts "
            "before finds them in its cache. Default: another one each time.",
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="File to write all numbers to.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Picture to draw (.png); needs relaxlm[plot].")
    ] = None,
) -> None:
    """Measure a server under load, this one's own or any with OpenAI's API.

    `relaxlm bench serve` is the same. It starts `relaxlm serve FOLDER`, or asks the server at
    --url, and prints what the server did per second and what its clients waited for.
    """
    import asyncio
    from json import dumps

    from rich.console import Console

    from relaxlm.profiling.serving import Range, Traffic, run
    from relaxlm.profiling.serving_report import tables

    if (url is None) == (folder is None):
        raise typer.BadParameter("name a FOLDER to serve, or the --url of a running server")
    if plot is not None:
        from relaxlm.profiling.plot import check_installed

        check_installed()
    loads = _loads(concurrency, request_rate)
    lengths = Range.parse(prompt_tokens), Range.parse(output_tokens)
    seed = _new_seed() if seed is None else seed
    traffic = Traffic(requests, *lengths, shared_prefix, seed, timeout)
    # Nothing is shown where output is no terminal.
    with Console(stderr=True).status("start the server") as status:
        with _server(folder, model_lib, options, url, api_key) as server:
            found = asyncio.run(run(server, loads, traffic, model, endpoint, status.update))
    title = f"{folder or url}: {found.title}"
    typer.echo(title)
    for line in tables([measured for measured, _ in found.loads]):
        typer.echo(line)
    if json is not None:
        content = {"server": str(folder or url), **found.as_json()}
        json.write_text(dumps(content) + "\n", encoding="utf-8")
    if plot is not None:
        from relaxlm.profiling.serving_plot import draw

        draw(found.loads, plot, title)
        typer.echo(f"wrote {plot}")


@contextmanager
def _server(
    folder: Path | None, model_lib: Path | None, options: str, url: str | None, api_key: str | None
) -> "Iterator[Server]":
    import shlex

    from relaxlm.profiling.serving_client import Server
    from relaxlm.profiling.serving_process import HOST, free_port, relaxlm_command, running

    if url is not None:
        if model_lib is not None or options:
            raise typer.BadParameter("--model-lib and --options are for a FOLDER, not for --url")
        yield Server.parse(url, api_key)
        return
    # A key in the environment is the started server's, too.
    server = Server.parse(f"http://{HOST}:{free_port()}", api_key)
    words = [*shlex.split(options), *(["--model-lib", str(model_lib)] if model_lib else [])]
    with running(relaxlm_command(str(folder), server.port, words), f"{server.root}/health"):
        yield server


def _loads(concurrency: str | None, request_rate: str | None) -> "list[Load]":
    from relaxlm.profiling.serving import Load

    if request_rate is None:
        return [
            Load(concurrency=int(n)) for n in _numbers("--concurrency", concurrency or "8", int)
        ]
    if concurrency is not None:
        raise typer.BadParameter("--concurrency and --request-rate are two kinds of load: choose")
    return [Load(rate=rate) for rate in _numbers("--request-rate", request_rate, float)]


def _numbers(option: str, text: str, kind: type[int] | type[float]) -> list:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not min(numbers) > 0:
        raise typer.BadParameter(f"{option} {text!r}: expected numbers above 0, such as 1,8")
    return numbers


def _new_seed() -> int:
    import secrets

    return secrets.randbits(32)
