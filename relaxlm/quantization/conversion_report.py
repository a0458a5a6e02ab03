"""What a conversion did: sizes, time, memory, and the error of every parameter."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class ParameterError:
    """How far a stored parameter is from the checkpoint's values."""

    name: str
    shape: tuple[int, ...]
    stored_bytes: int
    max_abs: float
    relative_rms: float  # root mean square of the error, over that of the values


@dataclass(frozen=True)
class ConversionReport:
    """Sizes in bytes; `errors` in the order in which the parameters were written."""

    scheme: str
    source_bytes: int
    stored_bytes: int
    source_parameters: int
    shards: int
    seconds: float
    peak_memory: int | None  # of this process since it started; None where that is not known
    errors: tuple[ParameterError, ...]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales included, for each weight of the model."""
        return self.stored_bytes * 8 / self.source_parameters

    def worst(self, count: int = 5) -> list[ParameterError]:
        """The parameters with the largest relative error, largest first."""
        return sorted(self.errors, key=lambda error: (-error.relative_rms, error.name))[:count]

    def to_json(self) -> str:
        """Everything, the error of every parameter included."""
        return json.dumps({**asdict(self), "bits_per_weight": self.bits_per_weight}, indent=2)


def current_memory() -> int | None:
    """Bytes that this process has resident now; None where that is not known."""
    return _linux_status("VmRSS")


def peak_memory() -> int | None:
    """The most bytes that this process has had resident; None where that is not known."""
    peak = _linux_status("VmHWM")  # getrusage would count the parent process at its fork, too
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _linux_status(key: str) -> int | None:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
