"""Texts in, vectors out: the files of `relaxlm embed`."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from relaxlm.errors import ConfigError


def read_lines(path: Path | None) -> Iterator[str]:
    """The lines of a file, or of standard input as they come (None, or "-").

    Raises:
        OSError: the file cannot be read; at once, not when the first line is asked for.
    """
    if path is None or str(path) == "-":
        return _lines(sys.stdin)
    text = path.read_text(encoding="utf-8", errors="replace")
    return _lines(text.removesuffix("\n").split("\n") if text else [])


def _lines(lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        # Some editors put a byte-order mark at the start of a file.
        yield (line.removeprefix("\ufeff") if number == 0 else line).rstrip("\r\n")


class Output(Protocol):
    def write(self, texts: list[str], vectors: np.ndarray) -> None:
        """Add some texts and their vectors [texts, numbers]."""


@contextmanager
def open_output(path: Path | None) -> Iterator[Output]:
    """Where vectors go: standard output, or a file that appears when all of them are there.

    Raises:
        ConfigError: another kind of file than *.npy and *.jsonl.
    """
    if path is None:
        yield _JsonLines(sys.stdout)
        return
    if path.suffix not in (".npy", ".jsonl"):
        raise ConfigError(f"{path}: expected a name that ends in .npy or .jsonl")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".jsonl":
            with temporary.open("w", encoding="utf-8") as file:
                yield _JsonLines(file)
        else:
            array = _Array()
            yield array
            with temporary.open("wb") as binary:
                np.save(binary, np.concatenate(array.parts))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _JsonLines:
    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def write(self, texts: list[str], vectors: np.ndarray) -> None:
        for text, vector in zip(texts, vectors, strict=True):
            # As short as float32 numbers can be told apart.
            numbers = ", ".join(map(str, vector))
            self.stream.write(f'{{"text": {json.dumps(text, ensure_ascii=False)}, ')
            self.stream.write(f'"embedding": [{numbers}]}}\n')
        self.stream.flush()


class _Array:
    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []

    def write(self, texts: list[str], vectors: np.ndarray) -> None:
        self.parts.append(vectors)
