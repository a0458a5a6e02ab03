"""Fixtures for all tests, and how tests are spread over processes.

What is compiled is compiled once per process. `make test` runs as many processes as the machine can
take; a file's tests all run in the same one.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.tiny_embedder import TinyEmbedder
    from tests.tiny_model import TinyModel

# What a process takes that has imported torch and TVM and compiled models.
PROCESS_BYTES = 3 << 30
# Folders whose files take minutes: at the end of a run, no process should wait for another's.
SLOW = ("models", "compiler", "cli", "web")
# Tests that make things for all of a machine, or measure it: one process runs all of these.
ALONE = ("tests/web/", "tests/compiler/web/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many processes `-n auto` means: one per core, as far as there is memory for them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return min(cores or 1, 4)
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    processes = min(cores or 1, free // PROCESS_BYTES)
    return processes if processes > 1 else 0  # in this process


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            alone = next((name for name in ALONE if nodeid.startswith(name)), None)
            return "alone" if alone else super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Threads of several processes must not be bound to the same cores, nor wait in loops.
        os.environ.setdefault("TVM_BIND_THREADS", "0")
        os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folders = [Path(__file__).parent / name for name in SLOW]

    def place(item: pytest.Item) -> int:
        return next((i for i, at in enumerate(folders) if at in item.path.parents), len(folders))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """What is there by now stays: the garbage collector need not look at it time and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For tests and the processes they start: two threads at most, and an empty cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_NUM_THREADS", "2")
        patch.setenv("RELAXLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny random llama, converted and compiled."""
    from tests.tiny_model import TinyModel

    return TinyModel.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> TinyEmbedder:
    """A tiny random BERT as a sentence-transformers folder, converted and compiled."""
    from tests.tiny_embedder import TinyEmbedder

    return TinyEmbedder.make(tmp_path_factory.mktemp("encoder"), "bert")


@pytest.fixture(scope="session")
def tiny_embedder(tmp_path_factory: pytest.TempPathFactory) -> TinyEmbedder:
    """The same of a Qwen3 without head."""
    from tests.tiny_embedder import TinyEmbedder

    return TinyEmbedder.make(tmp_path_factory.mktemp("embedder"), "qwen3")


@pytest.fixture(scope="session")
def hybrid_tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny random model with a recurrent layer and one that attends."""
    from tests.tiny_model import HYBRID, TinyModel

    return TinyModel.make(tmp_path_factory.mktemp("hybrid"), HYBRID)


@pytest.fixture(scope="session")
def recurrent_tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """One with recurrent layers alone."""
    from tests.tiny_model import RECURRENT, TinyModel

    return TinyModel.make(tmp_path_factory.mktemp("recurrent"), RECURRENT)
