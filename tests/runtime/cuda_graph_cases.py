"""What test_cuda_graphs.py runs in a process of its own, with the stand-in for NVIDIA's libraries.

TVM's own CUDA runtime runs here, and a library that was written to a file and loaded: only what is
below the driver's functions is not real.
"""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relaxlm import Engine
from relaxlm.compiler.request import CompileRequest
from relaxlm.errors import LibraryError
from relaxlm.runtime import cuda, tvm_runtime
from relaxlm.runtime.cuda_graphs import CudaGraphs
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.library import Library
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.params import WeightFolder
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.step_tables import BatchTables
from tests.compiler import fake_cuda
from tests.numpy_llama import llama_logits
from tests.reference import relative_error
from tests.tiny_model import CONFIG as TINY
from tests.tiny_model import VOCAB, TinyModel

PAGES = 64
CONFIG = {
    **TINY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
IDS = np.random.default_rng(7).integers(0, VOCAB, 400).astype("int32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel.make(tmp_path_factory.mktemp("model"), CONFIG)


@pytest.fixture(scope="module")
def library(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Library:
    assert [gpu.name for gpu in cuda.gpus()] == ["Fake GPU"]
    folder = tmp_path_factory.mktemp("library")
    request = CompileRequest.read(
        model.folder, device="cuda:sm_80", opt="cuda_graph=1", overrides="max_batch_size=7"
    )
    with fake_cuda.kernels_on_the_cpu(folder):
        request.compile().save(folder / "model.so")
    library = Library.load(folder / "model.so")
    # Steps of replies have buffers for a batch of tokens, not for a chunk of a prompt.
    temporary = library.metadata.memory.temporary
    assert 0 < temporary["decode"] < temporary["forward"] / 4
    assert library.metadata.step_bytes == temporary["decode"] + temporary["forward"]
    return library


class Session:
    """An executor, its sequences, and the tokens that each of them has."""

    def __init__(self, library: Library, model: TinyModel) -> None:
        self.model = model
        self.executor = Executor(library, WeightFolder(model.folder), PAGES)
        assert self.executor._decode is not None
        self.decode = self.executor._decode
        self.graphs = self.decode.graphs
        self.sequences = PagedSequences(PagePool(PAGES), 16)
        self.texts: dict[int, list[int]] = {}
        self._tokens = itertools.cycle(IDS.tolist())

    def step(self, *parts: tuple[int, int]) -> np.ndarray:
        """Append so many tokens to sequences; the logits of each one's last, [b, vocab]."""
        ids = [[next(self._tokens) for _ in range(count)] for _, count in parts]
        for (seq, _), new in zip(parts, ids, strict=True):
            self.texts.setdefault(seq, []).extend(new)
        tables = self.sequences.batch(list(parts))
        self.executor.copy_pages(*self.sequences.take_copies())
        flat = np.array([token for new in ids for token in new], np.int32)
        rows = tables.row_offsets[1:] - 1
        logits = self.executor.forward(tables, flat, rows).copy()
        if len(flat) > len(rows):
            return logits
        np.testing.assert_array_equal(logits, self.launched_one_by_one(tables, flat, rows))
        return logits

    def fork(self, seq: int) -> int:
        new = self.sequences.fork(seq)
        self.texts[new] = list(self.texts[seq])
        return new

    def launched_one_by_one(
        self, tables: BatchTables, ids: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """The logits of `forward`: to run a step again changes nothing in the pages."""
        executor = self.executor
        # So many parts has attention.
        tables = tables._replace(page_ids=self.decode._padded(tables.page_ids))
        inputs = executor._inputs((ids, *tables[: executor._tables], rows))
        return executor._forward(*inputs, *executor._cache, executor._params).numpy()

    def reference(self, seq: int) -> np.ndarray:
        return llama_logits(self.model.weights, CONFIG, np.array(self.texts[seq]))[-1]


@pytest.fixture
def session(library: Library, model: TinyModel) -> Iterator[Session]:
    yield Session(library, model)
    assert fake_cuda.counted("refused") == 0


def test_graphs_give_the_logits_of_single_launches(session: Session) -> None:
    """`Session.step` compares them."""
    a, b = session.sequences.add(), session.sequences.add()
    session.step((a, 29), (b, 45))
    before = fake_cuda.counted("graph launches")
    for _ in range(5):  # across the end of a page
        session.step((a, 1))
    assert fake_cuda.counted("graph launches") - before == 3
    with session.executor.without_graphs():
        session.step((a, 1))
    assert fake_cuda.counted("graph launches") - before == 3
    logits = session.step((a, 1))
    assert relative_error(logits[0], session.reference(a)) < 2e-6
    # Other batches: 3 and 7 pages, and 5 x 4 and 3 of them, for which attention has parts and a
    # second kernel, in an order that changes.
    others = [session.fork(b) for _ in range(4)]
    for turn in range(4):
        session.step((b, 1), (a, 1))
        batch = [a, b, *others][turn:] + [a, b, *others][:turn]
        logits = session.step(*((seq, 1) for seq in batch))
    for row, seq in zip(logits, batch, strict=True):
        assert relative_error(row, session.reference(seq)) < 2e-6
    keys = set(session.graphs._graphs)
    assert keys == {(1, 16), (2, 16), (6, 32)} and session.graphs.recorded == 3
    session.sequences.free(b)
    c = session.sequences.add()
    session.step((c, 20))  # in pages that were another's
    for _ in range(2):
        logits = session.step((c, 1), (a, 1))
    assert relative_error(logits[0], session.reference(c)) < 2e-6
    assert session.graphs.recorded == 3


def test_a_step_with_a_graph_takes_one_launch_and_one_copy(session: Session) -> None:
    a = session.sequences.add()
    tables, rows = session.sequences.batch([(a, 5)]), np.array([4], "int32")
    session.executor.forward(tables, IDS[:5], rows)
    seen = []
    for step in range(4):
        tables = session.sequences.batch([(a, 1)])
        names = ("launches", "graph launches", "copies", "allocations", "frees")
        before = [fake_cuda.counted(name) for name in names]
        session.executor.compute(tables, IDS[step : step + 1], rows - 4)
        after = [fake_cuda.counted(name) for name in names]
        seen.append([new - old for old, new in zip(before, after, strict=True)])
    launches = seen[0][0]
    assert launches > 8 * 2
    # The first runs, the second is recorded, too.
    assert seen[1:] == [[2 * launches, 0, 1, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 0, 0]]


def test_graphs_are_made_again_when_scratch_memory_has_moved(session: Session) -> None:
    a = session.sequences.add()
    session.step((a, 70))
    batch = [a, *(session.fork(a) for _ in range(3))]
    for _ in range(3):  # attention has parts
        session.step(*((seq, 1) for seq in batch))
    assert list(session.graphs._graphs) == [(4, 32)]
    device = session.executor.device
    before, frees = tvm_runtime.scratch_address(device), fake_cuda.counted("frees")
    # As a kernel with a longer prompt does.
    take, give_back = tvm_runtime._scratch_functions()
    give_back(2, 0, take(2, 0, 1 << 20, 1, 8))
    assert fake_cuda.counted("frees") == frees + 1
    assert tvm_runtime.scratch_address(device) != before
    for _ in range(3):  # the old graph would write to memory that is not there
        session.step(*((seq, 1) for seq in batch))
    assert session.graphs.recorded == 2
    # No kernel takes two such buffers: `scratch_address` knows one.
    allocations = fake_cuda.counted("allocations")
    first = take(2, 0, 1, 1, 8)
    assert fake_cuda.counted("allocations") == allocations
    second = take(2, 0, 1, 1, 8)
    assert fake_cuda.counted("allocations") == allocations + 1
    give_back(2, 0, second)
    give_back(2, 0, first)


REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},  # by sums of weights
    {"temperature": 0.9, "top_p": 0.9, "seed": 5},
]


def test_an_engine_writes_what_it_writes_on_a_cpu(library: Library, model: TinyModel) -> None:
    def replies(path: Path) -> list[str | None]:
        def ask(engine: Engine, i: int) -> str | None:
            messages = [{"role": "user", "content": "hi " * (i + 1)}]
            reply = engine.chat.completions.create(
                messages=messages, max_tokens=8, **REQUESTS[i % len(REQUESTS)]
            )
            return reply.choices[0].message.content

        with Engine(str(model.folder), model_lib=str(path)) as engine:
            with ThreadPoolExecutor(4) as threads:
                return list(threads.map(lambda i: ask(engine, i), range(4)))

    before = fake_cuda.counted("graph launches")
    assert replies(library.path) == replies(model.library)
    assert fake_cuda.counted("graph launches") > before


@pytest.fixture
def graphs() -> CudaGraphs:
    return CudaGraphs(tvm_runtime.device("cuda"), most=2)


def test_the_ones_used_last_are_kept(graphs: CudaGraphs) -> None:
    alive = fake_cuda.counted("graphs")
    for key in (0, 0, 1, 1, 0, 2, 2):
        graphs.run(key, lambda: None)
    assert list(graphs._graphs) == [0, 2]
    assert fake_cuda.counted("graphs") == alive + 2


@pytest.mark.parametrize("what", ["memory", "synchronisation"])
def test_a_step_that_cannot_be_recorded_is_an_error(graphs: CudaGraphs, what: str) -> None:
    device = graphs._device
    given = tvm_runtime.upload(np.arange(3), device)

    def step() -> Any:
        if what == "memory":
            return tvm_runtime.empty((3,), "int64", device)
        return tvm_runtime.download(given)

    refused = fake_cuda.counted("refused")
    graphs.run(0, step)
    with pytest.raises(LibraryError, match=r"could not be recorded .* Compile with --opt"):
        graphs.run(0, step)
    assert fake_cuda.counted("refused") == refused + 1 and len(graphs) == 0
    # The device is as it was.
    assert tvm_runtime.download(given).tolist() == [0, 1, 2]
