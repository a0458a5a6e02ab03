"""Libraries that hold several versions of a model's code, for CPUs with more and fewer extensions.

Such a library is an ordinary one for the plainest of its CPUs, whose read-only data hold complete
libraries for the others, compressed:

    MAGIC   16 bytes, found wherever the linker has put them
    size    of the index, uint32, and its CRC-32, uint32, both little-endian
    index   JSON: the versions from the plainest to the best, each with its name, the extensions
            that it needs, the bytes that it takes here, and the SHA-256 of the unpacked library;
            the first is the file itself, and takes none
    libraries, compressed with zlib, in the order of the index

Reading needs no loader of the operating system, so it can be checked before anything is mapped. An
unpacked library is loaded from memory on Linux, else from a file in relaxlm's cache.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relaxlm.errors import LibraryError
from relaxlm.files import cache_folder, write_atomically
from relaxlm.runtime import cpu, tvm_runtime

# Names the version to load, for tests and comparisons.
VARIABLE = "RELAXLM_CPU_VERSION"
# Half of a digest of a sentence that nothing else contains.
MAGIC = hashlib.sha256(b"versions of a library of relaxlm, from the plainest CPU on").digest()[:16]
_HEADER = struct.Struct("<II")


@dataclass(frozen=True)
class Version:
    """What the index says of one, and where it is.

    Attributes:
        name: as `--arch` names it: a level of `compiler/platforms.py`, a processor, or "native".
        cpu_features: LLVM's names of the extensions that it may use.
        size: bytes that it takes, compressed; 0 for the file itself.
        sha256: of the library, in hexadecimal digits; "" for the file itself.
        offset: of its first byte in the file.
    """

    name: str
    cpu_features: tuple[str, ...]
    size: int = 0
    sha256: str = ""
    offset: int = 0

    @property
    def missing(self) -> tuple[str, ...]:
        """Extensions that this machine lacks."""
        return cpu.missing_features(self.cpu_features)


def pack(plainest: Version, others: Sequence[tuple[Version, bytes]]) -> bytes:
    """What the plainest library carries.

    Args:
        others: from the second plainest to the best, with their files' contents.
    """
    index, parts = [{"name": plainest.name, "cpu_features": plainest.cpu_features}], list[bytes]()
    for version, library in others:
        parts.append(zlib.compress(library, 9))
        entry: dict[str, Any] = {"name": version.name, "cpu_features": version.cpu_features}
        entry |= {"size": len(parts[-1]), "sha256": hashlib.sha256(library).hexdigest()}
        index.append(entry)
    text = json.dumps(index).encode()
    return b"".join([MAGIC, _HEADER.pack(len(text), zlib.crc32(text)), text, *parts])


def read_index(path: Path) -> list[Version]:
    """The versions in a library's file, from the plainest to the best.

    Raises:
        LibraryError: the file does not have them whole.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(MAGIC) + len(MAGIC)
        if start < len(MAGIC):
            raise _damaged(path, "their index is not there")
        begin = start + _HEADER.size
        if begin > len(content):
            raise _damaged(path, "the file ends in their index")
        size, checksum = _HEADER.unpack(content[start:begin])
        text = content[begin : begin + size]
        if len(text) < size or zlib.crc32(text) != checksum:
            raise _damaged(path, "their index is not what was written")
        versions, offset = [], begin + size
        for entry in json.loads(text):
            entry["cpu_features"] = tuple(entry["cpu_features"])
            versions.append(Version(**entry, offset=offset))
            offset += versions[-1].size
        if offset > len(content):
            raise _damaged(path, f"the file has {len(content)} bytes, expected at least {offset}")
    return versions


def choose(versions: Sequence[Version], path: Path) -> Version:
    """The best version that can run here, or the one that `VARIABLE` names.

    Where none can run, the plainest, which needs least.

    Raises:
        LibraryError: the variable names one that is not there, or that cannot run here.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return next((one for one in reversed(versions) if not one.missing), versions[0])
    refuse_other_versions([version.name for version in versions], path)
    version = next(one for one in versions if one.name == wanted)
    if version.missing:
        here = [one.name for one in versions if not one.missing]
        raise LibraryError(
            f"{VARIABLE}={wanted}: that version of {path} needs CPU features that this machine "
            f"lacks: {', '.join(version.missing)}; "
            + (f"here run {', '.join(here)}" if here else "none of its versions runs here")
        )
    return version


def refuse_other_versions(names: Sequence[str], path: Path) -> None:
    """
    Raises:
        LibraryError: `VARIABLE` names a version that is not among `names`.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted and wanted not in names:
        raise LibraryError(
            f"{VARIABLE}={wanted}: {path} has no such version, only {', '.join(names)}; set "
            f"{VARIABLE} to one of these, or unset it"
        )


def load(version: Version, path: Path) -> Any:
    """The `tvm_ffi.Module` of a version that is in a library's file, and not the file itself.

    Raises:
        LibraryError: its bytes are damaged, or there is nowhere to unpack them.
    """
    with path.open("rb") as file:
        file.seek(version.offset)
        packed = file.read(version.size)
    try:
        library = zlib.decompress(packed)
    except zlib.error as error:
        raise _damaged(path, f"{version.name}: {error}") from None
    if hashlib.sha256(library).hexdigest() != version.sha256:
        raise _damaged(path, f"{version.name} is not what was written")
    place = _in_memory(library, version.sha256)
    if place is not None:
        try:
            return tvm_runtime.load_library(place)
        except Exception:
            pass  # some systems run nothing from memory: a file, then, whose failure counts
    unpacked = _in_cache(library, version.sha256, path)
    try:
        return tvm_runtime.load_library(str(unpacked))
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:]
        raise LibraryError(
            f"{path}: its version {version.name} was unpacked to {unpacked}, and does not load: "
            + "".join(reason)
        ) from None


# Never closed, so that no two libraries of a process have one name: the loader of the operating
# system takes a name that it knows for the library that it knows.
_in_memory_by_digest: dict[str, int] = {}


def _in_memory(library: bytes, digest: str) -> str | None:
    """The name of a file in memory with a library; None where there are none."""
    if not hasattr(os, "memfd_create") or not Path("/proc/self/fd").exists():
        return None
    if digest not in _in_memory_by_digest:
        try:
            file = os.memfd_create("relaxlm")
        except OSError:
            return None
        try:
            with open(file, "wb", closefd=False) as stream:
                stream.write(library)
        except OSError:
            os.close(file)
            return None
        _in_memory_by_digest[digest] = file
    return f"/proc/self/fd/{_in_memory_by_digest[digest]}"


def _in_cache(library: bytes, digest: str, path: Path) -> Path:
    """A file of the cache with a library."""
    place = cache_folder() / "versions" / f"{digest[:32]}{path.suffix}"
    try:
        if place.is_file() and hashlib.sha256(place.read_bytes()).hexdigest() == digest:
            return place
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, library)
    except OSError as error:
        raise LibraryError(
            f"{place.parent}: the version of {path} for this CPU cannot be unpacked there "
            f"({error.strerror}); set RELAXLM_CACHE to a folder that can be written, or compile "
            "for this machine alone with --device cpu"
        ) from None
    return place


def _damaged(path: Path, what: str) -> LibraryError:
    return LibraryError(
        f"{path} is damaged where it holds versions for several CPUs: {what}; copy or compile it "
        "again"
    )
