"""A Hugging Face folder's weights: which files they are in, and reading them tensor by tensor."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from relaxlm.errors import CheckpointError
from relaxlm.files import read_json_object
from relaxlm.quantization import safetensors_file, torch_pickle
from relaxlm.quantization.stored_tensor import StoredTensor

_Lister = Callable[[Path], dict[str, StoredTensor]]

# Single file, index of several, and how one file is listed; the first that exists is used, as
# transformers does.
_FORMATS: tuple[tuple[str, _Lister], ...] = (
    ("model.safetensors", safetensors_file.list_tensors),
    ("pytorch_model.bin", torch_pickle.list_tensors),
)

# What else may be found where weights were expected: pattern, and what to say of it.
_HINTS = (
    ("*.gguf", "is a GGUF file, which is not read; download the original Hugging Face folder"),
    (
        "adapter_model.*",
        "is an adapter (LoRA), not a model; merge it into its base model with PEFT's "
        "`merge_and_unload`, save the result and convert that",
    ),
    (
        "consolidated*.*",
        "has weights under their vendor's own names; download the variant of the folder that "
        "has model*.safetensors",
    ),
    (
        "*cache.json",
        "belongs to weights that are already converted; they need no convert_weight",
    ),
    (
        "model-*-of-*.safetensors",
        "is one of several files, and model.safetensors.index.json is missing; "
        "download the checkpoint completely",
    ),
    (
        "pytorch_model-*-of-*.bin",
        "is one of several files, and pytorch_model.bin.index.json is missing; "
        "download the checkpoint completely",
    ),
    ("*.safetensors", "has another name"),
    ("tf_model.h5", "is for TensorFlow, which is not read"),
    ("flax_model*.msgpack", "is for Flax, which is not read"),
    ("*.onnx", "is for ONNX, which is not read"),
)


class Checkpoint:
    """The tensors of a folder. Opening reads only indexes and headers."""

    def __init__(self, folder: Path, files: tuple[Path, ...], tensors: dict[str, StoredTensor]):
        self.folder = folder
        self.files = files
        self.tensors: Mapping[str, StoredTensor] = tensors

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Find and list the weights of a folder.

        Reads model.safetensors or pytorch_model.bin, or the files that model.safetensors.index.json
        or pytorch_model.bin.index.json names. `tensors` is in the order of the files' names and,
        within a file, of the tensors' bytes.

        Raises:
            CheckpointError: no weights, files missing, or a file that is not what it should be.
        """
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is not a folder, expected a Hugging Face folder with config.json and "
                "model.safetensors"
            )
        for single, list_tensors in _FORMATS:
            path, index = folder / single, folder / f"{single}.index.json"
            if path.is_file():
                return cls(folder, (path,), list_tensors(path))
            if index.is_file():
                return cls(folder, *_open_sharded(index, list_tensors))
        raise CheckpointError(_nothing_found(folder))

    def names(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype) of every tensor, in file order."""
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """A whole tensor, in its own dtype (bfloat16 as `ml_dtypes.bfloat16`)."""
        tensor = self.tensors[name]
        return tensor.read().reshape(tensor.shape)


def _open_sharded(
    index: Path, list_tensors: _Lister
) -> tuple[tuple[Path, ...], dict[str, StoredTensor]]:
    what = "an index of weight files"
    weight_map = read_json_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty, expected {what}")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{index}: weight_map names {file!r}, expected files of the same folder"
            )
    files = sorted(set(weight_map.values()))
    absent = [file for file in files if not (index.parent / file).is_file()]
    if absent:
        raise CheckpointError(
            f"{index} names {len(files)} files and {len(absent)} of them are missing "
            f"({shorten(absent)}); download the checkpoint completely"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in list_tensors(index.parent / file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{index.parent}: tensor {name} is both in {tensors[name].file.name} and in "
                    f"{file}; are the files from one revision?"
                )
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(
                f"{index}: says that {file} holds tensor {name}, which is not there; "
                "are index and files from the same revision?"
            )
    return tuple(index.parent / file for file in files), tensors


def _nothing_found(folder: Path) -> str:
    message = (
        f"{folder}: no weights found, expected model.safetensors or pytorch_model.bin, or one of "
        "them with .index.json and the files it names"
    )
    for pattern, hint in _HINTS:
        found = sorted(path.name for path in folder.glob(pattern))
        if found:
            return f"{message}; {found[0]} {hint}"
    present = sorted(path.name for path in folder.iterdir())
    return f"{message}; the folder holds {shorten(present) if present else 'nothing'}"


def shorten(names: list[str], limit: int = 5) -> str:
    """The first few of a list of names, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
