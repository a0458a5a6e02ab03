"""Load a compiled library, and refuse one that does not fit this machine, TVM or relaxlm."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from relaxlm.errors import LibraryError
from relaxlm.runtime import cpu
from relaxlm.runtime.metadata import CONTRACT, LibraryMetadata
from relaxlm.versions import PINNED, RELAXLM_VERSION, check_versions

# First bytes of what a shared library can be: ELF, Mach-O (64 bit, universal), Windows.
_MAGIC = (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe", b"MZ")


class Library:
    """A compiled model, loaded.

    Attributes:
        path: the file, for messages.
        metadata: what it says of itself.
    """

    def __init__(self, module: Any, metadata: LibraryMetadata, path: Path) -> None:
        self.module, self.metadata, self.path = module, metadata, path

    @staticmethod
    def load(path: Path | str) -> "Library":
        """Load a library file and check that it can run here.

        Raises:
            LibraryError: not a library of relaxlm; made by another release; or made for a CPU
                or device that this machine lacks. No code of the model has run by then.
        """
        check_versions()
        path = Path(path)
        _check_file(path)
        import tvm
        from tvm.runtime import load_module
        from tvm.runtime.vm import VirtualMachine

        try:
            module = load_module(str(path))
            # The VM's byte code returns the text; no machine code of the model runs for it.
            text = str(VirtualMachine(module, tvm.cpu())["_metadata"]())
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise LibraryError(
                f"{path} is a shared library, but not one that relaxlm compiled: "
                f"{reason[-1] if reason else type(error).__name__}"
            ) from None
        metadata = _read_metadata(text, path)
        check_runs_here(metadata, path)
        return Library(module, metadata, path)


def check_runs_here(metadata: LibraryMetadata, path: Path | str) -> None:
    """Compare what a library needs with this machine and these packages.

    Raises:
        LibraryError: names the difference and the command that mends it.
    """
    again = "compile it again here: relaxlm compile FOLDER --device " + metadata.target.kind
    for package, version in {"relaxlm": RELAXLM_VERSION, **PINNED}.items():
        found = metadata.versions.get(package)
        if found != version:
            raise LibraryError(
                f"{path} was compiled with {package} {found}, this is {package} {version}; {again}"
            )
    if metadata.target.cpu != cpu.architecture():
        raise LibraryError(
            f"{path} was compiled for {metadata.target.cpu}, this machine is "
            f"{cpu.architecture()}; {again}"
        )
    missing = cpu.missing_features(metadata.target.cpu_features)
    if missing:
        raise LibraryError(
            f"{path} needs CPU features that this machine lacks: {', '.join(missing)}; {again}, "
            "or for many machines with --arch x86-64-v3"
        )


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise LibraryError(
            f"{path}: no such library; make it with `relaxlm compile FOLDER -o {path}`"
        )
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise LibraryError(f"{path} is a Git LFS pointer, not a library: run `git lfs pull`")
    if not start.startswith(_MAGIC):
        raise LibraryError(f"{path} is not a shared library (its first bytes are {start[:4]!r})")


def _read_metadata(text: str, path: Path) -> LibraryMetadata:
    raw = json.loads(text)
    if raw.get("contract") != CONTRACT:
        made_by = raw.get("versions", {}).get("relaxlm", "another program")
        raise LibraryError(
            f"{path} follows contract {raw.get('contract')} (made by relaxlm {made_by}), this "
            f"relaxlm {RELAXLM_VERSION} expects {CONTRACT}; compile it again"
        )
    try:
        return LibraryMetadata.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise LibraryError(
            f"{path}: its metadata is damaged at {place}: {problem['msg']}"
        ) from None
