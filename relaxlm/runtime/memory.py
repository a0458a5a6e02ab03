"""How much memory a machine has left."""

import os
from pathlib import Path


def total_memory() -> int | None:
    """Bytes of the machine; None where the system doesn't tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def available_memory() -> int | None:
    """Bytes that new work may take without swapping; None where the system doesn't tell."""
    try:
        text = Path("/proc/meminfo").read_text()
        [available] = [line.split()[1] for line in text.splitlines() if "MemAvailable" in line]
        return int(available) * 1024
    except (OSError, ValueError):
        return None
