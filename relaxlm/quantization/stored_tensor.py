"""Where one tensor of a checkpoint lies in a file, and reading parts of it."""

import math
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from relaxlm.errors import CheckpointError

FLOATS: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    `offset` is in bytes from the start of the file; `strides` in elements, None when the elements
    lie in row-major order. `dtype` may be one that cannot be read: an unused tensor is allowed to
    be anything.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without those of scales; of dtypes of a byte and of `FLOATS`."""
        return self.size * FLOATS[self.dtype].itemsize if self.dtype in FLOATS else self.size

    def check_readable(self) -> None:
        """Raise CheckpointError unless the dtype is one of FLOATS."""
        if self.dtype not in FLOATS:
            raise CheckpointError(
                f"{self.file}: tensor {self.name} has dtype {self.dtype}, "
                f"expected one of {', '.join(FLOATS)}"
            )

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements start .. stop in row-major order, as a new flat array of the tensor's dtype.

        The file is read, not mapped: mapped pages would count as this process's memory.

        Raises:
            CheckpointError: a dtype that is not a float, or a file that has become shorter.
        """
        self.check_readable()
        dtype = FLOATS[self.dtype]
        return self.read_bits(start, stop, dtype.itemsize).view(dtype)

    def part(self, index: int) -> np.ndarray:
        """The index-th along the first axis, of shape[1:]."""
        size = math.prod(self.shape[1:])
        return self.read(index * size, (index + 1) * size).reshape(self.shape[1:])

    def read_bits(self, start: int = 0, stop: int | None = None, itemsize: int = 1) -> np.ndarray:
        """The same as unsigned integers of so many bytes, whatever the dtype."""
        stop = self.size if stop is None else stop
        bits = np.dtype(f"<u{itemsize}")
        if self.strides is None:
            where = self.offset + start * itemsize
            flat = np.fromfile(self.file, bits, count=stop - start, offset=where)
        else:
            span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
            mapped = np.memmap(self.file, bits, mode="r", offset=self.offset, shape=(span,))
            strides = tuple(stride * itemsize for stride in self.strides)
            view = np.lib.stride_tricks.as_strided(mapped, self.shape, strides, writeable=False)
            flat = np.array(view.flat[start:stop])
        if flat.size != stop - start:
            raise CheckpointError(f"{self.file}: ended while tensor {self.name} was read")
        return flat
