"""Bytes and operations of a step, counted a second way."""

import dataclasses

import pytest

from relaxlm.profiling.work import Work
from relaxlm.runtime.library import Library
from relaxlm.runtime.metadata import LibraryMetadata
from tests.tiny_model import CONFIG, VOCAB, TinyModel

HIDDEN, MID, LAYERS, Q_HEADS, KV_HEADS, DIM = 64, 96, 2, 4, 2, 16
LAYER = HIDDEN * ((Q_HEADS + 2 * KV_HEADS) * DIM + Q_HEADS * DIM + 3 * MID)


@pytest.fixture(scope="module")
def info(tiny: TinyModel) -> LibraryMetadata:
    return Library.load(tiny.library).metadata


def test_work_of_a_llama(info: LibraryMetadata) -> None:
    norms = HIDDEN * (2 * LAYERS + 1)
    assert Work.of(info) == Work(
        weight_bytes=4 * (LAYERS * LAYER + VOCAB * HIDDEN + norms),  # the embedding isn't the head
        layer_weights=LAYERS * LAYER,
        head_weights=VOCAB * HIDDEN,
        cache_bytes=LAYERS * 2 * KV_HEADS * DIM * 4,
        state_bytes=0,
        pair_operations=LAYERS * Q_HEADS * DIM * 4,
        scan_operations=0,
    )


def test_a_tied_embedding_is_read(info: LibraryMetadata) -> None:
    raw = {**CONFIG, "tie_word_embeddings": True}
    params = [param for param in info.params if not param.name.startswith("lm_head")]
    size = info.memory.params - 4 * VOCAB * HIDDEN
    memory = info.memory.model_copy(update={"params": size})
    changes = {"model_config_json": raw, "params": params, "memory": memory}
    tied = Work.of(info.model_copy(update=changes))
    assert tied == dataclasses.replace(Work.of(info), weight_bytes=size)


def test_operations_pair_by_pair(info: LibraryMetadata) -> None:
    work = Work.of(info)
    pairs = sum(1 for query in range(5, 8) for key in range(8) if key <= query)
    matrices = 2 * (3 * work.layer_weights + 2 * work.head_weights)
    assert work.operations(3, 5, 2) == matrices + pairs * work.pair_operations
    assert work.decode_bytes(7, 2) == work.weight_bytes + 14 * work.cache_bytes
