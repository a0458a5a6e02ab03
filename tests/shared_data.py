"""Real checkpoints, tokenizers and configurations beside some checkouts, for tests to use."""

import os
from pathlib import Path

import pytest

SHARED = Path(
    os.environ.get("RELAXLM_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)

needs_shared_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the folder of shared test data is not beside this checkout"
)
