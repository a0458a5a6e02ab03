"""PagedSequences under random traffic, against a model of plain lists."""

import random

import pytest

from relaxlm.runtime.cache_size import pages_per_sequence
from tests.runtime.sequence_model import Model, make, random_traffic


@pytest.mark.parametrize(
    ("pages", "page_size", "window", "sinks"),
    [
        (24, 1, 0, 0),
        (24, 4, 0, 0),
        (24, 16, 0, 0),
        (12, 1, 3, 2),
        (12, 4, 2, 0),
        (12, 4, 5, 0),
        (16, 4, 8, 4),
        (20, 4, 9, 5),
        (16, 3, 7, 1),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_random_traffic_reads_back_what_was_written(
    pages: int, page_size: int, window: int, sinks: int, seed: int
) -> None:
    rng = random.Random(f"{page_size} {window} {sinks} {seed}")
    model = Model(pages, page_size, window, sinks, most=6)
    seen = random_traffic(model, rng, 1000)
    assert {"too many", "no copy", "exhausted", "free", "fork"} <= seen
    assert page_size == 1 or {"copy", "abandoned with copies", "repeated"} <= seen
    assert not window or {"dropped", "left the window"} <= seen
    assert page_size == 1 or "adopted" in seen
    assert "adopted full pages" in seen
    for seq in list(model.tokens):
        model.table.free(seq)
    while model.cache:
        model.evict(0)
    model.table.check()
    assert model.table.pool.free == pages


@pytest.mark.parametrize(
    ("tokens", "chunk", "page_size", "window", "sinks"),
    [(50, 7, 4, 0, 0), (100, 1, 4, 9, 3), (100, 7, 4, 9, 3), (6, 7, 4, 9, 3), (100, 30, 4, 5, 0)],
)
def test_pages_per_sequence_is_the_most_that_traffic_needs(
    tokens: int, chunk: int, page_size: int, window: int, sinks: int
) -> None:
    most = 0
    for seed in range(200):
        rng = random.Random(seed)
        table, seq = make(100, page_size, window=window, sinks=sinks)
        while (length := table.length(seq)) < tokens:
            table.append(seq, min(rng.choice([1, chunk]), tokens - length))
            most = max(most, len(table.pages(seq)))
    assert most == pages_per_sequence(tokens, chunk, page_size, window, sinks)
