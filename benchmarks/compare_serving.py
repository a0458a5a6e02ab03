"""relaxlm's server and llama.cpp's under the same load, in the same minutes.

    python benchmarks/compare.py --setup --only llama.cpp         # installs llama-cpp-python; once
    python benchmarks/compare_serving.py --peer-python PYTHON --llama-server PATH

Two servers of llama.cpp are known: its own `llama-server`, which answers several requests at a time
and has to be built from its source, and that of `llama-cpp-python[server]`, which answers one after
another. All use the same number of threads and models of the same shape with 4-bit weights (see
`make_models.py`); prompts have the same lengths, replies are greedy and not ended early. Each
server is a process of its own and stands still while another one is measured.
"""

import argparse
import asyncio
import json
import shutil
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from compare import default_cache, environment_python, say
from make_models import MODELS, make, peer_pythons
from peers.table import processor

from relaxlm.profiling.serving import Load, LoadGenerator, Range, Traffic
from relaxlm.profiling.serving_client import Server
from relaxlm.profiling.serving_process import HOST, free_port, relaxlm_command, running
from relaxlm.profiling.serving_report import Measured

OURS, NATIVE, PYTHON = "relaxlm", "llama-server", "llama-cpp-python"
PEER = "llama.cpp"  # as make_models.py calls it
_SLACK = 64  # tokens of context beside prompt and reply

Row = tuple[str, Callable[[Measured], float | None], str, Callable[..., float]]
ROWS: Sequence[Row] = (
    ("generated tokens/s", lambda m: m.output_tokens / m.seconds, ".1f", max),
    ("first token, p50, ms", lambda m: m.first and m.first.p50 * 1e3, ".0f", min),
    ("first token, p99, ms", lambda m: m.first and m.first.p99 * 1e3, ".0f", min),
    ("between tokens, p50, ms", lambda m: m.gaps and m.gaps.p50 * 1e3, ".1f", min),
    ("between tokens, p99, ms", lambda m: m.gaps and m.gaps.p99 * 1e3, ".1f", min),
    ("whole reply, p50, ms", lambda m: m.whole and m.whole.p50 * 1e3, ".0f", min),
)


class Running:
    """A server and what puts load on it."""

    def __init__(self, stack: ExitStack, name: str, options: argparse.Namespace) -> None:
        server = Server(HOST, free_port())
        command, ready = _command(name, options, server)
        say(f"start {name}")
        environment = {"OMP_NUM_THREADS": str(options.threads)}
        self._process = stack.enter_context(running(command, ready, environment))
        stack.callback(self._send, "SIGCONT")  # what stands still can't end
        limit = options.limit
        traffic = Traffic(1, options.prompt_tokens, options.output_tokens, 0, 0, limit)
        self._generator = asyncio.run(LoadGenerator.connect(server, traffic))
        self._send("SIGSTOP")

    def measure(self, concurrency: int, requests: int) -> Measured:
        self._send("SIGCONT")
        load = Load(concurrency=concurrency)
        found, _ = asyncio.run(self._generator.measure(load, requests))
        self._send("SIGSTOP")
        return found

    def _send(self, name: str) -> None:
        if hasattr(signal, name) and self._process.poll() is None:
            self._process.send_signal(getattr(signal, name))


def _command(name: str, options: argparse.Namespace, server: Server) -> tuple[list[str], str]:
    """How a server is started, and the URL that tells when it is ready."""
    port, threads = str(server.port), str(options.threads)
    pythons = {PEER: _peer_python(options), **peer_pythons(options.peer_python)}
    if name == OURS:
        folder = make(options.cache, options.model, "relaxlm", pythons)
        words = ["--mode", "server", "--threads", threads, "--no-access-log"]
        return relaxlm_command(str(folder), server.port, words), f"{server.root}/health"
    model = str(next(make(options.cache, options.model, PEER, pythons).glob("*.gguf")))
    context = options.prompt_tokens.high + options.output_tokens.high + _SLACK
    if name == PYTHON:
        words = ["--model", model, "--host", HOST, "--port", port, "--n_ctx", str(context)]
        words += ["--n_threads", threads, "--n_threads_batch", threads, "--verbose", "False"]
        words += ["--interrupt_requests", "False"]  # or each request would end the one before
        return [pythons[PEER], "-m", "llama_cpp.server", *words], f"{server.url}/models"
    slots = max(options.concurrency)
    words = ["-m", model, "--host", HOST, "--port", port, "-t", threads, "-tb", threads]
    words += ["--parallel", str(slots), "-c", str(slots * context)]
    return [options.llama_server, *words], f"{server.root}/health"


def _peer_python(options: argparse.Namespace) -> str:
    return str(environment_python(options.cache, PEER))


def markdown(found: dict[int, dict[str, list[Measured]]], names: Sequence[str]) -> list[str]:
    """A table: the median of the rounds, and how much better relaxlm is than the best peer."""
    peers = [name for name in names if name != OURS]
    rows = [["at a time", "", *names, *(["relaxlm / best peer"] if peers else [])]]
    for concurrency, results in found.items():
        for title, value_of, form, best in ROWS:
            values = {}
            for name, measured in results.items():
                each = [value for m in measured if (value := value_of(m)) is not None]
                if each:
                    values[name] = statistics.median(each)
            row = [str(concurrency), title]
            row += [format(values[name], form) if name in values else "-" for name in names]
            others = [values[name] for name in peers if name in values]
            if peers:
                known = OURS in values and others
                row.append(f"{values[OURS] / best(others):.2f}" if known else "-")
            rows.append(row)
    header, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return [header, "|" + "---|" * len(rows[0]), *body]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-0.5b")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=[OURS, NATIVE, PYTHON],
        help=f"servers to measure, separated by commas: {OURS}, {NATIVE}, {PYTHON}",
    )
    parser.add_argument(
        "--concurrency",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1, 4, 8, 16],
        help="clients at a time: 1,4,8,16",
    )
    parser.add_argument("--prompt-tokens", type=Range.parse, default=Range(256, 256))
    parser.add_argument("--output-tokens", type=Range.parse, default=Range(64, 64))
    parser.add_argument("--per-client", type=int, default=2, help="requests of each client")
    parser.add_argument("--at-least", type=int, default=6, help="requests of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-server", default=shutil.which("llama-server"), metavar="PATH")
    parser.add_argument("--peer-python", action="append", default=[], metavar="PYTHON")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="models and peers")
    parser.add_argument("--limit", type=float, default=600, help="seconds of a reply")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    options = parser.parse_args()
    for name in options.only:
        if name not in (OURS, NATIVE, PYTHON):
            parser.error(f"--only: {name!r} is none of {OURS}, {NATIVE}, {PYTHON}")
    if NATIVE in options.only and not options.llama_server:
        say(f"{NATIVE} is left out: it is not on PATH, and --llama-server does not name it")
        options.only.remove(NATIVE)
    return options


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended early"))
    found: dict[int, dict[str, list[Measured]]] = {}
    with ExitStack() as stack:
        try:
            servers = {name: Running(stack, name, options) for name in options.only}
            for concurrency in options.concurrency:
                requests = max(options.at_least, concurrency * options.per_client)
                found[concurrency] = {name: [] for name in servers}
                for round in range(options.rounds):
                    for name, server in servers.items():
                        say(f"{name}: {concurrency} at a time, {round + 1}/{options.rounds}")
                        measured = server.measure(concurrency, requests)
                        if measured.errors:
                            say(f"{name}: {measured.errors}")
                        found[concurrency][name].append(measured)
        finally:  # interrupted, too: what was measured is not lost
            report(options, found)


def report(options: argparse.Namespace, found: dict[int, dict[str, list[Measured]]]) -> None:
    if options.json:
        content = {c: {n: [asdict(m) for m in ms] for n, ms in r.items()} for c, r in found.items()}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    lines = [
        f"{processor()}, {options.threads} threads. {options.model}; prompts of "
        f"{options.prompt_tokens} tokens, replies of {options.output_tokens}.",
        "",
        *markdown(found, options.only),
    ]
    text = "\n".join(lines) + "\n"
    if options.markdown:
        options.markdown.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
