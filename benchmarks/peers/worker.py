"""A runtime in a process of its own, as `compare.py` sees it."""

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


class WorkerError(Exception):
    """The runtime ended, hung, or says that it can't."""


class Worker:
    """A process that answers requests; see `protocol.py`.

    Attributes:
        about: what it said of itself when it was ready.
        started: when its process was started, by `time.perf_counter`.
        load_seconds: from its start until it was ready.
    """

    def __init__(self, command: list[str], environment: dict[str, str], limit: float) -> None:
        """Start the process and wait until the model is loaded.

        Args:
            environment: variables to set in addition to this process's own.
            limit: seconds that this, and every answer, may take.

        Raises:
            WorkerError: it ended, hung, or can't load the model.
        """
        self.limit = limit
        self._log = tempfile.TemporaryFile("w+")
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **environment},
            cwd=Path(__file__).parents[2],
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.about = self._answer()
        self.load_seconds = time.perf_counter() - self.started

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            WorkerError: it ended, hung, or answers that it can't.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended: the answer's absence says how
        return self._answer()

    def pause(self) -> None:
        """Keep its threads from spinning while another runtime is measured."""
        if hasattr(signal, "SIGSTOP") and self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        if hasattr(signal, "SIGCONT") and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self.limit)
        except queue.Empty:
            self.close()
            raise WorkerError(f"no answer within {self.limit:.0f} s") from None
        if not line:
            status = self._process.wait()
            reason = signal.Signals(-status).name if status < 0 else f"exit code {status}"
            self._log.seek(0)
            last = [text for text in self._log.read().splitlines() if text.strip()][-1:]
            raise WorkerError(f"ended with {reason}" + "".join(f": {text}" for text in last))
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer
