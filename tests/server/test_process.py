"""`relaxlm serve` as a process: its command line, signals, and what is left when it is killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from relaxlm.server.run import bind
from tests.server.serving import wait_until
from tests.tiny_model import TinyModel

START = "import sys; from relaxlm.cli.main import app; app(prog_name='relaxlm')"
LONG = {"prompt": "the cat", "max_tokens": 200, "stream": True, "temperature": 0}


class Serving:
    """A process, and what it has said so far."""

    def __init__(self, *arguments: str | Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, "serve", *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    @property
    def url(self) -> str:
        wait_until(lambda: "page: " in self.said or self.process.poll() is not None, 60)
        found = re.search(r"page: (\S+)/\n", self.said)
        assert found, self.said
        return found[1]

    def healthy(self) -> bool:
        try:
            return httpx.get(self.url + "/health").status_code == 200
        except httpx.TransportError:
            return False

    def ready(self) -> "Serving":
        wait_until(self.healthy)
        return self

    def ended(self) -> int:
        status = self.process.wait(120)  # starting takes long on a busy machine
        self._reader.join(10)
        return status


Start = Callable[..., Serving]


@pytest.fixture
def start() -> Iterator[Start]:
    made: list[Serving] = []

    def starter(*arguments: str | Path, **environment: str) -> Serving:
        made.append(Serving(*arguments, **environment))
        return made[-1]

    yield starter
    for one in made:
        one.process.kill()
        one.process.wait()
        assert one.process.stderr is not None
        one._reader.join(10)
        one.process.stderr.close()


@pytest.fixture
def local(tiny: TinyModel, start: Start) -> Serving:
    arguments = (tiny.folder, "--lib-path", tiny.library, "--port", "0", "--threads", "1")
    return start(*arguments, "--drain-seconds", "20").ready()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_end(local: Serving, sig: signal.Signals) -> None:
    with httpx.stream("POST", f"{local.url}/v1/completions", json=LONG) as response:
        parts = response.iter_text()
        text = next(parts)
        local.process.send_signal(sig)
        text += "".join(parts)
    assert text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in text
    assert local.ended() == 0
    assert local.said.rstrip().endswith("ended")


def test_a_second_signal_ends_at_once(local: Serving) -> None:
    body = {**LONG, "prompt": ["the cat"] * 60}
    with httpx.stream("POST", f"{local.url}/v1/completions", json=body, timeout=30) as response:
        parts = response.iter_raw()
        next(parts)
        local.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "shutting down" in local.said)
        local.process.send_signal(signal.SIGTERM)
        assert local.ended() == -signal.SIGTERM


def test_a_killed_server_leaves_its_port_and_its_cache_usable(
    tiny: TinyModel, start: Start, tmp_path: Path
) -> None:
    arguments = (tiny.folder, "--threads", "1", "--opt", "O1", "--api-key", "k")
    with bind("127.0.0.1", 0)[0] as free:
        port = free.getsockname()[1]
    headers = {"authorization": "Bearer k"}

    def answer(server: Serving) -> str:
        body = {**LONG, "stream": False, "max_tokens": 5}
        reply = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
        return reply.json()["choices"][0]["text"]

    texts = []
    for i in range(2):
        server = start(*arguments, "--port", str(port), RELAXLM_CACHE=str(tmp_path)).ready()
        assert ("compiling the library" in server.said) is (i == 0)
        texts.append(answer(server))
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=LONG, headers=headers
        ) as response:
            next(response.iter_raw())
            server.process.kill()
            assert server.ended() == -signal.SIGKILL
    assert texts[0] == texts[1]


def test_what_cannot_work_is_told_before_a_model_is_loaded(start: Start, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            ("--port", port): f"--port {port}: Address already in use",
            ("--host", "0.0.0.0"): "there is no API key: set RELAXLM_API_KEY",
            ("--mode", "fast"): "mode",
            ("--log-level", "loud"): "--log-level loud: expected one of debug",
            ("--host", "no.such.host.invalid"): "--host no.such.host.invalid",
        }
        servers = {case: start(tmp_path / "nothing", *case) for case in cases}
        for case, message in cases.items():
            assert servers[case].ended() == 1
            assert message in servers[case].said
            assert "nothing" not in servers[case].said


def test_options_of_compile_are_refused_beside_a_library(tiny: TinyModel, start: Start) -> None:
    server = start(tiny.folder, "--model-lib", tiny.library, "--opt", "O3", "--port", "0")
    assert server.ended() == 1 and "is compiled already" in server.said


def test_it_says_what_it_needs_and_how_it_is_called(local: Serving) -> None:
    url = local.url
    for expected in ("KV cache", f"API:  {url}/v1, model tiny-q0f32", f"curl {url}/v1/chat/"):
        assert expected in local.said
    # The command line that it prints is one that works.
    command = re.search(r"try:  curl (\S+) -H 'Content-Type: (\S+)' -d '(.*)'", local.said)
    assert command
    body = {**json.loads(command[3]), "max_tokens": 2}
    reply = httpx.post(command[1], json=body, headers={"content-type": command[2]})
    assert reply.json()["choices"][0]["finish_reason"] == "length"
    httpx.get(url + "/nowhere?x=1")
    wait_until(lambda: '"GET /nowhere?x=1 HTTP/1.1" 404' in local.said)
    assert "Hello" not in local.said.split("try: ")[1].split("\n", 1)[1]
