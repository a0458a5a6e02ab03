"""The written container against its description, and against TVM's own reader and writer."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from relaxlm.quantization import container
from relaxlm.quantization.container import ContainerWriter, to_bfloat16_bits
from relaxlm.runtime.params import WeightFolder

MIB = 1 << 20


def random(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(len(shape) + sum(shape))
    if dtype == "uint32":
        return rng.integers(1, 2**32, shape, np.uint32)
    return rng.uniform(0.5, 1.5, shape).astype(np.dtype(dtype))


TENSORS = {
    "embed.q_weight": random((33, 12), "uint32"),
    "embed.q_scale": random((33, 3), "float16"),
    "norm.weight": random((7,), "float32"),
    "brain.weight": random((5, 3), "bfloat16"),
    "bytes": random((3,), "uint32").view(np.int8),
    "scalar": np.array(1.5, np.float16),
}


def write(folder: Path, tensors: dict[str, np.ndarray], **options) -> dict:
    with ContainerWriter(folder, **options) as writer:
        for name, array in tensors.items():
            writer.add(name, array)
        writer.finish(source_parameters=1000)
    return json.loads((folder / "tensor-cache.json").read_text())


def test_the_index_describes_every_tensor(tmp_path: Path) -> None:
    index = write(tmp_path, TENSORS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("ndarray-cache.json", "params_shard_0.bin", "tensor-cache.json")
    ]
    both = [(tmp_path / name).read_bytes() for name in ("ndarray-cache.json", "tensor-cache.json")]
    assert both[0] == both[1]
    nbytes = sum(array.nbytes for array in TENSORS.values())
    assert index["metadata"] == {
        "ParamSize": len(TENSORS),
        "ParamBytes": float(nbytes),
        "BitsPerParam": nbytes * 8 / 1000,
    }
    (shard,) = index["records"]
    data = (tmp_path / "params_shard_0.bin").read_bytes()
    assert {key: value for key, value in shard.items() if key != "records"} == {
        "dataPath": "params_shard_0.bin",
        "format": "raw-shard",
        "nbytes": len(data),
        "md5sum": hashlib.md5(data).hexdigest(),
    }
    assert [record["name"] for record in shard["records"]] == list(TENSORS)
    for record in shard["records"]:
        array = TENSORS[record["name"]]
        assert record == {
            "name": record["name"],
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "format": "raw",
            "nbytes": array.nbytes,
            "byteOffset": record["byteOffset"],
        }
        assert record["byteOffset"] % 64 == 0
        stored = data[record["byteOffset"] : record["byteOffset"] + record["nbytes"]]
        assert stored == array.tobytes()


def blocks(*sizes: int) -> dict[str, np.ndarray]:
    return {f"t{i}": np.full(size, i + 1, np.uint8) for i, size in enumerate(sizes)}


@pytest.mark.parametrize(
    "sizes, shards",
    [
        # Small tensors share a file up to, but not including, 32 MiB.
        ((10 * MIB, 10 * MIB, 10 * MIB), [["t0", "t1", "t2"]]),
        ((10 * MIB, 10 * MIB, 12 * MIB), [["t0", "t1"], ["t2"]]),
        ((10 * MIB, 10 * MIB, 12 * MIB - 64), [["t0", "t1", "t2"]]),
        # One of 16 MiB or more that does not fit overtakes those that are pending.
        ((10 * MIB, 16 * MIB, 10 * MIB), [["t0", "t1"], ["t2"]]),
        ((20 * MIB, 16 * MIB, 5 * MIB), [["t1"], ["t0", "t2"]]),
        ((20 * MIB, 16 * MIB - 64, 5 * MIB), [["t0"], ["t1", "t2"]]),
        ((1, 40 * MIB, 1), [["t1"], ["t0", "t2"]]),
        ((32 * MIB,), [["t0"]]),
    ],
)
def test_tensors_are_dealt_to_shards_as_documented(
    tmp_path: Path, sizes: tuple[int, ...], shards: list[list[str]]
) -> None:
    index = write(tmp_path, blocks(*sizes))
    assert [[r["name"] for r in shard["records"]] for shard in index["records"]] == shards
    assert [shard["dataPath"] for shard in index["records"]] == [
        f"params_shard_{i}.bin" for i in range(len(shards))
    ]
    for name, array in blocks(*sizes).items():
        np.testing.assert_array_equal(WeightFolder(tmp_path).load(name), array)


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for run in ("first", "second"):
        write(tmp_path / run, TENSORS | blocks(3, 40 * MIB))
        contents.append({path.name: path.read_bytes() for path in (tmp_path / run).iterdir()})
    assert contents[0] == contents[1]


def test_float32_is_exact_unless_asked_otherwise(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    np.testing.assert_array_equal(
        WeightFolder(tmp_path).load("norm.weight"), TENSORS["norm.weight"]
    )


def test_float32_as_bfloat16_has_a_second_index(tmp_path: Path) -> None:
    index = write(tmp_path, TENSORS, float32_format="f32-to-bf16")
    array = TENSORS["norm.weight"]
    rounded = array.astype(ml_dtypes.bfloat16)
    (record,) = [r for r in index["records"][0]["records"] if r["name"] == "norm.weight"]
    assert (record["dtype"], record["format"]) == ("float32", "f32-to-bf16")
    assert record["nbytes"] == array.nbytes // 2
    assert index["metadata"]["ParamBytes"] == sum(array.nbytes for array in TENSORS.values())
    loaded = WeightFolder(tmp_path).load("norm.weight")
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, rounded.astype(np.float32))

    texts = [(tmp_path / f"{name}-cache-b16.json").read_text() for name in ("tensor", "ndarray")]
    assert texts[0] == texts[1]
    (as_stored,) = json.loads(texts[0])["records"]
    for mine, theirs in zip(as_stored["records"], index["records"][0]["records"], strict=True):
        change = {"dtype": "bfloat16", "format": "raw"} if mine["name"] == "norm.weight" else {}
        assert mine == theirs | change


def test_no_second_index_without_float32_tensors(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, float32_format="f32-to-bf16")
    halves = {name: array for name, array in TENSORS.items() if array.dtype != np.float32}
    write(tmp_path, halves, float32_format="f32-to-bf16")
    assert not list(tmp_path.glob("*b16*"))


def test_bfloat16_bits_are_tvms() -> None:
    tvmjs = pytest.importorskip("tvm.contrib.tvmjs")
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 1_000_000, np.uint32)
    limits = np.array(
        [0x7F7F0000, 0x7F7EFFFF, 0x7F7F8000, 0x7F7FFFFF, 0, 0x8000, 0x18000], np.uint32
    )
    values = np.concatenate([bits, limits, limits | np.uint32(1 << 31)]).view(np.float32)
    values = values[np.isfinite(values)]
    np.testing.assert_array_equal(to_bfloat16_bits(values), tvmjs._convert_f32_to_bf16(values))


def load_with_tvm(folder: Path, names: list[str]) -> list[np.ndarray]:
    import tvm

    tvm.get_global_func("vm.builtin.tensor_cache.clear")()
    tvm.get_global_func("vm.builtin.tensor_cache.load")(
        str(folder), tvm.cpu().dlpack_device_type(), 0
    )
    tensors = tvm.get_global_func("vm.builtin.param_array_from_cache_by_name")(names)
    return [tensor.numpy() for tensor in tensors]


@pytest.mark.parametrize("float32_format", ["raw", "f32-to-bf16"])
def test_tvms_reader_gives_the_same_tensors(tmp_path: Path, float32_format: str) -> None:
    tensors = TENSORS | {"big": random((2100, 4000), "float16")}
    write(tmp_path, tensors, float32_format=float32_format)
    ours = WeightFolder(tmp_path)
    for name, theirs in zip(tensors, load_with_tvm(tmp_path, list(tensors)), strict=True):
        assert theirs.dtype == ours.load(name).dtype
        np.testing.assert_array_equal(theirs, ours.load(name))


@pytest.mark.parametrize("float32_format", ["raw", "f32-to-bf16"])
def test_tvms_writer_deals_the_same_shards(
    tmp_path: Path, float32_format: str, capsys: pytest.CaptureFixture
) -> None:
    """Sizes are multiples of 64 here, so that there is no padding and files are equal in bytes."""
    tvmjs = pytest.importorskip("tvm.contrib.tvmjs")
    rng = np.random.default_rng(1)
    tensors = {}
    for i, size in enumerate(rng.integers(1, 40 * MIB // 128, 12) * 128):
        dtype = ("float32", "float16", "uint32")[i % 3]
        tensors[f"t{i}"] = random((int(size) // 8, 2), dtype)
    (tmp_path / "theirs").mkdir()
    tvmjs.dump_tensor_cache(tensors, str(tmp_path / "theirs"), float32_format, show_progress=False)
    index = write(tmp_path / "ours", tensors, float32_format=float32_format)
    theirs = json.loads((tmp_path / "theirs" / "tensor-cache.json").read_text())
    assert index["records"] == theirs["records"]
    for shard in index["records"]:
        name = shard["dataPath"]
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_without_finish_nothing_is_left_and_nothing_is_lost(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    (tmp_path / "mlc-chat-config.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt), ContainerWriter(tmp_path) as writer:
        writer.add("x", np.ones(40 * MIB, np.uint8))
        assert (tmp_path / container.PARTIAL_FOLDER / "params_shard_0.bin").exists()
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_new_container_replaces_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mlc-chat-config.json").write_text("{}")
    write(tmp_path, blocks(40 * MIB, 40 * MIB, 5), float32_format="f32-to-bf16")
    assert (tmp_path / "params_shard_2.bin").exists()
    write(tmp_path, TENSORS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("mlc-chat-config.json", "ndarray-cache.json", "params_shard_0.bin", "tensor-cache.json")
    ]
    assert list(WeightFolder(tmp_path).records) == list(TENSORS)


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / container.PARTIAL_FOLDER
    leftover.mkdir()
    (leftover / "params_shard_0.bin").write_bytes(b"half")
    write(tmp_path, TENSORS)
    assert not leftover.exists()
