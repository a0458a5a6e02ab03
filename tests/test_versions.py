import re
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from relaxlm import versions
from relaxlm.errors import VersionError

PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def fresh_check():
    versions.check_versions.cache_clear()
    yield
    versions.check_versions.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, **found: str | None) -> None:
    """Pretend that these versions are installed; None for a package that is not."""

    def version(name: str) -> str:
        value = found[name.replace("-", "_")]
        if value is None:
            raise metadata.PackageNotFoundError(name)
        return value

    monkeypatch.setattr(metadata, "version", version)


def test_pins_are_those_of_the_package_metadata():
    pins = dict(re.findall(r'^    "(apache-[a-z-]+)==([^"]+)",$', PYPROJECT, re.MULTILINE))
    assert versions.PINNED == pins


def test_the_installed_releases_pass():
    versions.check_versions()


def test_the_check_is_quick():
    versions.check_versions()  # imports importlib.metadata
    times = []
    for _ in range(5):
        versions.check_versions.cache_clear()
        start = time.perf_counter()
        versions.check_versions()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.02  # 2 ms where it was written; room for a slow disk


def test_another_tvm_ffi_is_an_error_that_names_both(monkeypatch):
    install(monkeypatch, apache_tvm="0.27.0.post1", apache_tvm_ffi="0.1.15.post2")
    with pytest.raises(VersionError) as error:
        versions.check_versions()
    assert str(error.value) == (
        "apache-tvm-ffi is 0.1.15.post2, expected 0.1.14.post1: relaxlm 0.1.0 works with exactly "
        f"these releases. Install them with\n    {sys.executable} -m pip install "
        "apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1"
    )


def test_a_missing_tvm_and_another_tvm_ffi_are_both_named(monkeypatch):
    install(monkeypatch, apache_tvm=None, apache_tvm_ffi="0.1.12")
    with pytest.raises(VersionError) as error:
        versions.check_versions()
    assert str(error.value).startswith(
        "apache-tvm is not installed, expected 0.27.0.post1; "
        "apache-tvm-ffi is 0.1.12, expected 0.1.14.post1: "
    )


def test_a_failed_check_is_made_again(monkeypatch):
    install(monkeypatch, apache_tvm="0.26.0", apache_tvm_ffi="0.1.14.post1")
    with pytest.raises(VersionError):
        versions.check_versions()
    install(monkeypatch, apache_tvm="0.27.0.post1", apache_tvm_ffi="0.1.14.post1")
    versions.check_versions()
