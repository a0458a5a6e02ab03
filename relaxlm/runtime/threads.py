"""How many threads kernels run on.

TVM's own default is half of the logical processors on x86, right where every core has two of them
and wrong in most virtual machines. The number is read once, at the first parallel kernel of a
process.
"""

import os
from pathlib import Path

VARIABLE = "TVM_NUM_THREADS"


def usable_cores() -> int:
    """Physical cores that this process may run on; logical ones where the system doesn't tell."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    usable = affinity(0) if affinity else set(range(os.cpu_count() or 1))
    cores = set()
    for processor in usable:
        topology = Path(f"/sys/devices/system/cpu/cpu{processor}/topology")
        try:
            parts = ("physical_package_id", "core_id")
            cores.add(tuple((topology / part).read_text() for part in parts))
        except OSError:
            return len(usable)
    return len(cores)


def set_default_threads() -> None:
    """Make TVM use one thread per usable core, unless the user said otherwise."""
    os.environ.setdefault(VARIABLE, str(usable_cores()))
