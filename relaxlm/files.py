"""What the readers of weight files share: Git LFS pointers, JSON and sizes in words."""

import json
from pathlib import Path
from typing import Any

from relaxlm.errors import RelaxLMError

_LFS_MAGIC = b"version https://git-lfs"


def refuse_lfs_pointer(path: Path, error: type[RelaxLMError], what: str = "weights") -> None:
    """Raise `error` if a file is the few lines that Git LFS puts in the place of a large file."""
    with path.open("rb") as file:
        if file.read(len(_LFS_MAGIC)) != _LFS_MAGIC:
            return
    raise error(
        f"{path} is a Git LFS pointer, not {what} ({path.stat().st_size} bytes): "
        f"run `git lfs pull` in {path.parent}, or download the file again"
    )


def read_json_object(path: Path, error: type[RelaxLMError], what: str) -> dict[str, Any]:
    """The JSON object in a file; `what` says in messages what the file should be."""
    refuse_lfs_pointer(path, error, what)
    try:
        value = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as reason:
        raise error(
            f"{path}: not valid JSON ({reason}), expected {what}; download or write it again"
        ) from None
    if not isinstance(value, dict):
        raise error(f"{path}: holds a JSON {type(value).__name__}, expected {what}")
    return value


def format_bytes(count: float) -> str:
    """A size in words, in units of 1000: "4.52 GB"."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5 or unit == "GB":
            break
    return f"{count:.3g} {unit}"
