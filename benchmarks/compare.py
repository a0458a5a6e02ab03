"""relaxlm and its peers side by side, on the same machine in the same minutes.

    python benchmarks/compare.py --setup                    # installs the peers; once
    python benchmarks/compare.py --markdown table.md --json numbers.json
    python benchmarks/compare.py --quick --only relaxlm,llama.cpp --models qwen2.5-0.5b

Each runtime has a process of its own and the same number of threads; the models come from
`make_models.py`. Rounds are interleaved (A B C, A B C, ...), the median counts, and processes that
are not being measured stand still. A loop that only reads memory takes part in every round: what
decoding reaches of it says more than tokens per second do on a machine that others use, too.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from make_models import MODELS, PEERS, make, peer_pythons
from peers.table import markdown
from peers.worker import Worker, WorkerError

SCRIPTS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Program:
    """A runtime, the form of a model it reads, and arguments of its script after the threads."""

    form: str
    arguments: tuple[str, ...] = ()

    @property
    def script(self) -> Path:
        return SCRIPTS / f"{self.form.replace('.', '')}_peer.py"


PROGRAMS = {
    "relaxlm": Program("relaxlm"),
    "llama.cpp": Program("llama.cpp"),
    "openvino": Program("openvino"),
    # On CPUs with bfloat16 in hardware its default is fast in prompts and slow in decoding.
    "openvino f32": Program("openvino", ("f32",)),
    "onnxruntime": Program("onnxruntime"),
}
# torch comes first and exactly so: with no torch there, pip takes one with gigabytes of CUDA.
INSTALL: dict[str, list[list[str]]] = {
    "llama.cpp": [["llama-cpp-python[server]==0.3.36", "gguf"]],
    "openvino": [["torch==2.13.0"], ["openvino-genai==2026.4.1", "optimum-intel", "nncf"]],
    "onnxruntime": [
        ["torch==2.13.0"],
        ["onnxruntime-genai==0.18.0", "transformers", "onnx", "onnx_ir"],
    ],
}
# GCC before 13 drops the stores of llama.cpp's AMX configuration: its inline assembly for
# ldtilecfg names 8 of the 64 bytes that are read. The process would end with SIGSEGV.
INSTALL_ENVIRONMENT = {"CMAKE_ARGS": '-DGGML_NATIVE=ON -DCMAKE_CXX_FLAGS="-fno-tree-dse -fno-dse"'}


@dataclass(frozen=True)
class Case:
    """A measurement.

    Attributes:
        tokens: that one answer's seconds are for.
        rounds, quick_rounds: of which the median counts.
    """

    name: str
    request: dict[str, Any]
    tokens: int
    rounds: int
    quick_rounds: int


def _decode(context: int, batch: int, steps: int) -> dict[str, Any]:
    return {"do": "decode", "context": context, "batch": batch, "steps": steps}


CASES = {
    "decode": Case("decode, context 128", _decode(128, 1, 32), 1, 7, 3),
    "decode-4096": Case("decode, context 4096", _decode(4096, 1, 16), 1, 5, 2),
    "batch": Case("decode, 8 sequences, context 128", _decode(128, 8, 16), 8, 7, 3),
    "prefill": Case("prefill 512", {"do": "prefill", "tokens": 512}, 512, 7, 3),
    "prefill-8192": Case("prefill 8192", {"do": "prefill", "tokens": 8192}, 8192, 3, 1),
}
LOAD_ROUNDS, QUICK_LOAD_ROUNDS = 5, 2


@dataclass
class Found:
    """What was measured of one model.

    Attributes:
        about: program -> what it says of itself, such as its version.
        seconds: case -> program -> one value per round.
        read: case -> bytes per second of the read loop, one value per round.
        start: program -> seconds until ready, until the first token of 512, and peak bytes.
        errors: program -> what went wrong.
    """

    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    read: dict[str, list[float]] = field(default_factory=dict)
    start: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)
    compile_seconds: float | None = None

    def fail(self, program: str, what: str, error: WorkerError) -> None:
        self.errors.setdefault(program, []).append(f"{what}: {error}")


class Comparison:
    """Measures one model with several programs."""

    def __init__(self, options: argparse.Namespace, model: str) -> None:
        self.options, self.model, self.found = options, model, Found()
        self.pythons = {**peer_pythons(options.peer_python), "relaxlm": sys.executable}
        for form in PEERS:
            installed = environment_python(options.cache, form)
            if form not in self.pythons and installed.exists():
                self.pythons[form] = str(installed)
        self.folders: dict[str, Path] = {}
        self.workers: dict[str, Worker] = {}

    def run(self) -> None:
        names = [name for name in self.options.only if self._prepare(name)]
        if "start" in self.options.cases:
            self._measure_starts(names)
            if not self.options.quick and "relaxlm" in names:
                self.found.compile_seconds = self._compile()
        read = self._start_read()
        try:
            for key, case in CASES.items():
                if key in self.options.cases:
                    self._measure(case, key, names, read)
        finally:
            for worker in (*self.workers.values(), read):
                worker.close()

    def _prepare(self, name: str) -> bool:
        """Make the model's form for a program; False if that, or the program, isn't possible."""
        form = PROGRAMS[name].form
        if form not in self.pythons:
            problem = WorkerError("no Python that has it: use --setup or --peer-python")
            self.found.fail(name, "install", problem)
            return False
        try:
            self.folders[name] = make(self.options.cache, self.model, form, self.pythons)
        except (subprocess.CalledProcessError, OSError) as error:
            self.found.fail(name, "conversion", WorkerError(str(error)))
            return False
        return True

    def _spawn(self, name: str) -> Worker:
        program, threads = PROGRAMS[name], str(self.options.threads)
        command = [self.pythons[program.form], str(program.script), "serve"]
        command += [str(self.folders[name].resolve()), threads, *program.arguments]
        worker = Worker(command, {"OMP_NUM_THREADS": threads}, self.options.limit)
        self.found.about[name] = worker.about
        return worker

    def _start_read(self) -> Worker:
        command = [sys.executable, str(SCRIPTS / "read_peer.py"), "serve", ""]
        return Worker([*command, str(self.options.threads)], {}, self.options.limit)

    def _measure_starts(self, names: list[str]) -> None:
        rounds = QUICK_LOAD_ROUNDS if self.options.quick else LOAD_ROUNDS
        samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
        for round in range(rounds + 1):
            for name in names:
                say(f"{self.model}: start of {name}, {round}/{rounds}")
                try:
                    worker = self._spawn(name)
                    try:
                        worker.ask(do="prefill", tokens=512)
                        first = time.perf_counter() - worker.started
                        peak = worker.ask(do="memory")["peak_bytes"]
                    finally:
                        worker.close()
                except WorkerError as error:
                    self.found.fail(name, "start", error)
                    continue
                if round:  # the first one reads the disk, and may compile
                    samples[name].append((worker.load_seconds, first, peak))
        for name, values in samples.items():
            if values:
                load, first, peak = (statistics.median(v) for v in zip(*values, strict=True))
                self.found.start[name] = {"load": load, "first_token": first, "peak_bytes": peak}

    def _compile(self) -> float:
        say(f"{self.model}: relaxlm compile")
        folder = self.folders["relaxlm"]
        output = folder.with_name("compiled.so")
        command = (sys.executable, "-m", "relaxlm", "compile", str(folder), "-o", str(output))
        start = time.perf_counter()
        subprocess.run((*command, "--device", "cpu"), check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        output.unlink()
        return seconds

    def _measure(self, case: Case, key: str, names: list[str], read: Worker) -> None:
        rounds = case.quick_rounds if self.options.quick else case.rounds
        seconds: dict[str, list[float]] = {name: [] for name in names}
        speeds: list[float] = []
        given_up: set[str] = set()
        self.found.seconds[key], self.found.read[key] = seconds, speeds
        # The first one makes the caches and finds everything cold; it counts if it is the only one.
        for round in range(0 if rounds > 1 else 1, rounds + 1):
            say(f"{self.model}: {case.name}, {round}/{rounds}")
            for name in names:
                if name in given_up:
                    continue
                try:
                    if name not in self.workers:
                        self.workers[name] = self._spawn(name)
                    self.workers[name].resume()
                    value = self.workers[name].ask(**case.request)["seconds"]
                    self.workers[name].pause()
                except WorkerError as error:
                    self.found.fail(name, case.name, error)
                    given_up.add(name)
                    if name in self.workers:
                        self.workers.pop(name).close()
                    continue
                if round:
                    seconds[name].append(value)
                    speeds.append(read.about["nbytes"] / read.ask(do="read")["seconds"])


def environment_python(cache: Path, peer: str) -> Path:
    scripts = "Scripts" if os.name == "nt" else "bin"
    return cache / "environments" / peer / scripts / "python"


def setup(cache: Path, peers: list[str]) -> None:
    """Install peers, each into an environment of its own; says which of them did not install."""
    for peer in peers:
        python = environment_python(cache, peer)
        subprocess.run((sys.executable, "-m", "venv", str(python.parents[1])), check=True)
        pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        for packages in INSTALL[peer]:
            say(f"installing {' '.join(packages)}")
            environment = {**os.environ, **INSTALL_ENVIRONMENT}
            if subprocess.run((*pip, *packages), env=environment).returncode:
                say(f"{peer} does not install here")
                break


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "relaxlm" / "compare"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listed = {
        "models": (list(MODELS), "models to measure"),
        "only": (list(PROGRAMS), "programs to measure"),
        "cases": (["start", *CASES], "what to measure"),
    }
    for name, (choices, text) in listed.items():
        parser.add_argument(
            f"--{name}",
            type=lambda given, choices=choices: _chosen(given, choices),
            default=choices,
            help=f"{text}, separated by commas: {', '.join(choices)}",
        )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--markdown", type=Path, help="file for the tables; default: printed")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="models and peers")
    parser.add_argument("--setup", action="store_true", help="install the peers first")
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="[PEER=]PYTHON",
        help="Python with a peer's packages, in place of the one that --setup installs; PEER is "
        f"one of {', '.join(PEERS)}, all of them if left out",
    )
    parser.add_argument("--limit", type=float, default=600, help="seconds per measurement")
    return parser.parse_args()


def _chosen(given: str, choices: list[str]) -> list[str]:
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in choices:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(choices)}")
    return names


def main() -> None:
    options = parse()
    if options.setup:
        setup(options.cache, [p for p in PEERS if any(PROGRAMS[n].form == p for n in options.only)])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended early"))
    results: dict[str, dict[str, Any]] = {}
    try:
        for model in options.models:
            comparison = Comparison(options, model)
            results[model] = vars(comparison.found)
            comparison.run()
    finally:  # interrupted, too: what was measured is not lost
        report(options, results)


def report(options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    cases = {key: (case.name, case.tokens) for key, case in CASES.items()}
    text = markdown(results, cases, options.threads)
    if options.markdown:
        options.markdown.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
