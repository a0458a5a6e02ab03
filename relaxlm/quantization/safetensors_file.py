"""The header of a safetensors file: 8 bytes of length, a JSON object, then the tensors' bytes.

Read here and not by the safetensors package, because conversion takes rows of a tensor at a time
(that package maps whole files, which count as memory once read), needs bfloat16 in NumPy, and says
of a truncated file how many bytes are missing. Tests compare the two.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from relaxlm.errors import CheckpointError
from relaxlm.files import refuse_lfs_pointer
from relaxlm.quantization.stored_tensor import StoredTensor

# Name in the header -> our name and bytes per element. A dtype that is not here keeps its name.
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


def list_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: a Git LFS pointer, a truncated file, or a header that does not fit it.
    """
    refuse_lfs_pointer(path, CheckpointError)
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        start = 8 + header_size
        if size < 8 or start > size:
            raise CheckpointError(
                f"{path}: truncated, or not a safetensors file: {size} bytes, expected "
                f"{start if size >= 8 else 8} or more; download the file again"
            )
        try:
            header = json.loads(file.read(header_size))
        except (ValueError, RecursionError) as reason:
            raise CheckpointError(
                f"{path}: not a safetensors file: its header is not valid JSON ({reason}); "
                "download the file again"
            ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)

    entries = [_entry(path, name, fields) for name, fields in header.items()]
    expected = start + max((end for _, _, end in entries), default=0)
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise CheckpointError(
            f"{path}: {state}: its header describes {expected} bytes, the file has {size}; "
            "download the file again"
        )
    entries.sort(key=lambda entry: (entry[1], entry[0].name))
    return {tensor.name: replace(tensor, offset=start + begin) for tensor, begin, _ in entries}


def _entry(path: Path, name: str, fields: Any) -> tuple[StoredTensor, int, int]:
    """One header entry: the tensor, and where its bytes begin and end after the header."""
    try:
        shape = tuple(fields["shape"])
        begin, end = fields["data_offsets"]
        dtype, width = _DTYPES.get(fields["dtype"], (fields["dtype"], 0))
        well_formed = isinstance(dtype, str) and 0 <= begin <= end and all(n >= 0 for n in shape)
        well_formed = well_formed and all(type(n) is int for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise CheckpointError(
            f"{path}: not a safetensors file: header entry {name} is {json.dumps(fields)[:200]}"
        )
    if width and end - begin != math.prod(shape) * width:
        raise CheckpointError(
            f"{path}: damaged: tensor {name} has {end - begin} bytes, expected "
            f"{math.prod(shape) * width} for shape {list(shape)} {dtype}; download the file again"
        )
    return StoredTensor(name, shape, dtype, path, 0), begin, end
