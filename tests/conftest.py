"""Fixtures for all tests. What is compiled is compiled once per run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.tiny_embedder import TinyEmbedder
    from tests.tiny_model import TinyModel


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
