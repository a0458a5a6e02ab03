"""Parameters of CPU kernels that depend on the machine: defaults, what `relaxlm tune` found, --opt.

    ahead       few rows of x: cpu_few_rows, cpu_narrow_rows
    task_rows   many rows of x: cpu_amx

A library is compiled for one `Tuning`: `use` makes it the current one while its kernels are
emitted, and `--opt "ahead=8192"` names it, in the library's metadata as on the command line.
"""

import functools
import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from relaxlm.errors import ConfigError
from relaxlm.files import write_atomically
from relaxlm.versions import RELAXLM_VERSION

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


@dataclass(frozen=True)
class Tuning:
    """
    Attributes:
        ahead: bytes between what a kernel reads and what it asks memory for.
        task_rows: rows of x that a task multiplies with the weights it has unpacked: more of them
            unpack less often, and need more of the cache.
    """

    ahead: int = 4096
    task_rows: int = 512

    def __post_init__(self) -> None:
        for name, step, most in (("ahead", 64, 1 << 16), ("task_rows", 32, 2048)):
            value = getattr(self, name)
            if not (isinstance(value, int) and step <= value <= most and value % step == 0):
                raise ConfigError(
                    f"{name} = {value}, expected a multiple of {step} from {step} to {most}"
                )

    def __str__(self) -> str:
        """What differs from the defaults, as in `--opt`: "ahead=8192;task_rows=512"."""
        return ";".join(f"{k}={v}" for k, v in asdict(self).items() if v != getattr(_DEFAULT, k))


_DEFAULT = Tuning()
NAMES = tuple(field.name for field in fields(Tuning))
_current: ContextVar[Tuning] = ContextVar("tuning", default=_DEFAULT)


def current() -> Tuning:
    """What kernels are to be emitted for."""
    return _current.get()


@contextmanager
def use(tuning: Tuning) -> Iterator[None]:
    """Emit kernels for a tuning."""
    token = _current.set(tuning)
    try:
        yield
    finally:
        _current.reset(token)


def cached(make: _Kernel) -> _Kernel:
    """`functools.cache` for functions that make kernels of the current tuning."""

    @functools.cache
    def for_tuning(tuning: Tuning, *arguments: Any, **options: Any) -> Any:
        return make(*arguments, **options)

    @functools.wraps(make)
    def for_current(*arguments: Any, **options: Any) -> Any:
        return for_tuning(current(), *arguments, **options)

    return for_current  # type: ignore[return-value]


def path(cache: Path) -> Path:
    """Where what was found on CPUs like this one is kept, in relaxlm's cache."""
    return cache / "tuning" / f"{re.sub('[^a-z0-9]+', '-', processor().lower()).strip('-')}.json"


def saved(cache: Path) -> Tuning:
    """What `relaxlm tune` of this release found on CPUs like this one; else the defaults.

    Raises:
        ConfigError: the file is damaged.
    """
    file = path(cache)
    try:
        found = json.loads(file.read_text("utf-8"))
        if found["relaxlm"] != RELAXLM_VERSION:  # its kernels were others
            return _DEFAULT
        return Tuning(**found["parameters"])
    except (FileNotFoundError, NotADirectoryError):
        return _DEFAULT
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise ConfigError(
            f"{file}: {error}; remove the file, or run `relaxlm tune` again"
        ) from None


def save(cache: Path, tuning: Tuning, measured: Any) -> Path:
    """Keep a tuning for CPUs like this one.

    Args:
        measured: what it rests on, for whoever reads the file.
    """
    file = path(cache)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "relaxlm": RELAXLM_VERSION,
        "processor": processor(),
        "parameters": asdict(tuning),
        "measured": measured,
    }
    write_atomically(file, json.dumps(content, indent=2).encode() + b"\n")
    return file


@functools.cache
def processor() -> str:
    """The model of this machine's CPU; by its numbers, too, as virtual machines hide its name."""
    keys = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    values = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    found = [values[key] for key in keys if key in values]
    return " ".join(found) or platform.processor() or f"{platform.machine()} {os.cpu_count()}"
