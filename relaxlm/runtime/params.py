"""A folder of converted weights, read by mapping its files into memory.

The container is the MLC ecosystem's: params_shard_*.bin, and tensor-cache.json (in older folders
ndarray-cache.json) that says where in them each tensor lies. Folders published for MLC and WebLLM
are read as well as relaxlm's own; only in the latter do all tensors start at a multiple of 64
bytes, which is what using them without a copy takes.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from relaxlm.errors import WeightsError
from relaxlm.files import read_json_object, refuse_lfs_pointer
from relaxlm.runtime import tvm_runtime
from relaxlm.runtime.tvm_runtime import ALIGNMENT

INDEX_NAMES = ("tensor-cache.json", "ndarray-cache.json")  # in reading order

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": _BFLOAT16,
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "uint32": np.dtype(np.uint32),
    "int32": np.dtype(np.int32),
    "uint16": np.dtype(np.uint16),
    "int16": np.dtype(np.int16),
    "uint8": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
}
_FORMATS = ("raw", "f32-to-bf16")
_AGAIN = "convert or download the weights again"


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the index. `offset` and `nbytes` are those of its stored bytes in `shard`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    shard: str
    offset: int
    nbytes: int
    stored_as_bfloat16: bool

    @property
    def loaded_nbytes(self) -> int:
        """Bytes in memory; more than `nbytes` if float32 is stored as bfloat16."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class _Shard:
    name: str
    nbytes: int
    md5: str | None


class WeightFolder:
    """The tensors of a folder by name. Opening it reads the index and looks at the files' sizes.

    Attributes:
        path: the folder.
        records: what the index says of each tensor, in the order of the index.
        metadata: the index's own metadata, such as ParamBytes and BitsPerParam.
    """

    def __init__(self, path: Path | str) -> None:
        """Open a folder.

        Raises:
            WeightsError: no index, an index that is damaged, files that are missing or truncated.
        """
        self.path = Path(path)
        self._index = _find_index(self.path)
        index = read_json_object(self._index, WeightsError)
        metadata = index.get("metadata", {})
        self.metadata: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
        self.records: dict[str, TensorRecord] = {}
        self._shards: list[_Shard] = []
        self._mapped: dict[str, np.ndarray] = {}
        for entry in self._get(index, "records", list, "the index"):
            self._add_shard(entry)

    @property
    def loaded_nbytes(self) -> int:
        """Bytes of all tensors in memory."""
        return sum(record.loaded_nbytes for record in self.records.values())

    def load(self, name: str) -> np.ndarray:
        """One tensor, of the shape and dtype of its record, at an address divisible by 64.

        Its memory is the file's, mapped, if the tensor is stored as it is and aligned; writing to
        it does not change the file. Otherwise it is a copy.

        Raises:
            WeightsError: there is no such tensor.
        """
        try:
            record = self.records[name]
        except KeyError:
            raise WeightsError(
                f"{self._index}: no tensor {name} among the {len(self.records)} of the index"
            ) from None
        stored = self._map(record.shard)[record.offset : record.offset + record.nbytes]
        if record.stored_as_bfloat16:
            values = _aligned_empty(record.loaded_nbytes).view(np.float32)
            np.copyto(values, np.array(stored).view(_BFLOAT16))
            return values.reshape(record.shape)
        if record.nbytes and stored.ctypes.data % ALIGNMENT:
            aligned = _aligned_empty(record.nbytes)
            np.copyto(aligned, stored)
            stored = aligned
        return stored.view(_DTYPES[record.dtype]).reshape(record.shape)

    def load_tvm(self, name: str) -> Any:
        """One tensor as TVM's runtime takes it, on the CPU, that shares the memory of `load`."""
        return tvm_runtime.share(self.load(name))

    def check(self, expected: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        """Compare names, shapes and dtypes with those that a model library asks for.

        Args:
            expected: name -> (shape, dtype).

        Raises:
            WeightsError: names what is missing, left over or different.
        """
        missing = [name for name in expected if name not in self.records]
        unused = [name for name in self.records if name not in expected]
        different = []
        for name, (shape, dtype) in expected.items():
            record = self.records.get(name)
            if record is not None and (record.shape, record.dtype) != (tuple(shape), dtype):
                found = f"{record.dtype} {list(record.shape)}"
                different.append(f"{name}: {found}, expected {dtype} {list(shape)}")
        faults = [
            f"{len(names)} {fault} ({_shorten(names)})"
            for fault, names in (("missing", missing), ("unused", unused), ("unlike", different))
            if names
        ]
        if faults:
            raise WeightsError(
                f"{self.path}: the weights do not fit the model: {', '.join(faults)}. "
                "Were both made from the same model with the same quantization?"
            )

    def verify_checksums(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Read every file and compare its MD5 with the index.

        Args:
            progress: called with the bytes checked so far and in total.

        Returns:
            How many files were compared; files without a checksum in the index are not.

        Raises:
            WeightsError: a file whose contents have changed.
        """
        checked = [shard for shard in self._shards if shard.md5 is not None]
        total, done = sum(shard.nbytes for shard in checked), 0
        for shard in checked:
            digest = hashlib.md5(usedforsecurity=False)
            with (self.path / shard.name).open("rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
                    done += len(part)
                    if progress is not None:
                        progress(done, total)
            if digest.hexdigest() != shard.md5:
                raise WeightsError(
                    f"{self.path / shard.name}: its MD5 is {digest.hexdigest()}, the index says "
                    f"{shard.md5}; {_AGAIN}"
                )
        return len(checked)

    def _add_shard(self, entry: Any) -> None:
        name = self._get(entry, "dataPath", str, "a shard")
        if Path(name).name != name or name in ("", ".", ".."):
            raise WeightsError(f"{self._index}: dataPath {name!r} is not a file of the same folder")
        if entry.get("format") != "raw-shard":
            raise WeightsError(
                f"{self._index}: {name} has format {entry.get('format')!r}, expected 'raw-shard'"
            )
        nbytes = self._get(entry, "nbytes", int, name)
        md5 = entry.get("md5sum")
        file = self.path / name
        if not file.is_file():
            raise WeightsError(f"{file} is missing, and {self._index.name} names it; {_AGAIN}")
        if file.stat().st_size != nbytes:
            refuse_lfs_pointer(file, WeightsError)
            raise WeightsError(
                f"{file}: {file.stat().st_size} bytes, expected {nbytes} as {self._index.name} "
                f"says; {_AGAIN}"
            )
        self._shards.append(_Shard(name, nbytes, md5 if isinstance(md5, str) else None))
        for fields in self._get(entry, "records", list, name):
            record = self._read_record(fields, name)
            if record.offset + record.nbytes > nbytes:
                raise WeightsError(
                    f"{self._index}: {record.name} ends at byte {record.offset + record.nbytes} "
                    f"of {name}, which has {nbytes}; {_AGAIN}"
                )
            if record.name in self.records:
                raise WeightsError(f"{self._index}: {record.name} is listed twice; {_AGAIN}")
            self.records[record.name] = record

    def _read_record(self, fields: Any, shard: str) -> TensorRecord:
        name = self._get(fields, "name", str, f"a tensor of {shard}")
        shape = tuple(self._get(fields, "shape", list, name))
        if any(type(n) is not int or n < 0 for n in shape):
            raise WeightsError(f"{self._index}: {name} has shape {list(shape)}; {_AGAIN}")
        dtype = self._get(fields, "dtype", str, name)
        stored_format = self._get(fields, "format", str, name)
        if dtype not in _DTYPES:
            raise WeightsError(
                f"{self._index}: {name} has dtype '{dtype}', expected one of {', '.join(_DTYPES)}"
            )
        if stored_format not in _FORMATS:
            raise WeightsError(
                f"{self._index}: {name} has format '{stored_format}', expected one of "
                f"{', '.join(_FORMATS)}"
            )
        as_bfloat16 = stored_format == "f32-to-bf16" and dtype == "float32"
        record = TensorRecord(
            name,
            shape,
            dtype,
            shard,
            self._get(fields, "byteOffset", int, name),
            self._get(fields, "nbytes", int, name),
            as_bfloat16,
        )
        expected = record.loaded_nbytes // (2 if as_bfloat16 else 1)
        if record.nbytes != expected or record.offset < 0:
            raise WeightsError(
                f"{self._index}: {name} has {record.nbytes} bytes at {record.offset}, expected "
                f"{expected} for {dtype} {list(shape)} in format '{stored_format}'; {_AGAIN}"
            )
        return record

    def _get(self, fields: Any, key: str, kind: type, where: str) -> Any:
        value = fields.get(key) if isinstance(fields, dict) else None
        if type(value) is not kind:
            raise WeightsError(
                f"{self._index}: {key} of {where} is {value!r}, expected {kind.__name__}; {_AGAIN}"
            )
        return value

    def _map(self, shard: str) -> np.ndarray:
        """[nbytes] uint8, the whole file; pages are copied when written to."""
        if shard not in self._mapped:
            file = self.path / shard
            if file.stat().st_size == 0:  # cannot be mapped
                self._mapped[shard] = np.empty(0, np.uint8)
            else:
                self._mapped[shard] = np.asarray(np.memmap(file, np.uint8, mode="c"))
        return self._mapped[shard]


def _find_index(folder: Path) -> Path:
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder, expected a folder of converted weights")
    for name in INDEX_NAMES:
        if (folder / name).is_file():
            return folder / name
    message = f"{folder}: no {INDEX_NAMES[0]} (or {INDEX_NAMES[1]})"
    shards = len(list(folder.glob("params_shard_*.bin")))
    partial = any(folder.glob(".convert_weight.partial*"))
    if shards or partial:
        found = f", but {shards} params_shard_*.bin" if shards else ""
        raise WeightsError(
            f"{message}{found}: the conversion or download was interrupted, or is still running; "
            "run `relaxlm convert_weight` again, or download the folder completely"
        )
    if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        raise WeightsError(
            f"{message}: this is a checkpoint that is not converted yet; "
            f"run `relaxlm convert_weight {folder} --quantization q4f16_1 -o OUTPUT`"
        )
    raise WeightsError(
        f"{message}: no converted weights here; make them with "
        "`relaxlm convert_weight CHECKPOINT --quantization q4f16_1 -o OUTPUT`"
    )


def _aligned_empty(nbytes: int) -> np.ndarray:
    """[nbytes] uint8 at an address divisible by ALIGNMENT."""
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes]


def _shorten(names: list[str], limit: int = 5) -> str:
    rest = len(names) - limit
    return "; ".join(names[:limit]) + (f"; and {rest} more" if rest > 0 else "")
