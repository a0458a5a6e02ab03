import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import save_file

from relaxlm.errors import CheckpointError
from relaxlm.quantization.checkpoint import Checkpoint
from tests.shared_data import SHARED, needs_shared_data

LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 1234567890\n"
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def save_sharded(folder: Path, files: dict[str, dict[str, torch.Tensor]]) -> None:
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def message(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_one_file_reads_as_it_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a.weight": random(5, 7).to(dtype), "b": random(3).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    name = str(dtype).removeprefix("torch.")
    assert checkpoint.names() == {"a.weight": ((5, 7), name), "b": ((3,), name)}
    for key, tensor in tensors.items():
        read = checkpoint.read(key)
        assert read.dtype.name == name
        np.testing.assert_array_equal(read.astype(np.float64), tensor.double().numpy())


def test_shards_are_listed_by_file_name_and_then_by_position(tmp_path: Path) -> None:
    second = {"z": random(2, 2), "a": random(64, 2)}
    first = {"m": random(4, 4), "b": random(3).half()}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_sharded(tmp_path, {names[1]: second, names[0]: first})
    checkpoint = Checkpoint.open(tmp_path)
    assert [file.name for file in checkpoint.files] == names
    positions = [(tensor.file.name, tensor.offset) for tensor in checkpoint.tensors.values()]
    assert positions == sorted(positions)
    assert set(checkpoint.tensors) == {"z", "a", "m", "b"}
    for name, tensor in (first | second).items():
        np.testing.assert_array_equal(checkpoint.read(name), tensor.numpy())


def test_blocks_of_a_tensor_are_read_alone(tmp_path: Path) -> None:
    tensor = random(9, 4).bfloat16()
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    block = Checkpoint.open(tmp_path).tensors["w"].read(8, 20)
    assert block.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(block.astype(np.float32), tensor.float().flatten()[8:20].numpy())


def test_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    safetensors.numpy.save_file(
        {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(2.5, np.float32)},
        tmp_path / "model.safetensors",
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read("empty").shape == (0, 3)
    assert checkpoint.read("scalar") == np.float32(2.5)


@needs_shared_data
def test_a_real_checkpoint_reads_as_the_safetensors_library_reads_it() -> None:
    folder = SHARED / "stories260k-llama"
    checkpoint = Checkpoint.open(folder)
    expected = safetensors.numpy.load_file(folder / "model.safetensors")
    assert set(checkpoint.names()) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)


def test_dtypes_that_are_no_floats_are_listed_and_refused_when_read(tmp_path: Path) -> None:
    tensors = {
        "ids": torch.arange(4),
        "mask": torch.ones(2, dtype=torch.bool),
        "f8": random(4).to(torch.float8_e4m3fn),
        "w": random(4),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    checkpoint = Checkpoint.open(tmp_path)
    dtypes = {name: dtype for name, (_, dtype) in checkpoint.names().items()}
    assert dtypes == {"ids": "int64", "mask": "bool", "f8": "float8_e4m3fn", "w": "float32"}
    for name in ("ids", "mask", "f8"):
        with pytest.raises(CheckpointError) as caught:
            checkpoint.read(name)
        assert str(caught.value) == (
            f"{path}: tensor {name} has dtype {dtypes[name]}, "
            "expected one of float64, float32, float16, bfloat16"
        )


def test_an_unknown_dtype_is_listed_under_its_own_name(tmp_path: Path) -> None:
    write_header(tmp_path, {"w": {"dtype": "F4", "shape": [6], "data_offsets": [0, 3]}}, b"abc")
    assert Checkpoint.open(tmp_path).names() == {"w": ((6,), "F4")}


def test_tensors_are_listed_by_position_whatever_the_order_of_the_header(tmp_path: Path) -> None:
    header = {
        name: {"dtype": "U8", "shape": [2], "data_offsets": [begin, begin + 2]}
        for name, begin in (("a", 4), ("b", 0), ("c", 2))
    }
    write_header(tmp_path, header, bytes(6))
    assert list(Checkpoint.open(tmp_path).names()) == ["b", "c", "a"]


NOTHING = (
    "no weights found, expected model.safetensors or pytorch_model.bin, or one of "
    "them with .index.json and the files it names; "
)


@pytest.mark.parametrize(
    "files, hint",
    [
        ([], "the folder holds nothing"),
        (["config.json", "a", "b"], "the folder holds a, b, config.json"),
        (list("abcdefg"), "the folder holds a, b, c, d, e and 2 more"),
        (
            ["model-Q4_K_M.gguf", "config.json"],
            "model-Q4_K_M.gguf is a GGUF file, which is not read; "
            "download the original Hugging Face folder",
        ),
        (
            ["adapter_model.safetensors", "adapter_config.json"],
            "adapter_model.safetensors is an adapter (LoRA), not a model; merge it into its base "
            "model with PEFT's `merge_and_unload`, save the result and convert that",
        ),
        (
            ["consolidated.00.pth", "params.json"],
            "consolidated.00.pth has weights under their vendor's own names; download the variant "
            "of the folder that has model*.safetensors",
        ),
        (
            ["tensor-cache.json", "params_shard_0.bin"],
            "tensor-cache.json belongs to weights that are already converted; "
            "they need no convert_weight",
        ),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            "model-00001-of-00002.safetensors is one of several files, and "
            "model.safetensors.index.json is missing; download the checkpoint completely",
        ),
        (
            ["pytorch_model-00002-of-00002.bin"],
            "pytorch_model-00002-of-00002.bin is one of several files, and "
            "pytorch_model.bin.index.json is missing; download the checkpoint completely",
        ),
        (["model.fp16.safetensors"], "model.fp16.safetensors has another name"),
        (["tf_model.h5"], "tf_model.h5 is for TensorFlow, which is not read"),
        (["flax_model.msgpack"], "flax_model.msgpack is for Flax, which is not read"),
        (["model.onnx"], "model.onnx is for ONNX, which is not read"),
    ],
)
def test_a_folder_without_weights_is_refused(tmp_path: Path, files: list[str], hint: str) -> None:
    for file in files:
        (tmp_path / file).write_text("x")
    assert message(tmp_path) == f"{tmp_path}: {NOTHING}{hint}"


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "absent"
    assert message(path) == (
        f"{path} is not a folder, expected a Hugging Face folder with config.json and "
        "model.safetensors"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_recognised(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(LFS_POINTER)
    assert message(tmp_path) == (
        f"{tmp_path / name} is a Git LFS pointer, not weights ({len(LFS_POINTER)} bytes): "
        f"run `git lfs pull` in {tmp_path}, or download the file again"
    )


def test_a_git_lfs_pointer_in_place_of_the_index_is_recognised(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(LFS_POINTER)
    assert message(tmp_path) == (
        f"{index} is a Git LFS pointer, not model.safetensors.index.json ({len(LFS_POINTER)} "
        f"bytes): run `git lfs pull` in {tmp_path}, or download the file again"
    )


@pytest.mark.parametrize("change, state", [(-1, "truncated"), (-100, "truncated"), (3, "damaged")])
def test_a_file_of_the_wrong_length_is_refused(tmp_path: Path, change: int, state: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": random(100), "b": random(3, 3)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    assert message(tmp_path) == (
        f"{path}: {state}: its header describes {len(data)} bytes, the file has "
        f"{len(data) + change}; download the file again"
    )


@pytest.mark.parametrize("size, expected", [(0, 8), (5, 8)])
def test_a_file_that_ends_in_its_length_field_is_refused(
    tmp_path: Path, size: int, expected: int
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x10" * size)
    assert message(tmp_path) == (
        f"{path}: truncated, or not a safetensors file: {size} bytes, expected {expected} or more; "
        "download the file again"
    )


def test_a_file_that_ends_in_its_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": random(100)}, path)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes()[:20])
    assert message(tmp_path) == (
        f"{path}: truncated, or not a safetensors file: 20 bytes, expected {header} or more; "
        "download the file again"
    )


def write_header(folder: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def test_a_header_that_is_not_json_is_refused(tmp_path: Path) -> None:
    path = write_header(tmp_path, b"<html>")
    assert message(tmp_path) == (
        f"{path}: not a safetensors file: its header is not valid JSON "
        "(Expecting value: line 1 column 1 (char 0)); download the file again"
    )
    path = write_header(tmp_path, [1])
    assert message(tmp_path) == (f"{path}: not a safetensors file: its header is not a JSON object")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
        {"dtype": 7, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        [],
        None,
    ],
)
def test_a_malformed_header_entry_is_refused(tmp_path: Path, entry: object) -> None:
    path = write_header(tmp_path, {"w": entry}, bytes(8))
    assert message(tmp_path) == (
        f"{path}: not a safetensors file: header entry w is {json.dumps(entry)}"
    )


def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_refused(tmp_path: Path) -> None:
    entry = {"dtype": "BF16", "shape": [3, 2], "data_offsets": [0, 10]}
    path = write_header(tmp_path, {"w": entry}, bytes(10))
    assert message(tmp_path) == (
        f"{path}: damaged: tensor w has 10 bytes, expected 12 for shape [3, 2] bfloat16; "
        "download the file again"
    )


def test_missing_shards_are_named(tmp_path: Path) -> None:
    files = {f"model-{i:05}-of-00003.safetensors": {f"w{i}": random(2)} for i in (1, 2, 3)}
    save_sharded(tmp_path, files)
    for name in list(files)[1:]:
        (tmp_path / name).unlink()
    assert message(tmp_path) == (
        f"{tmp_path / 'model.safetensors.index.json'} names 3 files and 2 of them are missing "
        "(model-00002-of-00003.safetensors, model-00003-of-00003.safetensors); "
        "download the checkpoint completely"
    )


def test_a_tensor_of_the_index_that_is_in_no_file_is_named(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"a.safetensors": {"w": random(2)}})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "a.safetensors", "v": "a.safetensors"}}')
    assert message(tmp_path) == (
        f"{index}: says that a.safetensors holds tensor v, which is not there; "
        "are index and files from the same revision?"
    )


def test_a_tensor_that_is_in_two_files_is_named(tmp_path: Path) -> None:
    files = {"a.safetensors": {"w": random(2)}, "b.safetensors": {"w": random(2), "v": random(2)}}
    save_sharded(tmp_path, files)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}')
    assert message(tmp_path) == (
        f"{tmp_path}: tensor w is both in a.safetensors and in b.safetensors; "
        "are the files from one revision?"
    )


def test_tensors_that_the_index_does_not_name_are_listed_too(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"a.safetensors": {"w": random(2), "extra": random(2)}})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "a.safetensors"}}')
    assert set(Checkpoint.open(tmp_path).names()) == {"w", "extra"}


@pytest.mark.parametrize(
    "text, complaint",
    [
        (
            "{",
            "not valid JSON: Expecting property name enclosed in double quotes at line 1, "
            "column 2. Is the file complete?",
        ),
        ("[1]", "expected a JSON object, found a list"),
        ("{}", "weight_map is missing or empty, expected an index of weight files"),
        (
            '{"weight_map": {"w": "../a.safetensors"}}',
            "weight_map names '../a.safetensors', expected files of the same folder",
        ),
        ('{"weight_map": {"w": 3}}', "weight_map names 3, expected files of the same folder"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert message(tmp_path) == f"{index}: {complaint}"


def test_a_file_that_becomes_shorter_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": random(1000)}, path)
    checkpoint = Checkpoint.open(tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("w")
    assert str(caught.value) == f"{path}: ended while tensor w was read"
