"""The releases that relaxlm is built for, and the check that they are what is installed.

TVM's Python API, its Relax VM and the layout of compiled libraries change between releases, and
tvm-ffi 0.1.15.x ends in a segfault inside every Tensorize. So both packages are pinned exactly, and
a different one is an error before TVM is imported rather than a crash after.
"""

import sys
from functools import cache

from relaxlm.errors import VersionError

RELAXLM_VERSION = "0.1.0"  # pyproject.toml reads it from here

PINNED = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}


def installed_version(distribution: str) -> str | None:
    """The version of a distribution that is installed, or None; nothing of it is imported."""
    from importlib import metadata  # here: 30 ms, and the command line's help needs none of it

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def pip_command() -> str:
    """What to type to get the pinned releases into the running Python."""
    pins = " ".join(f"{name}=={version}" for name, version in PINNED.items())
    return f"{sys.executable} -m pip install {pins}"


def version_problems() -> list[str]:
    """One phrase for each pinned package that is missing or of another version."""
    problems = []
    for name, wanted in PINNED.items():
        found = installed_version(name)
        if found is None:
            problems.append(f"{name} is not installed, expected {wanted}")
        elif found != wanted:
            problems.append(f"{name} is {found}, expected {wanted}")
    return problems


@cache  # a failed check raises and is not remembered, so that installing the right release mends it
def check_versions() -> None:
    """Make sure that the installed TVM and tvm-ffi are the pinned ones. Call before importing TVM.

    Raises:
        VersionError: one of them is missing or of another version.
    """
    if problems := version_problems():
        raise VersionError(
            f"{'; '.join(problems)}: relaxlm {RELAXLM_VERSION} works with exactly these releases. "
            f"Install them with\n    {pip_command()}"
        )
