"""What `compare.py` asks of a runtime, and the loop in which a runtime's own process answers.

One JSON object per line. The process says {"ready": true, ...} when the model is loaded and the
first token could start, and then answers each request with {"seconds": ...} or {"error": ...}:

    {"do": "prefill", "tokens": n}              a prompt of n tokens, until its last token's logits
    {"do": "decode", "context": c, "batch": b, "steps": s}    one step of b sequences of c tokens
    {"do": "memory"}                            {"peak_bytes": ...}

Nothing here needs more than NumPy: it runs in every peer's own environment.
"""

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MAX_CONTEXT = 8192 + 64  # tokens of one sequence
MAX_BATCH_CONTEXT = 512  # of each of several


class Runtime(ABC):
    """A model and its cache. Token ids are int64 and made up; the best next one is always taken."""

    @abstractmethod
    def prefill(self, ids: np.ndarray) -> None:
        """Compute a prompt [n] from nothing, up to its best next token."""

    @abstractmethod
    def decode(self, ids: np.ndarray, steps: int) -> float:
        """Seconds of one of `steps` steps after prompts [batch, n], of one token per sequence."""


class StepRuntime(Runtime):
    """A runtime whose cache can go back to where it was, and that is called for every step."""

    def __init__(self) -> None:
        self._prepared: np.ndarray | None = None

    @abstractmethod
    def prepare(self, ids: np.ndarray) -> None:
        """Have the prompts [batch, n] in the cache, and nothing else."""

    @abstractmethod
    def rewind(self) -> None:
        """Forget the steps since `prepare`."""

    @abstractmethod
    def step(self, ids: np.ndarray) -> np.ndarray:
        """One token [batch] more per sequence; the best next ones, [batch]."""

    def forget(self) -> None:
        """Say that the cache no longer holds what `prepare` was asked for."""
        self._prepared = None

    def decode(self, ids: np.ndarray, steps: int) -> float:
        if self._prepared is None or not np.array_equal(self._prepared, ids):
            self.forget()
            self.prepare(ids)
            self._prepared = ids
        self.rewind()
        next_ids = self.step(ids[:, -1])  # not counted: it finds its code and threads asleep
        start = time.perf_counter()
        for _ in range(steps):
            next_ids = self.step(next_ids)
        return (time.perf_counter() - start) / steps


def kv_values(config: dict[str, Any]) -> int:
    """Numbers that the cache keeps of a token, by config.json with head_dim."""
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]


def serve(load: Callable[[], tuple[Runtime, int, dict[str, Any]]]) -> None:
    """Answer requests until input ends.

    Args:
        load: makes the runtime; returns it, the size of the vocabulary and what to say of it.
    """
    # What libraries print goes elsewhere: answers alone are in standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    try:
        runtime, vocab, about = load()
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        return
    answer(ready=True, **about)
    fresh = np.random.default_rng(0)  # no two prompts alike: what is cached of one helps no other
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "memory":
                answer(peak_bytes=peak_memory())
            elif request["do"] == "prefill":
                ids = fresh.integers(0, vocab - 8, request["tokens"])  # no special tokens
                start = time.perf_counter()
                runtime.prefill(ids)
                answer(seconds=time.perf_counter() - start)
            else:
                shape = (request["batch"], request["context"])
                ids = np.random.default_rng(1).integers(0, vocab - 8, shape)
                answer(seconds=runtime.decode(ids, request["steps"]))
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")


def peak_memory() -> int:
    """Bytes of memory that this process has had at most, mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
