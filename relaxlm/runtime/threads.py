"""How many threads kernels run on.

TVM's own default is half of the logical processors on x86, right where every core has two of them
and wrong in most virtual machines. The number is read at the first parallel kernel of a thread.

The thread that runs a step works, too; the others are pinned to a core each and, between kernels,
wait in a loop, which wakes them within a microsecond (parked threads take four, measured). They
park themselves after some hundred thousand rounds, about 50 ms without work.
"""

import os
from pathlib import Path

from relaxlm.errors import ConfigError
from relaxlm.runtime import tvm_runtime

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


def set_threads(count: int | None = None) -> None:
    """Let kernels run on `count` threads; None: what TVM_NUM_THREADS says, or one per usable core.

    Before a process's first kernel any number will do; afterwards the threads that there are can
    only be used in part.

    Raises:
        ConfigError: fewer than one.
    """
    if count is None:
        os.environ.setdefault(VARIABLE, str(usable_cores()))
        return
    if count < 1:
        raise ConfigError(f"threads = {count}, expected 1 or more")
    os.environ[VARIABLE] = str(count)
    tvm_runtime.use_threads(count)
