"""Compile a model's library on first use and keep it in the user's cache.

The only part of the runtime that knows the compiler, and it imports it only to compile. A cached
library is found by a digest of all that decides its content: configuration, scheme, target,
options, the pinned TVM and relaxlm's own code.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import relaxlm
from relaxlm.runtime.library import Library
from relaxlm.versions import PINNED, RELAXLM_VERSION, check_versions


def cache_folder() -> Path:
    """Where compiled libraries are kept: $RELAXLM_CACHE, or relaxlm in the user's cache folder."""
    if folder := os.environ.get("RELAXLM_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "relaxlm"


def library_for(
    folder: Path,
    device: str = "auto",
    overrides: str | None = None,
    progress: Callable[[str, float], None] = lambda stage, share: None,
) -> Library:
    """The library for a converted model folder, compiled now or earlier.

    Args:
        folder: with mlc-chat-config.json.
        device: as for `relaxlm compile --device`.
        overrides: as for `relaxlm compile --overrides`.
        progress: called with a stage's name and the share of the work done before it, only when
            the library is compiled now.

    Raises:
        RelaxLMError: as `compile_model` and `Library.load` raise.
    """
    check_versions()
    from relaxlm.compiler.request import CompileRequest

    request = CompileRequest.read(folder, device=device, overrides=overrides)
    path = cache_folder() / "libraries" / f"{_digest(request.identity())}{request.device.suffix}"
    if not path.is_file():
        request.compile(progress=progress).save(path)
    return Library.load(path)


def _digest(identity: dict) -> str:
    parts = {
        "request": identity,
        "versions": {"relaxlm": RELAXLM_VERSION, **PINNED},
        "code": _code_digest(),
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _code_digest() -> str:
    """Of the sources that decide what a library contains; they change without a new version."""
    package = Path(relaxlm.__file__).parent
    digest = hashlib.sha256()
    for part in ("models", "quantization", "compiler", "runtime/metadata.py"):
        source = package / part
        for file in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
