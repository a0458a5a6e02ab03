"""What macOS looks at when it loads a library that was linked elsewhere: its file's structure."""

import struct
from hashlib import sha256
from pathlib import Path

import pytest

from relaxlm.compiler.cross import TVM_SYMBOLS, zig_linker
from relaxlm.compiler.link import export_library
from relaxlm.compiler.multiversion import write_object
from relaxlm.compiler.platforms import PLATFORMS
from relaxlm.compiler.target import resolve_device
from tests.compiler.test_cross import executable

pytest.importorskip("ziglang")
lief = pytest.importorskip("lief")

SYSTEM = "/usr/lib/libSystem.B.dylib"
# Of XNU's cs_blobs.h: the magic numbers of a signature and of its directory of pages, its flags
# for one that names nobody and was made by a linker, and SHA-256.
SIGNATURE, DIRECTORY = 0xFADE0CC0, 0xFADE0C02
AD_HOC, BY_LINKER = 0x2, 0x20000
SHA256 = 2


@pytest.fixture(scope="module", params=["macos-arm64", "macos-x86_64"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With some pages of data, as a library for several processors has them."""
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    write_object(folder / "data.o", bytes(range(256)) * 300, resolve_device(name))
    path = folder / f"{name}.dylib"
    linker = zig_linker(PLATFORMS[name])
    export_library(executable(name), path, linker, objects=[folder / "data.o"])
    return path


def unsigned_pages(file: bytes, signature: bytes) -> list[int]:
    """Pages of a file whose bytes are not those that an ad-hoc signature is for.

    Source: `CS_SuperBlob` and `CS_CodeDirectory` of XNU's cs_blobs.h; numbers are big-endian.
    """
    magic, _, count = struct.unpack_from(">III", signature)
    assert magic == SIGNATURE
    blobs = dict(struct.unpack_from(">II", signature, 12 + 8 * i) for i in range(count))
    directory = signature[blobs[0] :]
    magic, _, _, flags, hashes, _, _, pages, limit = struct.unpack_from(">9I", directory)
    size, kind, _, page_bits = struct.unpack_from(">4B", directory, 36)
    assert (magic, kind, size) == (DIRECTORY, SHA256, 32)
    assert flags == AD_HOC | BY_LINKER
    assert file[limit:][: len(signature)] == signature, "all before the signature is signed"
    assert pages == -(-limit // (1 << page_bits))
    starts = range(0, limit, 1 << page_bits)
    return [
        i
        for i, start in enumerate(starts)
        if sha256(file[start : min(start + (1 << page_bits), limit)]).digest()
        != directory[hashes + size * i :][:size]
    ]


def test_pages_are_signed(library: Path) -> None:
    binary, content = lief.parse(str(library)), library.read_bytes()
    if library.stem == "macos-x86_64":  # whose macOS runs unsigned code
        assert not binary.has_code_signature
        return
    signature = bytes(binary.code_signature.content)
    assert unsigned_pages(content, signature) == []
    # The check sees one byte.
    place = len(content) // 2
    changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    assert len(unsigned_pages(changed, signature)) == 1


def test_the_system_and_its_libraries(library: Path) -> None:
    binary = lief.parse(str(library))
    assert binary.header.file_type == lief.MachO.Header.FILE_TYPE.DYLIB
    # The wheels of TVM are for macosx_11_0.
    version = binary.build_version
    assert version.platform == lief.MachO.BuildVersion.PLATFORMS.MACOS
    assert tuple(version.minos) == (11, 0, 0)
    names = [str(one.name) for one in binary.libraries]
    assert names == ["@rpath/relaxlm.dylib", SYSTEM], "its own name, and what it needs"
    assert not binary.has_rpath, "nothing is looked for in folders of the machine that linked it"
    # By the name of the library that has it, or, of TVM, wherever in the process it is.
    where = {
        str(binding.symbol.name): str(binding.library.name) if binding.has_library else None
        for binding in binary.bindings
    }
    flat = {name for name, of in where.items() if of is None}
    assert flat == {f"_{name}" for name in TVM_SYMBOLS}
    assert "_cosf" in where and {of for of in where.values() if of} == {SYSTEM}


def test_memory_is_writable_or_runs_and_in_whole_pages(library: Path) -> None:
    page = 1 << (14 if library.stem == "macos-arm64" else 12)
    read, write, run = 1, 2, 4
    binary = lief.parse(str(library))
    for segment in binary.segments:
        assert segment.virtual_address % page == segment.file_offset % page == 0
        allowed = read | run if segment.name == "__TEXT" else read | write
        assert segment.max_protection & ~allowed == 0, segment.name
        assert segment.init_protection & ~segment.max_protection == 0
