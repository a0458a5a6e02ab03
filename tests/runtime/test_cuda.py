import ctypes
import stat
from pathlib import Path

import pytest

from relaxlm.runtime import cuda


@pytest.fixture(autouse=True)
def fresh() -> None:
    cuda.gpus.cache_clear()


def no_driver(*_: object, **__: object) -> ctypes.CDLL:
    raise OSError("libcuda.so.1: cannot open shared object file")


def write_nvidia_smi(folder: Path, text: str, status: int = 0) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)


def test_gpus_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    write_nvidia_smi(tmp_path, "9.0, NVIDIA H100 80GB HBM3\n8.6, NVIDIA A10\n[N/A], Broken")
    assert cuda.gpus() == (
        cuda.Gpu("NVIDIA H100 80GB HBM3", "sm_90"),
        cuda.Gpu("NVIDIA A10", "sm_86"),
    )


@pytest.mark.parametrize("status", [9, None], ids=["no-driver", "no-tool"])
def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int | None) -> None:
    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    monkeypatch.setenv("PATH", str(tmp_path))
    if status is not None:
        write_nvidia_smi(tmp_path, "NVIDIA-SMI has failed", status)
    assert cuda.gpus() == ()
    assert cuda.load_runtime() is False


class Driver:
    """A driver API with two GPUs, the second of which does not answer."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count) -> int:
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name, size: int, device) -> int:
        name.value = b"Test GPU"
        return 0

    def cuDeviceGetAttribute(self, value, attribute: int, device) -> int:
        value._obj.value = {75: 12, 76: 1}[attribute]
        return 0 if device.value == 0 else 999


def test_gpus_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Driver())
    assert cuda.gpus() == (cuda.Gpu("Test GPU", "sm_121"),)


def test_a_driver_without_gpus_is_not_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    driver.cuInit = lambda flags: 100  # type: ignore[method-assign]
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: driver)
    assert cuda.gpus() == ()


def test_cudart_is_found_in_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def load(name: str, mode: int = 0) -> None:
        tried.append(name)
        if name != str(tmp_path / "lib" / cuda.CUDART):
            raise OSError(name)

    monkeypatch.setattr(cuda, "nvidia_wheel_folders", lambda: [tmp_path])
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert cuda.load_cudart() == str(tmp_path / "lib" / "libcudart.so.13")
    assert tried == ["libcudart.so.13", str(tmp_path / "lib" / "libcudart.so.13")]
