"""`relaxlm serve`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relaxlm.cli.arguments import ConvTemplate, Device, ModelFolder, Opt, Overrides, Threads
from relaxlm.errors import ConfigError

if TYPE_CHECKING:
    from relaxlm.engine.config import EngineConfig
    from relaxlm.engine.loop import EngineLoop
    from relaxlm.server.settings import ServerSettings


def serve(
    folder: ModelFolder,
    model_lib: Annotated[
        Path | None,
        typer.Option(
            *("--model-lib", "--lib-path"),
            help="Compiled library. Default: compiled once, and cached.",
        ),
    ] = None,
    device: Device = "auto",
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0: all of this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")
    ] = 8000,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            help="interactive: one reply at a time; local: 4; server: as many as the library and "
            "the memory take.",
        ),
    ] = "local",
    max_batch_size: Annotated[
        int | None, typer.Option("--max-batch-size", min=1, help="Replies at a time.")
    ] = None,
    context_window_size: Annotated[
        int | None,
        typer.Option("--context-window-size", min=1, help="Tokens of one prompt and its reply."),
    ] = None,
    kv_cache_tokens: Annotated[
        int | None,
        typer.Option(
            "--kv-cache-tokens", min=1, help="Of all requests. Default: by mode and free memory."
        ),
    ] = None,
    prefill_chunk_size: Annotated[
        int | None, typer.Option("--prefill-chunk-size", min=1, help="Most tokens of one step.")
    ] = None,
    mixed_prefill_tokens: Annotated[
        int | None,
        typer.Option(
            "--mixed-prefill-tokens",
            min=1,
            help="Most tokens of prompts in a step in which replies are written.",
        ),
    ] = None,
    max_waiting: Annotated[
        int,
        typer.Option(
            "--max-waiting", min=0, help="Requests that may wait; more are refused for now (429)."
        ),
    ] = 256,
    prefix_cache: Annotated[
        bool,
        typer.Option("--prefix-cache/--no-prefix-cache", help="Share work on common beginnings."),
    ] = True,
    speculative: Annotated[
        str,
        typer.Option("--speculative", help="ngram: guess tokens from the text so far; or off."),
    ] = "off",
    speculative_tokens: Annotated[
        int, typer.Option("--speculative-tokens", min=1, max=32, help="Longest guess.")
    ] = 4,
    batch_invariant: Annotated[
        bool | None,
        typer.Option(
            "--batch-invariant/--no-batch-invariant",
            help="The same reply whatever else is computed, for slower prompts. Default: with "
            "--speculative on CPUs, so that guesses change no reply.",
        ),
    ] = None,
    overrides: Overrides = None,
    opt: Opt = None,
    conv_template: ConvTemplate = None,
    threads: Threads = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            help="Key that clients must send; may be repeated. Other users of this machine can see "
            "it in the list of processes: RELAXLM_API_KEY and --api-key-file are safer.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", help="File with one key per line.", dir_okay=False),
    ] = None,
    allow_unauthenticated: Annotated[
        bool,
        typer.Option(
            "--allow-unauthenticated", help="Listen to other machines although no key is set."
        ),
    ] = False,
    open_metrics: Annotated[
        bool, typer.Option("--open-metrics", help="/metrics without a key.")
    ] = False,
    model_name: Annotated[
        str | None,
        typer.Option("--model-name", help="What the model is called. Default: as its folder."),
    ] = None,
    strict_model_name: Annotated[
        bool,
        typer.Option(
            "--strict-model-name",
            help="Refuse requests that name another model. Default: this one answers them.",
        ),
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            help="Origin whose pages may use the server, as https://example.com; * for all; may be "
            "repeated. Default: this server's own page alone.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            help="Name by which the server is addressed, apart from localhost and IP addresses; "
            "may be repeated.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", min=1, help="Longest reply that may be asked for. Default: any."
        ),
    ] = None,
    max_body: Annotated[
        int, typer.Option("--max-body", min=1, help="Largest request, in MiB.")
    ] = 8,
    max_connections: Annotated[
        int, typer.Option("--max-connections", min=1, help="Open at a time.")
    ] = 512,
    request_timeout: Annotated[
        float,
        typer.Option("--request-timeout", min=0, help="Seconds for one request; 0: no limit."),
    ] = 3600,
    reader_timeout: Annotated[
        float,
        typer.Option(
            "--reader-timeout", min=1, help="Seconds that a client may take nothing of its reply."
        ),
    ] = 60,
    drain_seconds: Annotated[
        float,
        typer.Option(
            "--drain-seconds", min=0, help="For running requests once the server is told to end."
        ),
    ] = 30,
    log_level: Annotated[
        str, typer.Option("--log-level", help="debug, info, warning or error.")
    ] = "info",
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="A line for each request.")
    ] = True,
) -> None:
    """Serve a model over HTTP: an API in OpenAI's shape, and a page to chat in.

    Ends with Ctrl-C or SIGTERM: running replies are written to their end, for --drain-seconds.
    A second signal ends at once.
    """
    if log_level not in ("debug", "info", "warning", "error"):
        raise ConfigError(
            f"--log-level {log_level}: expected one of debug, info, warning and error"
        )
    _check_installed()
    from relaxlm.engine.config import EngineConfig
    from relaxlm.server.app import ApiServer
    from relaxlm.server.run import Server, bind, connection_limit
    from relaxlm.server.settings import MIB, ServerSettings, check_origin, gather_api_keys

    settings = ServerSettings(
        api_keys=gather_api_keys(api_key or [], api_key_file),
        open_metrics=open_metrics,
        model_name=model_name,
        strict_model_name=strict_model_name,
        cors_origins=tuple(check_origin(origin) for origin in cors_origin or ()),
        allowed_hosts=tuple(allowed_host or ()),
        host=host,
        max_body=max_body * MIB,
        max_tokens_limit=max_tokens,
        max_connections=connection_limit(max_connections),
        request_timeout=request_timeout or None,
        reader_timeout=reader_timeout,
        drain=drain_seconds,
    )
    settings.check_exposure(allow_unauthenticated)
    config = EngineConfig(
        mode=mode,
        max_batch_size=max_batch_size,
        context_window_size=context_window_size,
        kv_cache_tokens=kv_cache_tokens,
        prefill_chunk_size=prefill_chunk_size,
        mixed_prefill_tokens=mixed_prefill_tokens,
        max_waiting=max_waiting,
        prefix_cache=prefix_cache,
        speculative=speculative,
        speculative_tokens=speculative_tokens,
        batch_invariant=batch_invariant,
    )
    sockets = bind(host, port)  # before the model is loaded, which may take minutes
    engine = _load(folder, model_lib, device, overrides, conv_template, config, opt, threads)
    try:
        api = ApiServer(engine, settings)
        _say_where(engine, settings, sockets[0].getsockname()[1])
        Server(api, log_level, access_log).run(sockets=sockets)
        api.close()
    finally:
        engine.close()
    typer.echo("ended", err=True)


def _check_installed() -> None:
    from importlib.util import find_spec

    for name in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
        if find_spec(name) is None:
            raise ConfigError(f"serve needs {name}: pip install 'relaxlm[serve]'")


def _load(
    folder: Path,
    model_lib: Path | None,
    device: str,
    overrides: str | None,
    conv_template: str | None,
    config: "EngineConfig",
    opt: str | None,
    threads: int | None,
) -> "EngineLoop":
    """Load the model, with a progress bar while it is compiled, and report its memory."""
    from relaxlm.cli.report import compile_progress
    from relaxlm.compiler.options import DEFAULT_MAX_BATCH, parse_overrides
    from relaxlm.engine.loop import EngineLoop
    from relaxlm.runtime.chat_settings import ChatConfig
    from relaxlm.runtime.library import is_batch_invariant

    limits = parse_overrides(overrides)
    if model_lib is None and (config.max_batch_size or 0) > DEFAULT_MAX_BATCH:
        limits.setdefault("max_batch_size", config.max_batch_size or 0)
    with compile_progress(f"load {folder.name}") as bar:

        def progress(stage: str, share: float) -> None:
            if share == 0:
                typer.echo("compiling the library; it is kept for the next time", err=True)
            bar(stage, share)

        chat_config = ChatConfig(**limits, conv_template=conv_template)
        engine = EngineLoop.load(
            folder, model_lib, device, config, chat_config, opt, threads, progress
        )
    for line in _memory_lines(engine):
        typer.echo(line, err=True)
    info = engine.model.library.metadata
    if config.speculative != "off" and not is_batch_invariant(info):
        typer.echo(
            "note: the library is not batch-invariant, so guesses may change a reply's rounding; "
            'compile it with --opt "batch_invariant=1" to rule that out',
            err=True,
        )
    return engine


def _memory_lines(engine: "EngineLoop") -> list[str]:
    from relaxlm.files import format_bytes

    library, plan = engine.model.library, engine.plan
    info = library.metadata
    memory = plan.cache.nbytes(info)
    tokens = plan.cache.pages * info.kv_cache.page_size
    temporary = info.step_bytes
    lines = [
        f"{engine.model.folder}: {info.model_type}, {info.quantization}, {library.device}; up to "
        f"{plan.limits.sequences} requests at a time, {plan.context} tokens each",
        "memory:",
        f"  parameters        {format_bytes(info.memory.params):>9}  {info.quantization}",
    ]
    if info.kv_cache.tensors:
        lines.append(
            f"  KV cache          {format_bytes(memory.kv_cache):>9}  {info.kv_cache.dtype}, "
            f"{tokens} tokens of all requests"
        )
    if info.state.tensors:
        lines.append(
            f"  recurrent states  {format_bytes(memory.states):>9}  {plan.cache.state_slots} of "
            f"{format_bytes(info.state.bytes_per_sequence)}, {plan.kept} of them for requests to "
            "go on from"
        )
    total = info.memory.params + memory.kv_cache + memory.states + temporary
    lines += [
        f"  temporary buffers {format_bytes(temporary):>9}  "
        f"steps of up to {plan.limits.tokens} tokens",
        f"  total             {format_bytes(total):>9}",
    ]
    return lines


def _say_where(engine: "EngineLoop", settings: "ServerSettings", port: int) -> None:
    """Addresses to open and to call."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::", "") else settings.host
    url = f"http://[{host}]:{port}" if ":" in host.strip("[]") else f"http://{host}:{port}"
    key = ' -H "Authorization: Bearer $RELAXLM_API_KEY"' if settings.api_keys else ""
    if engine.model.embeds_only:
        page, path, body = "", "embeddings", '{"input": "Hello"}'
    else:
        page, path = f"page: {url}/\n", "chat/completions"
        body = '{"messages": [{"role": "user", "content": "Hello"}]}'
    typer.echo(
        f"{page}"
        f"API:  {url}/v1, model {settings.model_name or engine.model.name}\n"
        f"try:  curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{body}'",
        err=True,
    )
