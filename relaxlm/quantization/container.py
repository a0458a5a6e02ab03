"""Writes the MLC weight container: params_shard_*.bin and an index of the tensors in them.

Both names of the index are written: tensor-cache.json, and ndarray-cache.json for older readers.
Every tensor starts at a multiple of 64 bytes in its shard, so that a mapped shard can be used as it
is; readers go by byteOffset, so the padding concerns nobody.

The files are written to a folder inside the target and moved out of it at the end, the index last.
A run that is interrupted leaves either what was there before or no index at all.
"""

import hashlib
import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np

INDEX_NAMES = ("ndarray-cache.json", "tensor-cache.json")  # in writing order
BFLOAT16_INDEX_NAMES = ("ndarray-cache-b16.json", "tensor-cache-b16.json")
SHARD_PATTERN = "params_shard_*.bin"
PARTIAL_FOLDER = ".convert_weight.partial"

SHARD_BYTES = 32 << 20
ALIGNMENT = 64

Float32Format = Literal["raw", "f32-to-bf16"]


class ContainerWriter:
    """Takes tensors one at a time; use it in a `with` block that ends with `finish`.

    A tensor of 16 MiB or more that does not fit the pending shard becomes a shard of its own at
    once, without being copied; smaller ones collect until 32 MiB. Without `finish`, leaving the
    block removes what was written.
    """

    def __init__(self, folder: Path, float32_format: Float32Format = "raw") -> None:
        """Prepare to write into `folder`, which is created if need be.

        Args:
            float32_format: "raw" keeps float32 tensors exactly; "f32-to-bf16" stores them rounded
                to bfloat16, as the ecosystem's own writer does, and adds the b16 indexes.
        """
        self.folder = folder
        self._format = float32_format
        self._partial = folder / PARTIAL_FOLDER
        self._pending = bytearray()
        self._pending_records: list[dict[str, Any]] = []
        self._shards: list[dict[str, Any]] = []
        self._names: set[str] = set()
        self._param_bytes = 0
        if self._partial.exists():  # of a run that was killed
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True)

    def __enter__(self) -> "ContainerWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, name: str, array: np.ndarray) -> None:
        """Append one tensor; `array` is not needed afterwards."""
        assert name not in self._names, f"{name} is written twice"
        self._names.add(name)
        self._param_bytes += array.nbytes
        record: dict[str, Any] = {
            "name": name,
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "format": self._format,
        }
        if self._format == "f32-to-bf16" and array.dtype == np.float32:
            array = to_bfloat16_bits(array)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        record["nbytes"] = len(data)

        start = -(-len(self._pending) // ALIGNMENT) * ALIGNMENT
        if start + len(data) >= SHARD_BYTES:
            if 2 * len(data) >= SHARD_BYTES:
                self._write_shard(data, [{**record, "byteOffset": 0}])
                return
            self._flush()
            start = 0
        self._pending += bytes(start - len(self._pending))
        self._pending += data
        self._pending_records.append({**record, "byteOffset": start})

    def finish(self, source_parameters: int) -> dict[str, Any]:
        """Write the last shard and put everything in place, replacing an older container.

        Args:
            source_parameters: number of weights in the checkpoint, for the bits per parameter.

        Returns:
            The index's metadata: ParamSize (tensors), ParamBytes, BitsPerParam.
        """
        self._flush()
        metadata = {
            "ParamSize": len(self._names),
            "ParamBytes": float(self._param_bytes),
            "BitsPerParam": self._param_bytes * 8 / source_parameters,
        }
        indexes = dict.fromkeys(INDEX_NAMES, self._shards)
        records = [record for shard in self._shards for record in shard["records"]]
        if any(r["format"] == "f32-to-bf16" and r["dtype"] == "float32" for r in records):
            indexes = dict.fromkeys(BFLOAT16_INDEX_NAMES, _as_bfloat16(self._shards)) | indexes
        for name, shards in indexes.items():
            content = json.dumps({"metadata": metadata, "records": shards}, indent=2)
            (self._partial / name).write_text(content + "\n", encoding="utf-8")

        # Between the first removal and the last rename the folder has no index, or one whose
        # shards are all there.
        for name in (*INDEX_NAMES, *BFLOAT16_INDEX_NAMES):
            (self.folder / name).unlink(missing_ok=True)
        for stale in sorted(self.folder.glob(SHARD_PATTERN)):
            stale.unlink()
        for shard in self._shards:
            (self._partial / shard["dataPath"]).replace(self.folder / shard["dataPath"])
        for name in indexes:
            (self._partial / name).replace(self.folder / name)
        return metadata

    @property
    def shard_count(self) -> int:
        """Files written so far."""
        return len(self._shards)

    def _flush(self) -> None:
        if self._pending_records:
            self._write_shard(memoryview(self._pending), self._pending_records)
            self._pending, self._pending_records = bytearray(), []

    def _write_shard(self, data: memoryview, records: list[dict[str, Any]]) -> None:
        name = SHARD_PATTERN.replace("*", str(len(self._shards)))
        digest = hashlib.md5(usedforsecurity=False)
        with (self._partial / name).open("xb") as file:
            _write_all(file, data, digest)
        self._shards.append(
            {
                "dataPath": name,
                "format": "raw-shard",
                "nbytes": len(data),
                "records": records,
                "md5sum": digest.hexdigest(),
            }
        )


def to_bfloat16_bits(array: np.ndarray) -> np.ndarray:
    """Float32 -> the bits of bfloat16 as uint16, nearest and ties to even.

    Values that would round to infinity are cut off instead, to the largest bfloat16.
    """
    bits = np.ascontiguousarray(array).view(np.uint32)
    limit = np.uint32(0x7F7F0000)  # the largest bfloat16
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    bias = np.where((bits & np.uint32(0x7FFFFFFF)) < limit, odd + np.uint32(0x7FFF), np.uint32(0))
    return ((bits + bias) >> np.uint32(16)).astype(np.uint16)


def _as_bfloat16(shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same shards, described for readers that want the stored bfloat16 values themselves."""

    def described(record: dict[str, Any]) -> dict[str, Any]:
        if record["format"] == "f32-to-bf16" and record["dtype"] == "float32":
            return {**record, "dtype": "bfloat16", "format": "raw"}
        return record

    return [
        {**shard, "records": [described(record) for record in shard["records"]]} for shard in shards
    ]


def _write_all(file: BinaryIO, data: memoryview, digest: Any, step: int = 1 << 20) -> None:
    for start in range(0, len(data), step):
        part = data[start : start + step]
        file.write(part)
        digest.update(part)
