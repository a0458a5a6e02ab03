"""The packages that the JavaScript driver is built on, from npm, kept in the user's cache.

Their versions and checksums are those of a project's `package-lock.json`; none of their code is in
this repository.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from relaxlm.compiler.link import run_tool
from relaxlm.errors import ToolchainError
from relaxlm.files import cache_folder

DRIVER = Path(__file__).parent / "driver"
_DESCRIPTIONS = ("package.json", "package-lock.json")
_QUIET = ("--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")


def node_modules(project: Path = DRIVER) -> Path:
    """The folder `node_modules` of a project; npm fetches what is in it the first time.

    Args:
        project: a folder with package.json and package-lock.json.

    Raises:
        ToolchainError: there is no npm, or it failed.
    """
    contents = [(project / name).read_bytes() for name in _DESCRIPTIONS]
    folder = cache_folder() / "npm" / hashlib.sha256(b"\0".join(contents)).hexdigest()[:32]
    if not folder.is_dir():
        npm = shutil.which("npm")
        if npm is None:
            raise ToolchainError(
                "the JavaScript driver is built on packages from npm, and there is no program "
                "'npm'; install Node.js, for example with `apt install nodejs npm`"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".install-", dir=folder.parent) as place:
            made = Path(place) / "made"
            made.mkdir()
            for name, content in zip(_DESCRIPTIONS, contents, strict=True):
                (made / name).write_bytes(content)
            run_tool([npm, "ci", *_QUIET], "install the driver's packages", cwd=made)
            try:
                os.rename(made, folder)
            except OSError:  # another process was quicker
                if not folder.is_dir():
                    raise
    return folder / "node_modules"
