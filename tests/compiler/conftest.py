"""A library with versions for several CPUs, compiled once for those who look at it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from relaxlm.compiler.platforms import portable_levels, this_platform
from relaxlm.compiler.target import resolve_device
from relaxlm.runtime import cpu
from tests.tiny_model import CONFIG as TINY
from tests.tiny_model import checkpoint_weights, convert, write_checkpoint

if TYPE_CHECKING:
    from relaxlm.runtime.metadata import LibraryMetadata

# AVX-512's kernels multiply with rows of 128 numbers at least.
CONFIG = {**TINY, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
# Of a step, and a cache that rounds nothing.
LIMITS = "prefill_chunk_size=64;max_batch_size=4;kv_cache_dtype=float32"


@dataclass(frozen=True)
class Portable:
    """A tiny model's weights in 4 bits, and its library.

    Attributes:
        weights: those of its checkpoint, by name.
        versions: their names, from the plainest on.
        metadata: what compiling said of the library.
        stages: what it told of its progress, with the share of the work done before each.
    """

    weights: dict[str, np.ndarray]
    folder: Path
    library: Path
    versions: tuple[str, ...]
    metadata: LibraryMetadata
    stages: list[tuple[str, float]]


@pytest.fixture(scope="session")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Portable:
    """Two versions, and of the others those that run here."""
    from relaxlm.compiler.request import CompileRequest

    names = portable_levels(this_platform())
    if not names:
        pytest.skip(f"no levels of {cpu.architecture()}")
    runs = [not cpu.missing_features(resolve_device("cpu", name).cpu_features) for name in names]
    chosen = [name for i, (name, here) in enumerate(zip(names, runs, strict=True)) if i < 2 or here]
    place = tmp_path_factory.mktemp("portable")
    weights = checkpoint_weights(config=CONFIG)
    folder = convert(
        write_checkpoint(place / "source", weights, config=CONFIG),
        place / "tiny-q4f16_1",
        "q4f16_1",
    )
    library = place / f"portable{this_platform().suffixes[0]}"
    request = CompileRequest.read(folder, None, "cpu", ",".join(chosen), LIMITS, "O1")
    stages: list[tuple[str, float]] = []

    def progress(stage: str, share: float) -> None:
        stages.append((stage, share))

    compiled = request.compile(progress=progress)
    compiled.save(library, progress)
    return Portable(weights, folder, library, tuple(chosen), compiled.metadata, stages)
