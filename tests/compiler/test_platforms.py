"""Other machines as targets: what `--device` names, and what code for them may use."""

from pathlib import Path

import pytest
from tvm.target import codegen

from relaxlm.compiler.platforms import CPU_LEVELS, PLATFORMS, WEB, features_of, this_platform
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import ConfigError
from relaxlm.runtime import cpu


@pytest.mark.parametrize("name", PLATFORMS)
def test_llvm_uses_what_a_platform_has_and_nothing_else(name: str) -> None:
    device = resolve_device(name)
    target = device.tvm_target(2)
    platform = device.platform
    has = {
        feature
        for feature in cpu.tracked_features(platform.cpu)
        if codegen.target_has_features(feature, target)
    }
    assert has == set(device.cpu_features)
    if not platform.has_linker:
        assert target.attrs["mtriple"] == platform.triple


@pytest.mark.parametrize("arch", [*CPU_LEVELS["aarch64"], "cortex-a76", "neoverse-v1"])
def test_levels_and_processors_of_arm(arch: str) -> None:
    device = resolve_device(f"linux-arm64:{arch}")
    assert device == resolve_device("linux-arm64", arch)
    assert device.describe() == {
        "kind": "cpu",
        "arch": [arch],
        "versions": [],
        "system": "linux",
        "cpu": "aarch64",
        "cpu_features": list(device.cpu_features),
    }
    assert {"neon", "fp-armv8"} <= set(device.cpu_features)
    assert ("i8mm" in device.cpu_features) == (arch in ("armv8.6-a", "neoverse-v1"))
    target = device.tvm_target(2)
    for feature in device.cpu_features:
        assert codegen.target_has_features(feature, target), feature


def test_processors_that_llvm_does_not_know() -> None:
    with pytest.raises(ConfigError, match=r"arch 'zen4' is not known for linux-x86_64; expected"):
        features_of(PLATFORMS["linux-x86_64"], "zen4")
    with pytest.raises(ConfigError) as caught:
        resolve_device("linux-riscv64", "sifive-u74")
    assert str(caught.value) == (
        "arch 'sifive-u74': linux-riscv64 has one architecture; leave it out"
    )
    with pytest.raises(ConfigError) as caught:
        resolve_device("linux-arm64:cortex-a76", "armv8-a")
    assert str(caught.value) == (
        "device 'linux-arm64:cortex-a76' and arch 'armv8-a' name two architectures: give one"
    )


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("linux-arm64", "m.so"),
        ("macos-arm64", "m.dylib"),
        ("windows-x86_64", "m.dll"),
        ("ios", "m.a"),
        ("android-arm64", "m.tar"),
        ("wasm", "m.wasm"),
    ],
)
def test_suffix_and_target_belong_together(device: str, name: str) -> None:
    target = resolve_device(device)
    target.check_output(Path(name))
    for other in {".so", ".dylib", ".dll", ".a", ".wasm", ".bin", ""} - {Path(name).suffix}:
        if other not in target.platform.suffixes:
            with pytest.raises(ConfigError, match=f"a library for {device} is a \\*"):
                target.check_output(Path(f"m{other}"))


def test_the_message_about_a_wrong_suffix() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_device("macos-arm64").check_output(Path("out/m.so"))
    assert str(caught.value) == (
        "output out/m.so: a library for macos-arm64 is a *.dylib file, not '.so'; *.tar holds "
        "object files"
    )


def test_zig_links_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "system", lambda: "win32")
    monkeypatch.setattr(cpu, "architecture", lambda machine=None: "x86_64")
    device = resolve_device("cpu")
    platform = device.platform
    assert (platform.name, platform.is_here, platform.has_linker) == (
        "windows-x86_64",
        True,
        False,
    )
    for one in (device, resolve_device("opencl")):
        assert str(one.tvm_target(2)).count(platform.triple) == 1
    assert PLATFORMS["linux-x86_64"].has_linker == PLATFORMS["linux-x86_64"].is_here


def test_this_machine_is_a_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_platform().is_here
    monkeypatch.setattr(cpu, "architecture", lambda machine=None: "s390x")
    assert this_platform().name == f"{cpu.system()}-s390x"
    assert not WEB.is_here
