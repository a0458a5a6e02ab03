import sys

import pytest

from relaxlm.runtime import cpu

XEON = """
processor\t: 0
flags\t\t: fpu sse2 pni ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt avx f16c lahf_lm abm bmi1 avx2 \
bmi2 avx512f avx512dq avx512bw avx512vl avx512_vnni amx_int8
bugs\t\t: spectre_v1

processor\t: 1
flags\t\t: fpu sse2 pni ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt avx f16c lahf_lm abm bmi1 \
avx2 bmi2
"""
GRAVITON = """
processor\t: 0
Features\t: fp asimd evtstrm aes atomics fphp asimdhp cpuid asimdrdm lrcpc asimddp sve i8mm bf16
"""
MAC = {
    "hw.optional.AdvSIMD": "1",
    "hw.optional.arm.FEAT_DotProd": "1",
    "hw.optional.arm.FEAT_BF16": "0",
}
INTEL_MAC = {
    "machdep.cpu.features": "FPU SSE SSE2 SSE3 FMA CX16 SSE4.2 AVX1.0 F16C",
    "machdep.cpu.leaf7_features": "BMI1 AVX2 BMI2",
    "machdep.cpu.extfeatures": "LAHF LZCNT",
}


def test_linux_features_are_those_of_every_core() -> None:
    assert sorted(cpu.linux_features(XEON, "x86_64")) == sorted(
        "sse3 ssse3 fma cx16 sse4.1 sse4.2 movbe popcnt avx f16c sahf lzcnt bmi avx2 bmi2".split()
    )
    assert "avx512vnni" in cpu.linux_features(XEON.split("\n\n")[0], "x86_64")


def test_arm_features() -> None:
    assert sorted(cpu.linux_features(GRAVITON, "aarch64")) == sorted(
        "fp-armv8 neon lse fullfp16 rdm rcpc dotprod sve i8mm bf16".split()
    )


def test_macos_features() -> None:
    assert cpu.macos_features(MAC, "aarch64") == {"neon", "dotprod"}
    assert cpu.macos_features(INTEL_MAC, "x86_64") == {
        *("sse3", "fma", "cx16", "sse4.2", "avx", "f16c", "bmi", "avx2", "bmi2", "sahf", "lzcnt")
    }


@pytest.mark.parametrize("arch", ["riscv64", "x86_64"])
def test_what_cannot_be_read_counts_as_missing(arch: str) -> None:
    assert cpu.linux_features("processor : 0\nhart : 1\n", arch) == frozenset()


def test_this_machine() -> None:
    found = cpu.host_cpu_features()
    assert found <= cpu.tracked_features()
    if sys.platform == "linux" and cpu.architecture() == "x86_64":
        # Whoever has one of these has the ones that it builds on, whatever the hypervisor hides.
        for feature, base in (("avx2", "avx"), ("avx512bw", "avx512f"), ("sse4.2", "sse3")):
            assert feature not in found or base in found


def test_missing_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "host_cpu_features", lambda: frozenset({"avx", "avx2"}))
    assert cpu.missing_features(["fma", "avx2", "avx512f"]) == ("avx512f", "fma")
    assert cpu.missing_features(["avx"]) == ()


def test_architecture_names() -> None:
    assert [cpu.architecture(name) for name in ("AMD64", "arm64", "x86_64", "riscv64")] == [
        *("x86_64", "aarch64", "x86_64", "riscv64")
    ]
