"""Folders as published ones are, with any offsets, and what may be wrong with a folder."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from relaxlm.errors import WeightsError
from relaxlm.runtime.params import WeightFolder
from relaxlm.runtime.tvm_runtime import download, share

AGAIN = "convert or download the weights again"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 33554432\n"


def random(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    if dtype.startswith(("uint", "int")):
        return rng.integers(1, 100, shape).astype(dtype)
    return rng.uniform(0.5, 1.5, shape).astype(np.dtype(dtype))


def publish(folder: Path, start: int = 0, index_name: str = "tensor-cache.json") -> dict:
    """A folder as the ecosystem's writer makes it: tensors back to back, float32 as bfloat16.

    Returns:
        name -> array, as they should be loaded.
    """
    tensors = {
        "a.q_weight": random((5, 3), "uint32"),
        "a.q_scale": random((5, 1), "float16"),
        "norm.weight": random((9,), "bfloat16").astype(np.float32),
        "b.weight": random((3, 3), "bfloat16"),
        "c.weight": random((2, 5), "float8_e4m3fn"),
        "d.weight": random((4,), "int8"),
        "empty": np.zeros((0, 3), np.float16),
    }
    data, records = bytes(start), []
    for name, array in tensors.items():
        stored = array.astype(ml_dtypes.bfloat16) if array.dtype == np.float32 else array
        records.append(
            {
                "name": name,
                "shape": list(array.shape),
                "dtype": array.dtype.name,
                "format": "f32-to-bf16",
                "nbytes": stored.nbytes,
                "byteOffset": len(data),
            }
        )
        data += stored.tobytes()
    folder.mkdir(exist_ok=True)
    (folder / "params_shard_0.bin").write_bytes(data)
    shard = {
        "dataPath": "params_shard_0.bin",
        "format": "raw-shard",
        "nbytes": len(data),
        "records": records,
        "md5sum": hashlib.md5(data).hexdigest(),
    }
    index = {"metadata": {"ParamSize": len(tensors), "BitsPerParam": 4.5}, "records": [shard]}
    (folder / index_name).write_text(json.dumps(index))
    return tensors


def message(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        WeightFolder(folder)
    return str(caught.value)


@pytest.mark.parametrize("start", [0, 2, 3, 64])
@pytest.mark.parametrize("index_name", ["tensor-cache.json", "ndarray-cache.json"])
def test_a_published_folder_is_read(tmp_path: Path, index_name: str, start: int) -> None:
    tensors = publish(tmp_path, start, index_name)
    folder = WeightFolder(tmp_path)
    assert folder.metadata["BitsPerParam"] == 4.5
    assert list(folder.records) == list(tensors)
    assert folder.loaded_nbytes == sum(array.nbytes for array in tensors.values())
    for name, array in tensors.items():
        record, loaded = folder.records[name], folder.load(name)
        assert (record.shape, record.dtype) == (array.shape, array.dtype.name)
        assert (loaded.shape, loaded.dtype) == (array.shape, array.dtype)
        assert not loaded.size or loaded.ctypes.data % 64 == 0
        assert loaded.tobytes() == array.tobytes()


def is_mapped(array: np.ndarray) -> bool:
    base = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False


def test_only_aligned_tensors_that_are_stored_as_they_are_share_the_mapped_file(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    folder = WeightFolder(tmp_path)
    assert is_mapped(folder.load("a.q_weight"))  # at byte 0
    assert not is_mapped(folder.load("a.q_scale"))  # at byte 60
    publish(tmp_path, start=4)  # a.q_scale is at 64
    folder = WeightFolder(tmp_path)
    assert is_mapped(folder.load("a.q_scale"))
    publish(tmp_path, start=54)  # norm.weight is at 124
    publish(tmp_path, start=58)  # norm.weight is at 128
    assert not is_mapped(WeightFolder(tmp_path).load("norm.weight"))


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    tensors = publish(tmp_path)
    WeightFolder(tmp_path).load("a.q_weight")[:] = 0
    np.testing.assert_array_equal(WeightFolder(tmp_path).load("a.q_weight"), tensors["a.q_weight"])


def test_the_new_index_name_goes_first(tmp_path: Path) -> None:
    publish(tmp_path, 0, "tensor-cache.json")
    (tmp_path / "ndarray-cache.json").write_text("not read")
    assert "norm.weight" in WeightFolder(tmp_path).records


def test_tvm_tensors_share_memory_and_have_tvms_dtypes(tmp_path: Path) -> None:
    tensors = publish(tmp_path)
    folder = WeightFolder(tmp_path)
    for name, array in tensors.items():
        if array.size:
            tensor = folder.load_tvm(name)
            assert str(tensor.dtype) == array.dtype.name
            assert download(tensor).tobytes() == array.tobytes()
    for name in ("b.weight", "a.q_weight"):
        array = folder.load(name)
        shared = share(array)
        array[0, 0] = 77
        assert download(shared)[0, 0] == 77


def test_opening_does_not_import_tvm_or_the_rest_of_relaxlm() -> None:
    code = (
        "import sys, relaxlm.runtime.params\n"
        "parts = ('tvm', 'relaxlm.compiler', 'relaxlm.models', 'relaxlm.quantization')\n"
        "sys.exit(', '.join(part for part in parts if part in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "\n"


def test_check_accepts_what_fits_and_names_what_does_not(tmp_path: Path) -> None:
    publish(tmp_path)
    folder = WeightFolder(tmp_path)
    fitting = {name: (record.shape, record.dtype) for name, record in folder.records.items()}
    folder.check(fitting)
    wrong = dict(fitting)
    del wrong["d.weight"], wrong["empty"]
    wrong |= {"x": ((1,), "float16"), "b.weight": ((3, 3), "float16")}
    wrong["norm.weight"] = ((8,), "float32")
    with pytest.raises(WeightsError) as caught:
        folder.check(wrong)
    assert str(caught.value) == (
        f"{tmp_path}: the weights do not fit the model: 1 missing (x), 2 unused (d.weight; empty), "
        "2 unlike (norm.weight: float32 [9], expected float32 [8]; "
        "b.weight: bfloat16 [3, 3], expected float16 [3, 3]). "
        "Were both made from the same model with the same quantization?"
    )


def test_check_shortens_long_lists(tmp_path: Path) -> None:
    publish(tmp_path)
    with pytest.raises(WeightsError, match=r"7 unused \(a.q_weight; .*; c.weight; and 2 more\)"):
        WeightFolder(tmp_path).check({})


def test_loading_an_unknown_name_is_an_error(tmp_path: Path) -> None:
    publish(tmp_path)
    with pytest.raises(WeightsError) as caught:
        WeightFolder(tmp_path).load("lm_head.weight")
    assert str(caught.value) == (
        f"{tmp_path / 'tensor-cache.json'}: no tensor lm_head.weight among the 7 of the index"
    )


def test_checksums_are_compared_when_asked(tmp_path: Path) -> None:
    publish(tmp_path)
    steps: list[tuple[int, int]] = []
    assert WeightFolder(tmp_path).verify_checksums(lambda *step: steps.append(step)) == 1
    shard = tmp_path / "params_shard_0.bin"
    data = bytearray(shard.read_bytes())
    assert steps == [(len(data), len(data))]
    before = hashlib.md5(data).hexdigest()
    data[70] ^= 1
    shard.write_bytes(data)
    with pytest.raises(WeightsError) as caught:
        WeightFolder(tmp_path).verify_checksums()
    assert str(caught.value) == (
        f"{shard}: its MD5 is {hashlib.md5(data).hexdigest()}, the index says {before}; {AGAIN}"
    )


def test_an_index_without_checksums_is_read(tmp_path: Path) -> None:
    publish(tmp_path)
    edit(tmp_path, lambda index: index["records"][0].pop("md5sum"))
    assert WeightFolder(tmp_path).verify_checksums() == 0


def edit(folder: Path, change) -> None:
    path = folder / "tensor-cache.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def set_record(key: str, value: object, i: int = 0):
    return lambda index: index["records"][0]["records"][i].__setitem__(key, value)


def set_shard(key: str, value: object):
    return lambda index: index["records"][0].__setitem__(key, value)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda index: index.pop("records"), "records of the index is None, expected list; {}"),
        (lambda index: index["records"].append(3), "dataPath of a shard is None, expected str; {}"),
        (set_shard("nbytes", "9"), "nbytes of params_shard_0.bin is '9', expected int; {}"),
        (
            set_shard("format", "zip"),
            "params_shard_0.bin has format 'zip', expected 'raw-shard'",
        ),
        (
            set_shard("dataPath", "../x.bin"),
            "dataPath '../x.bin' is not a file of the same folder",
        ),
        (set_record("name", 5), "name of a tensor of params_shard_0.bin is 5, expected str; {}"),
        (set_record("shape", [5, 3.0]), "a.q_weight has shape [5, 3.0]; {}"),
        (set_record("shape", [5, -3]), "a.q_weight has shape [5, -3]; {}"),
        (
            set_record("dtype", "int4"),
            "a.q_weight has dtype 'int4', expected one of float32, float16, bfloat16, "
            "float8_e4m3fn, float8_e5m2, uint32, int32, uint16, int16, uint8, int8",
        ),
        (
            set_record("format", "zstd"),
            "a.q_weight has format 'zstd', expected one of raw, f32-to-bf16",
        ),
        (
            set_record("nbytes", 56),
            "a.q_weight has 56 bytes at 0, expected 60 for uint32 [5, 3] in format "
            "'f32-to-bf16'; {}",
        ),
        (
            set_record("format", "raw", 2),
            "norm.weight has 18 bytes at 70, expected 36 for float32 [9] in format 'raw'; {}",
        ),
        (
            set_record("byteOffset", -4),
            "a.q_weight has 60 bytes at -4, expected 60 for uint32 [5, 3] in format "
            "'f32-to-bf16'; {}",
        ),
        (
            set_record("byteOffset", 100),
            "a.q_weight ends at byte 160 of params_shard_0.bin, which has 120; {}",
        ),
        (set_record("name", "norm.weight"), "norm.weight is listed twice; {}"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, change, complaint: str) -> None:
    publish(tmp_path)
    edit(tmp_path, change)
    assert message(tmp_path) == f"{tmp_path / 'tensor-cache.json'}: {complaint.format(AGAIN)}"


def test_an_index_that_is_not_json_is_refused(tmp_path: Path) -> None:
    publish(tmp_path)
    path = tmp_path / "tensor-cache.json"
    path.write_text(path.read_text()[:10])
    assert message(tmp_path) == (
        f"{path}: not valid JSON: Unterminated string starting at at line 1, column 2. "
        "Is the file complete?"
    )


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    publish(tmp_path)
    (tmp_path / "params_shard_0.bin").unlink()
    assert message(tmp_path) == (
        f"{tmp_path / 'params_shard_0.bin'} is missing, and tensor-cache.json names it; {AGAIN}"
    )


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    publish(tmp_path)
    shard = tmp_path / "params_shard_0.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert message(tmp_path) == (
        f"{shard}: 119 bytes, expected 120 as tensor-cache.json says; {AGAIN}"
    )


@pytest.mark.parametrize(
    "name, what", [("params_shard_0.bin", "weights"), ("tensor-cache.json", "tensor-cache.json")]
)
def test_git_lfs_pointers_are_recognised(tmp_path: Path, name: str, what: str) -> None:
    publish(tmp_path)
    (tmp_path / name).write_bytes(LFS_POINTER)
    assert message(tmp_path) == (
        f"{tmp_path / name} is a Git LFS pointer, not {what} ({len(LFS_POINTER)} bytes): "
        f"run `git lfs pull` in {tmp_path}, or download the file again"
    )


NO_INDEX = "no tensor-cache.json (or ndarray-cache.json)"


def test_shards_without_an_index_are_an_interrupted_conversion(tmp_path: Path) -> None:
    publish(tmp_path)
    (tmp_path / "tensor-cache.json").unlink()
    assert message(tmp_path) == (
        f"{tmp_path}: {NO_INDEX}, but 1 params_shard_*.bin: the conversion or download was "
        "interrupted, or is still running; run `relaxlm convert_weight` again, or download the "
        "folder completely"
    )


def test_a_checkpoint_is_told_from_a_converted_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert message(tmp_path) == (
        f"{tmp_path}: {NO_INDEX}: this is a checkpoint that is not converted yet; run "
        f"`relaxlm convert_weight {tmp_path} --quantization q4f16_1 -o OUTPUT`"
    )


def test_any_other_folder_is_refused(tmp_path: Path) -> None:
    assert message(tmp_path) == (
        f"{tmp_path}: {NO_INDEX}: no converted weights here; make them with "
        "`relaxlm convert_weight CHECKPOINT --quantization q4f16_1 -o OUTPUT`"
    )
    absent = tmp_path / "absent"
    assert message(absent) == f"{absent} is not a folder, expected a folder of converted weights"
