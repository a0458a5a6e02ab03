"""Compile a model's library on first use and keep it in the user's cache.

The only part of the runtime that knows the compiler, and it imports it only for a folder that it
has not seen. A cached library is named by a digest of all that decides its content: configuration,
scheme, target, options, the pinned TVM and relaxlm's own code. To work that out takes the models
and TVM, a second; so the names are kept, too, under a digest of the files and arguments as given.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

import relaxlm
from relaxlm.errors import CompileError, ConfigError, LibraryError
from relaxlm.files import cache_folder, write_atomically
from relaxlm.runtime import gpu
from relaxlm.runtime.library import Library
from relaxlm.versions import PINNED, RELAXLM_VERSION, check_versions


def library_for(
    folder: Path,
    device: str = "auto",
    overrides: str | None = None,
    progress: Callable[[str, float], None] = lambda stage, share: None,
    opt: str | None = None,
) -> Library:
    """The library for a converted model folder, compiled now or earlier.

    One that does not load, such as a damaged file, is compiled again.

    Args:
        folder: with mlc-chat-config.json.
        device: as for `relaxlm compile --device`.
        overrides: as for `relaxlm compile --overrides`.
        progress: called with a stage's name and the share of the work done before it, only when
            the library is compiled now.
        opt: as for `relaxlm compile --opt`.

    Raises:
        RelaxLMError: as `compile_model` and `Library.load` raise.
        CompileError: nothing can be written to the cache's folder.
        ConfigError: a device whose libraries do not run in Python.
    """
    check_versions()
    from relaxlm.compiler.target import resolve_device

    target = resolve_device(device)
    platform = target.platform
    if not platform.is_here:
        raise ConfigError(
            f"device '{device}' is for {platform.name}, and nothing runs for it here: use cpu or "
            f"cuda, or `relaxlm compile --device {device}` (docs/targets.md)"
        )
    if target.kind in gpu.PLAIN_GPUS and (reason := gpu.why_missing(target.kind)):
        raise ConfigError(
            f"device '{device}': {reason}. Use cpu, or `relaxlm compile --device {device}` for "
            "another machine (docs/targets.md)"
        )
    libraries, seen = cache_folder() / "libraries", _seen(folder, device, overrides, opt)
    if seen is not None and seen.is_file():
        with suppress(LibraryError):
            return Library.load(libraries / seen.read_text("utf-8"))
    from relaxlm.compiler.request import CompileRequest

    request = CompileRequest.read(folder, device=device, overrides=overrides, opt=opt)
    path = libraries / f"{_digest(request.identity())}{request.device.suffix}"
    library = None
    if path.is_file():
        with suppress(LibraryError):
            library = Library.load(path)
    if library is None:
        _check_writable(libraries)
        request.compile(progress=progress).save(path)
        library = Library.load(path)
    _remember(seen, path.name)
    return library


def keep(library: Path, folder: Path, device: str = "auto", overrides: str | None = None) -> None:
    """Copy a library that was compiled for a folder to where `library_for` finds it.

    A cache that cannot be written stays as it is.
    """
    from relaxlm.compiler.request import CompileRequest

    request = CompileRequest.read(folder, device=device, overrides=overrides)
    name = f"{_digest(request.identity())}{request.device.suffix}"
    libraries = cache_folder() / "libraries"
    with suppress(OSError):
        libraries.mkdir(parents=True, exist_ok=True)
        write_atomically(libraries / name, library.read_bytes())
        _remember(_seen(folder, device, overrides, None), name)


def _remember(seen: Path | None, name: str) -> None:
    if seen is not None:
        with suppress(OSError):  # the cache is full or cannot be written: slower next time
            seen.parent.mkdir(exist_ok=True)
            write_atomically(seen, name.encode())


def target_kind(device: str) -> str:
    """What a library for `device` runs on: one of `compiler.target.KINDS`.

    Raises:
        ConfigError: no such device.
    """
    from relaxlm.compiler.target import resolve_device

    return resolve_device(device).kind


def _seen(folder: Path, device: str, overrides: str | None, opt: str | None) -> Path | None:
    """Where the name of a folder's library is kept; None if the folder has no configuration."""
    # Neither imports TVM.
    from relaxlm.compiler.kernels.tuning import saved
    from relaxlm.compiler.target import resolve_device

    files = [Path(folder) / name for name in ("mlc-chat-config.json", "config.json")]
    texts = [file.read_bytes().hex() for file in files if file.is_file()]
    if not texts:
        return None
    target = [version.describe() for version in resolve_device(device).versions]
    tuning = str(saved(cache_folder()))
    identity = {
        "files": texts,
        "tuning": tuning,
        "target": target,
        "overrides": overrides,
        "opt": opt,
    }
    return cache_folder() / "seen" / _digest(identity)


def _check_writable(folder: Path) -> None:
    """Before the long work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CompileError(
            f"{folder}: the compiled library cannot be kept there ({error.strerror}); set "
            "RELAXLM_CACHE to a folder that can be written, or name a library with --model-lib"
        ) from None


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
