"""Reading and writing files of model folders: Git LFS pointers, text, JSON; sizes in words."""

import json
import os
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


def read_bytes(path: Path, error: type[RelaxLMError]) -> bytes:
    """The file's content.

    Raises:
        error: the file is not there or cannot be read, or is a Git LFS pointer, which is what a
            clone without LFS leaves in place of a large file.
    """
    try:
        refuse_lfs_pointer(path, error, path.name)
        return path.read_bytes()
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror}") from reason


def decode_text(content: bytes, where: str | Path, error: type[RelaxLMError]) -> str:
    """UTF-8 text, without a byte-order mark.

    Raises:
        error: not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(
            f"{where}: byte {reason.start} is not UTF-8 text. Is the file complete?"
        ) from reason


def read_text(path: Path, error: type[RelaxLMError]) -> str:
    """The text in a file. Raises as read_bytes and decode_text do."""
    return decode_text(read_bytes(path, error), path, error)


def parse_json(content: bytes, where: str | Path, error: type[RelaxLMError]) -> Any:
    """What the JSON in a file's content says.

    Raises:
        error: not UTF-8, or not JSON.
    """
    text = decode_text(content, where, error)
    try:
        return json.loads(text)
    except json.JSONDecodeError as reason:
        raise error(
            f"{where}: not valid JSON: {reason.msg} at line {reason.lineno}, column "
            f"{reason.colno}. Is the file complete?"
        ) from reason
    except RecursionError as reason:
        raise error(f"{where}: the JSON is nested too deeply to be read") from reason


def parse_json_object(
    content: bytes, where: str | Path, error: type[RelaxLMError]
) -> dict[str, Any]:
    """The JSON object in a file's content.

    Raises:
        error: not UTF-8, not JSON, or JSON that is not an object.
    """
    value = parse_json(content, where, error)
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, found {_kind(value)}")
    return value


def read_json(path: Path, error: type[RelaxLMError]) -> Any:
    """What a JSON file says. Raises as read_bytes and parse_json do."""
    return parse_json(read_bytes(path, error), path, error)


def read_json_object(path: Path, error: type[RelaxLMError]) -> dict[str, Any]:
    """The JSON object in a file. Raises as read_bytes and parse_json_object do."""
    return parse_json_object(read_bytes(path, error), path, error)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    kinds: dict[type, str] = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
    }
    return kinds[type(value)]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that `path` is at every moment either as before or complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def json_bytes(value: object, indent: int | None = 2) -> bytes:
    """JSON as it is written into model folders: readable, UTF-8, one newline at the end."""
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode("utf-8")


def format_bytes(count: float) -> str:
    """A size in words, in units of 1000: "4.52 GB"."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5 or unit == "GB":
            break
    return f"{count:.3g} {unit}"


def cache_folder() -> Path:
    """Where libraries and tunings are kept: $RELAXLM_CACHE, or relaxlm in the user's cache."""
    if folder := os.environ.get("RELAXLM_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "relaxlm"
