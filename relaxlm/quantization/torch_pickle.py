"""PyTorch's .bin and .pth files, read without torch.

Since PyTorch 1.6 such a file is a zip archive: `data.pkl` pickles a dict of tensors that refer to
storages by key, and the entry `data/<key>` holds a storage's bytes, uncompressed. A pickle can call
any function it names, so only those needed for a dict of tensors are known here, each replaced by
our own; every other name is refused before anything is called.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relaxlm.errors import CheckpointError
from relaxlm.files import refuse_lfs_pointer
from relaxlm.quantization.stored_tensor import StoredTensor

_RESAVE = (
    "load it with PyTorch in a place you trust and save it again with "
    "`model.save_pretrained(folder, safe_serialization=True)`"
)

# Storage class of torch -> dtype and bytes per element.
_STORAGES = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}


@dataclass(frozen=True)
class _Storage:
    """`elements` values of `dtype` at byte `offset` of the file."""

    dtype: str
    width: int
    elements: int
    offset: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage; `offset` and `strides` in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def list_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a PyTorch file, in the order of the dict that was saved.

    Raises:
        CheckpointError: a Git LFS pointer, a truncated or old file, one that names anything but
            tensors, or one that holds something else than a dict of tensors.
    """
    refuse_lfs_pointer(path, CheckpointError)
    with path.open("rb") as file:
        start = file.read(4)
        if start[:2] != b"PK":
            old = start[:1] == b"\x80"
            kind = "written by PyTorch before 1.6 (not a zip archive)" if old else "no zip archive"
            raise CheckpointError(f"{path}: not a PyTorch file that can be read: {kind}; {_RESAVE}")
        try:
            with zipfile.ZipFile(file) as archive:
                saved = _unpickle(path, archive, file)
        except zipfile.BadZipFile as reason:
            raise CheckpointError(
                f"{path}: truncated or damaged ({reason}), {path.stat().st_size} bytes; "
                "download the file again"
            ) from None
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path}: holds a {type(saved).__name__}, expected a dict of tensors")
    return {_check_key(path, key): _locate(path, key, value) for key, value in saved.items()}


def _unpickle(path: Path, archive: zipfile.ZipFile, file: io.BufferedReader) -> Any:
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path}: a zip archive with {len(pickles)} entries called data.pkl, expected one; "
            "it is not a PyTorch file"
        )
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}byteorder" in entries and archive.read(f"{prefix}byteorder") != b"little":
        raise CheckpointError(f"{path}: written on a big-endian machine; {_RESAVE}")

    def storage(identifier: Any) -> _Storage:
        kind, (dtype, width), key, _, elements = identifier
        if kind != "storage":
            raise pickle.UnpicklingError(f"persistent id of kind {kind!r}")
        entry = entries[f"{prefix}data/{key}"]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise pickle.UnpicklingError(f"{entry.filename} is compressed or encrypted")
        if entry.file_size < elements * width:
            raise pickle.UnpicklingError(
                f"{entry.filename} has {entry.file_size} bytes, expected {elements * width}"
            )
        return _Storage(dtype, width, elements, _data_offset(file, entry))

    try:
        return _Unpickler(path, archive.read(pickles[0]), storage).load()
    except (CheckpointError, zipfile.BadZipFile):
        raise
    except Exception as reason:  # a damaged pickle can fail in any operation
        raise CheckpointError(
            f"{path}: data.pkl is damaged ({type(reason).__name__}: {reason}); "
            "download the file again"
        ) from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path, data: bytes, storage: Callable[[Any], _Storage]) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path
        self._storage = storage

    def persistent_load(self, identifier: Any) -> _Storage:
        return self._storage(identifier)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
            "torch._utils._rebuild_parameter": _rebuild_parameter,
        }
        try:
            return known[f"{module}.{name}"]
        except KeyError:
            raise CheckpointError(
                f"{self._path}: asks for {module}.{name}, and only plain tensors are read, because "
                f"a pickle could run any code; if you trust the file, {_RESAVE}"
            ) from None


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> _Tensor:
    if not (
        isinstance(storage, _Storage)
        and len(shape) == len(strides)
        and all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
    ):
        raise pickle.UnpicklingError("a tensor with unexpected arguments")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.elements:
        raise pickle.UnpicklingError(
            f"a tensor of shape {list(shape)} reaches element {last} of a storage of "
            f"{storage.elements}"
        )
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data: _Tensor, *_: Any) -> _Tensor:
    return data


def _check_key(path: Path, key: Any) -> str:
    if not isinstance(key, str):
        raise CheckpointError(f"{path}: holds a dict with key {key!r}, expected names of tensors")
    return key


def _locate(path: Path, name: str, value: Any) -> StoredTensor:
    if not isinstance(value, _Tensor):
        raise CheckpointError(
            f"{path}: '{name}' is a {type(value).__name__}, expected a tensor: it looks like a "
            "training checkpoint; export the model's weights with `model.save_pretrained(folder)`"
        )
    row_major, step = [], 1
    for n in reversed(value.shape):
        row_major.append(step)
        step *= n
    contiguous = step == 0 or all(
        n == 1 or stride == expected
        for n, stride, expected in zip(value.shape, value.strides, row_major[::-1], strict=True)
    )
    return StoredTensor(
        name,
        value.shape,
        value.storage.dtype,
        path,
        value.storage.offset + value.offset * value.storage.width,
        None if contiguous else value.strides,
    )


def _data_offset(file: io.BufferedReader, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes start: after its own header, which repeats name and extra field."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no local header for {entry.filename}")
    name_size, extra_size = struct.unpack("<HH", header[26:30])
    return entry.header_offset + 30 + name_size + extra_size
