"""Files that torch wrote, read without it, and files that must not be read at all."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from relaxlm.errors import CheckpointError
from relaxlm.quantization.checkpoint import Checkpoint
from relaxlm.quantization.torch_pickle import list_tensors

RESAVE = (
    "load it with PyTorch in a place you trust and save it again with "
    "`model.save_pretrained(folder, safe_serialization=True)`"
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def message(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        list_tensors(path)
    return str(caught.value)


def test_every_kind_of_tensor_reads_as_torch_saved_it(tmp_path: Path) -> None:
    base = random(6, 8)
    state = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict with an attribute
    state |= {
        "whole": base,
        "rows": base[2:5],
        "columns": base[:, 3:6],
        "transposed": base.t(),
        "broadcast": base[:1, :1].expand(3, 4),
        "cube": random(2, 3, 4).permute(2, 0, 1),
        "half": base.half(),
        "brain": base.bfloat16().t(),
        "double": base.double(),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base),
        "ids": torch.arange(3),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.names()) == list(state)
    assert checkpoint.names()["ids"] == ((3,), "int64")
    for name, tensor in state.items():
        if name != "ids":
            read = checkpoint.read(name)
            assert read.dtype.name == str(tensor.dtype).removeprefix("torch.")
            assert read.shape == tensor.shape
            expected = tensor.detach().double().numpy()
            np.testing.assert_array_equal(read.astype(np.float64), expected)


@pytest.mark.parametrize("name", ["plain", "transposed"])
def test_blocks_are_read_in_row_major_order(tmp_path: Path, name: str) -> None:
    tensors = {"plain": random(9, 4), "transposed": random(4, 9).t()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    block = Checkpoint.open(tmp_path).tensors[name].read(8, 20)
    np.testing.assert_array_equal(block, tensors[name].flatten()[8:20].numpy())


def test_sharded_files_are_read_through_their_index(tmp_path: Path) -> None:
    first, second = {"a": random(3)}, {"b": random(4, 2)}
    torch.save(first, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(second, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {
        "a": "pytorch_model-00001-of-00002.bin",
        "b": "pytorch_model-00002-of-00002.bin",
    }
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in (first | second).items():
        np.testing.assert_array_equal(checkpoint.read(name), tensor.numpy())


def test_torch_is_not_needed(tmp_path: Path) -> None:
    torch.save({"w": random(3)}, tmp_path / "pytorch_model.bin")
    code = (
        "import sys, pathlib; sys.modules['torch'] = None\n"
        "from relaxlm.quantization.checkpoint import Checkpoint\n"
        f"Checkpoint.open(pathlib.Path({str(tmp_path)!r})).read('w')"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    "value, asked",
    [
        (RunsCode(), f"{os.system.__module__}.system"),
        (print, "__builtin__.print"),
        (random(3).to(torch.float8_e4m3fn), "torch._utils._rebuild_tensor_v3"),
        (torch.Size([1]), "torch.Size"),
        (random(3).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (np.float32(1), "numpy._core.multiarray.scalar"),
    ],
    ids=["system", "builtin", "float8", "size", "sparse", "numpy"],
)
def test_other_names_than_those_of_tensors_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object, asked: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": random(2), "x": value}, path)
    assert message(path) == (
        f"{path}: asks for {asked}, and only plain tensors are read, because "
        f"a pickle could run any code; if you trust the file, {RESAVE}"
    )
    assert not (tmp_path / "pwned").exists()


def test_the_format_before_pytorch_1_6_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": random(2)}, path, _use_new_zipfile_serialization=False)
    assert message(path) == (
        f"{path}: not a PyTorch file that can be read: written by PyTorch before 1.6 "
        f"(not a zip archive); {RESAVE}"
    )


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"hello")
    assert message(path) == (
        f"{path}: not a PyTorch file that can be read: no zip archive; {RESAVE}"
    )


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": random(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])
    assert message(path) == (
        f"{path}: truncated or damaged (File is not a zip file), {path.stat().st_size} bytes; "
        "download the file again"
    )


def rewrite(path: Path, change: dict[str, bytes | None], compress: bool = False) -> None:
    """Replace (or, with None, drop) entries of an archive that torch saved as `path`."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    for name, data in change.items():
        (key,) = [entry for entry in entries if entry.endswith(f"/{name}")]
        if data is None:
            del entries[key]
        else:
            entries[key] = data
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"data.pkl": None}, "a zip archive with 0 entries called data.pkl, expected one; "),
        ({"byteorder": b"big"}, "written on a big-endian machine; "),
        ({"data/0": b"abcd"}, "data.pkl is damaged (UnpicklingError: "),
        ({"data/0": None}, "data.pkl is damaged (KeyError: "),
        ({"data.pkl": b"\x80\x02}"}, "data.pkl is damaged (EOFError: "),
        ({"data.pkl": b"junk"}, "data.pkl is damaged (UnpicklingError: "),
        ({"data.pkl": pickle.dumps([1, 2])}, "holds a list, expected a dict of tensors"),
        (
            {"data.pkl": pickle.dumps({3: 4})},
            "holds a dict with key 3, expected names of tensors",
        ),
        (
            {"data.pkl": pickle.dumps({"epoch": 4, "state_dict": OrderedDict()})},
            "'epoch' is a int, expected a tensor: it looks like a training checkpoint; "
            "export the model's weights with `model.save_pretrained(folder)`",
        ),
    ],
)
def test_a_damaged_archive_is_refused(
    tmp_path: Path, change: dict[str, bytes | None], complaint: str
) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": random(4)}, path)
    rewrite(path, change)
    assert message(path).startswith(f"{path}: {complaint}")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.zeros(400)}, path)
    rewrite(path, {}, compress=True)
    assert message(path) == (
        f"{path}: data.pkl is damaged (UnpicklingError: pytorch_model/data/0 is compressed or "
        "encrypted); download the file again"
    )


def test_an_archive_that_was_only_rewritten_is_read(tmp_path: Path) -> None:
    """Entries are found by their headers, wherever they lie."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": random(4)}, path)
    rewrite(path, {})
    np.testing.assert_array_equal(Checkpoint.open(tmp_path).read("w"), random(4).numpy())


@pytest.mark.parametrize(
    "offset, shape, strides, reaches",
    [(0, (5,), (1,), 4), (3, (2,), (1,), 4), (0, (2, 2), (3, 1), 4)],
)
def test_a_tensor_that_reaches_past_its_storage_is_refused(
    tmp_path: Path, offset: int, shape: tuple, strides: tuple, reaches: int
) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": random(4)}, path)
    with zipfile.ZipFile(path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        data = archive.read(name)
    whole = b"K\x00K\x04\x85q\x08K\x01\x85q\x09"  # offset 0, shape (4,), strides (1,)
    assert data.count(whole) == 1

    def pickled(*numbers: int) -> bytes:
        return b"".join(b"K" + bytes([number]) for number in numbers)

    view = b"".join((pickled(offset), b"(", pickled(*shape), b"t(", pickled(*strides), b"t"))
    rewrite(path, {"data.pkl": data.replace(whole, view)})
    assert message(path) == (
        f"{path}: data.pkl is damaged (UnpicklingError: a tensor of shape {list(shape)} reaches "
        f"element {reaches} of a storage of 4); download the file again"
    )
