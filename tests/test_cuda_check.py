"""benchmarks/cuda_check.py: what runs where one item crashes or hangs, and what the tables say."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "cuda_check_run.py"
# Stands in for the worker: prints what it is told to, crashes or hangs.
WORKER = """
import json, sys, time
from pathlib import Path
folder, numbers = Path(sys.argv[2]), map(int, sys.argv[3:])
items = json.loads((folder / "manifest.json").read_text())["items"]
with (folder / "starts.txt").open("a") as file:
    file.write(" ".join(sys.argv[3:]) + chr(10))
for number in numbers:
    what = items[number]["does"]
    if what == "crash":
        sys.exit("an illegal memory access")
    if what == "hang":
        time.sleep(60)
    print("RESULT", number, json.dumps(what), flush=True)
"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_check_run", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(module, "SCRIPT", worker)
    return module


def item(part: str, name: str, does: object, **more: object) -> dict:
    return {"part": part, "name": name, "does": does, **more}


SPEED = {
    "prefill_s": 0.5,
    "decode_s": 0.01,
    "decode_single_s": 0.0125,
    "prompt": 100,
    "decode_bytes": 4e9,
    "operations": 1e12,
}
ITEMS = [
    item("machine", "machine", {"device": "H", "read_bytes_per_s": 8e11, "copy_bytes_per_s": 7e11}),
    item("kernel", "right", {"error": 1e-6, "limit": 1e-5}),
    item("kernel", "crashes", "crash"),
    item("kernel", "wrong", {"error": 1e-4, "limit": 1e-5}),
    item("model", "hangs", "hang"),
    item("model", "off", {"error": 0.5, "limit": 0.1, "layers": [0.0, 0.01, 0.3, 0.4]}),
    item("gemm", "gemm 1b", {"operations_per_s": 4e12}),
    item("speed", "1b q0f16", SPEED, shape="1b"),
    item("model", "late", {"error": 0.0, "limit": 0.1}),
]


def test_what_fails_stops_nothing_else(
    check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path, tmp_path / "output"
    (folder / "manifest.json").write_text(json.dumps({"items": ITEMS}))
    assert check.run(folder, output, [], seconds=60, limit=3) is False
    results = json.loads((output / "results.json").read_text())
    assert results["crashes"] == {"failed": "ended with status 1: an illegal memory access"}
    assert results["hangs"] == {"failed": "no result within 3 s"}
    assert list(results) == [item["name"] for item in ITEMS]
    # In the order given, a process per part, and another one for what comes after an item that
    # fails.
    starts = (folder / "starts.txt").read_text().splitlines()
    assert starts == ["0", "1 2 3", "3", "4 5", "5", "6", "7", "8"]
    table = (output / "results.md").read_text()
    assert table in capsys.readouterr().out
    assert table.startswith("2 of 6 kernels and models are right; 4 are not, 0 did not run.\n")
    assert "| off | 5.0e-01 | 1e-01 | 2 |" in table
    # 400 of 800 GB/s, and 2 of 4 Tops/s.
    assert "| 1b q0f16 | 100.0 | 400.0 | 50.0% | 80.0 | 200 | 2.00 | 50.0% |  |  |" in table
    # Once more: only what failed, of the parts asked for.
    assert check.run(folder, output, ["kernel"], seconds=60, limit=3) is False
    assert (folder / "starts.txt").read_text().splitlines()[len(starts) :] == ["2"]


def test_arrays_keep_their_dtypes(check: ModuleType, tmp_path: Path) -> None:
    import ml_dtypes

    values = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    arrays = {"params/a": values.astype(ml_dtypes.bfloat16), "ids": np.arange(3)}
    check.save_arrays(tmp_path / "a.npz", arrays)
    found = check.load_arrays(tmp_path / "a.npz")
    assert {name: array.dtype for name, array in found.items()} == {
        name: array.dtype for name, array in arrays.items()
    }
    np.testing.assert_array_equal(found["params/a"], arrays["params/a"])
    assert check.relative(values, values + np.float32(0.5)) == pytest.approx(0.5 / 1.5)
    values[0, 0] = np.nan
    assert check.relative(values, values) == float("inf")
