"""One library with a version of its code for each of several CPUs."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from relaxlm.compiler.platforms import CPU_LEVELS, PLATFORMS, portable_levels, this_platform
from relaxlm.compiler.request import CompileRequest
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import ConfigError, LibraryError
from relaxlm.runtime import cpu, multiversion
from relaxlm.runtime.library import Library
from relaxlm.runtime.multiversion import MAGIC, VARIABLE, Version, choose, read_index
from tests.compiler import runtime_step
from tests.compiler.conftest import CONFIG, LIMITS, Portable
from tests.models.parity import dequantized_state
from tests.numpy_llama import llama_logits
from tests.tiny_model import TinyModel


@pytest.fixture(scope="module")
def expected(portable: Portable) -> np.ndarray:
    """The model's logits in float64, with the weights that 4 bits keep, [3, vocab]."""
    state = {name: torch.from_numpy(array) for name, array in portable.weights.items()}
    kept = dequantized_state(CONFIG, state, "q4f16_1")
    weights = {name: tensor.numpy() for name, tensor in kept.items()}
    return llama_logits(weights, CONFIG, runtime_step.IDS)[np.cumsum(runtime_step.CHUNKS) - 1]


def refusal(path: Path) -> str:
    with pytest.raises(LibraryError) as raised:
        Library.load(path)
    return str(raised.value)


@pytest.mark.parametrize("name", portable_levels(this_platform()))
def test_every_version_computes_the_model(
    name: str, portable: Portable, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing := cpu.missing_features(resolve_device("cpu", name).cpu_features):
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    monkeypatch.setenv(VARIABLE, name)
    library = Library.load(portable.library)
    assert library.metadata.target.arch == [name]
    assert library.device == f"cpu ({name}, of {', '.join(portable.versions)})"
    rounded = "act_quant=1" in library.metadata.opt
    assert rounded == (name not in ("x86-64-v2", "armv8-a"))
    found = runtime_step.logits(portable.library, portable.folder)
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    if rounded:  # every activation to 8 bits, and with AMX to bfloat16
        assert 1e-4 < error.max() < 6e-2
    else:
        assert error.max() < 1e-5


def test_versions_agree_in_what_surrounds_the_code(
    portable: Portable, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = Library.load(portable.library)
    fitting = [one.name for one in read_index(portable.library) if not one.missing]
    assert best.metadata.target.arch == fitting[-1:]
    for name in fitting:
        monkeypatch.setenv(VARIABLE, name)
        info = Library.load(portable.library).metadata
        for part in ("params", "kv_cache", "state", "limits", "model_config_json"):
            assert getattr(info, part) == getattr(best.metadata, part)
        assert info.target.cpu_features == sorted(CPU_LEVELS[info.target.cpu][name])
        # What is printed of its memory is enough for each.
        assert info.step_bytes <= portable.metadata.step_bytes


def test_progress_names_the_version(portable: Portable) -> None:
    compiling = [
        f"{name}: {stage}" for name in portable.versions for stage in ("lower", "generate code")
    ]
    linking = [f"{name}: link" for name in portable.versions[1:]]
    assert [stage for stage, _ in portable.stages] == [*compiling, *linking, "link"]
    shares = [share for _, share in portable.stages]
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] < 1


# Which one is loaded

INDEX = [
    Version(name, CPU_LEVELS["x86_64"][name]) for name in portable_levels(PLATFORMS["linux-x86_64"])
]


@pytest.mark.parametrize(
    ("features", "name"),
    [
        (CPU_LEVELS["x86_64"]["x86-64-v2"], "x86-64-v2"),
        ({*CPU_LEVELS["x86_64"]["x86-64-v3"]} - {"fma"}, "x86-64-v2"),
        (CPU_LEVELS["x86_64"]["x86-64-v3"], "x86-64-v3"),
        ((*CPU_LEVELS["x86_64"]["x86-64-v3"], "avxvnni", "gfni"), "x86-64-v3+avxvnni"),
        (CPU_LEVELS["x86_64"]["x86-64-v4"], "x86-64-v3"),
        (CPU_LEVELS["x86_64"]["x86-64-v4+vnni"], "x86-64-v4+vnni"),
        ((*CPU_LEVELS["x86_64"]["x86-64-v4+vnni"], "avxvnni"), "x86-64-v4+vnni"),
        (CPU_LEVELS["x86_64"]["x86-64-v4+vnni+bf16"], "x86-64-v4+vnni+bf16"),
        (CPU_LEVELS["x86_64"]["x86-64-v4+amx"], "x86-64-v4+amx"),
        # None fits: the one that needs least is refused with what is missing.
        (("sse3",), "x86-64-v2"),
    ],
)
def test_the_best_that_a_cpu_can_run(
    features: tuple[str, ...], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "host_cpu_features", lambda: frozenset(features))
    monkeypatch.delenv(VARIABLE, raising=False)
    assert choose(INDEX, Path("a.so")).name == name


def test_none_of_them_runs_here(portable: Portable, monkeypatch: pytest.MonkeyPatch) -> None:
    (plainest, *_) = read_index(portable.library)
    monkeypatch.setattr(cpu, "host_cpu_features", frozenset)
    assert refusal(portable.library) == (
        f"{portable.library} needs CPU features that this machine lacks: "
        f"{', '.join(plainest.cpu_features)}; compile it again here: relaxlm compile FOLDER "
        "--device cpu, or for many machines with --arch portable"
    )


def test_a_named_version(
    tiny: TinyModel, portable: Portable, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = portable.versions[:2]
    monkeypatch.setenv(VARIABLE, "pentium")
    assert refusal(portable.library) == (
        f"{VARIABLE}=pentium: {portable.library} has no such version, only "
        f"{', '.join(portable.versions)}; set {VARIABLE} to one of these, or unset it"
    )
    assert refusal(tiny.library) == (
        f"{VARIABLE}=pentium: {tiny.library} has no such version, only native; set {VARIABLE} to "
        "one of these, or unset it"
    )
    needs = {one.name: one.cpu_features for one in read_index(portable.library)}
    monkeypatch.setattr(cpu, "host_cpu_features", lambda: frozenset(needs[first]))
    monkeypatch.setenv(VARIABLE, second)
    lacking = ", ".join(sorted(set(needs[second]) - set(needs[first])))
    assert refusal(portable.library) == (
        f"{VARIABLE}={second}: that version of {portable.library} needs CPU features that this "
        f"machine lacks: {lacking}; here run {first}"
    )


# Damage


def test_damaged_versions(
    portable: Portable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, content = read_index(portable.library), portable.library.read_bytes()
    second, start = versions[1], content.find(MAGIC)
    monkeypatch.setattr(cpu, "host_cpu_features", lambda: frozenset(second.cpu_features))
    again = "; copy or compile it again"

    def damaged(change: dict[int, bytes]) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.so"
        altered = bytearray(content)
        for place, value in change.items():
            altered[place : place + len(value)] = value
        path.write_bytes(altered)
        before, _, what = refusal(path).partition(
            " is damaged where it holds versions for several CPUs: "
        )
        assert before == str(path)
        return what

    middle = second.offset + second.size // 2
    flipped = bytes([content[middle] ^ 255])
    assert damaged({middle: flipped}).startswith(f"{second.name}: Error -3 while decompressing")
    other = zlib.compress(b"another library", 9)
    assert damaged({second.offset: other}) == f"{second.name} is not what was written{again}"
    assert damaged({start + 30: b"?"}) == f"their index is not what was written{again}"
    assert damaged({start: b"?"}) == f"their index is not there{again}"
    # The plainest one needs none of the others.
    monkeypatch.setenv(VARIABLE, versions[0].name)
    path = tmp_path / "plainest.so"
    path.write_bytes(content[:middle] + flipped + content[middle + 1 :])
    assert Library.load(path).metadata.target.arch == [versions[0].name]


@pytest.mark.parametrize("bytes_left", [20, 30, 100, -1])
def test_an_index_that_ends_too_early(portable: Portable, tmp_path: Path, bytes_left: int) -> None:
    content = portable.library.read_bytes()
    last = read_index(portable.library)[-1]
    start, end = content.find(MAGIC), last.offset + last.size
    path = tmp_path / "a.so"
    path.write_bytes(content[: start + bytes_left if bytes_left > 0 else end - 1])
    with pytest.raises(LibraryError) as raised:
        read_index(path)
    what = {
        20: "the file ends in their index",
        -1: f"the file has {end - 1} bytes, expected at least {end}",
    }
    assert str(raised.value) == (
        f"{path} is damaged where it holds versions for several CPUs: "
        f"{what.get(bytes_left, 'their index is not what was written')}; copy or compile it again"
    )


# Where it is loaded from


def test_without_files_in_memory_it_is_one_in_the_cache(
    portable: Portable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = read_index(portable.library)[1]
    monkeypatch.setattr(cpu, "host_cpu_features", lambda: frozenset(second.cpu_features))
    monkeypatch.delattr("os.memfd_create", raising=False)
    monkeypatch.setenv("RELAXLM_CACHE", str(tmp_path))
    assert Library.load(portable.library).metadata.target.arch == [second.name]
    (file,) = (tmp_path / "versions").iterdir()
    assert file.name == f"{second.sha256[:32]}{portable.library.suffix}"
    library = file.read_bytes()
    file.unlink()  # the loaded one stays mapped
    file.write_bytes(library[:-1])
    assert Library.load(portable.library).metadata.target.arch == [second.name]
    assert file.read_bytes() == library

    (tmp_path / "file").touch()
    monkeypatch.setenv("RELAXLM_CACHE", str(tmp_path / "file"))
    assert refusal(portable.library) == (
        f"{tmp_path / 'file' / 'versions'}: the version of {portable.library} for this CPU cannot "
        "be unpacked there (Not a directory); set RELAXLM_CACHE to a folder that can be written, "
        "or compile for this machine alone with --device cpu"
    )


@pytest.mark.skipif(not hasattr(multiversion.os, "memfd_create"), reason="no files in memory")
def test_versions_in_memory_are_not_taken_for_each_other(
    portable: Portable, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The system's loader knows libraries by name: two in one place would be one.
    opened: list[str] = []
    load = multiversion.tvm_runtime.load_library
    monkeypatch.setattr(
        multiversion.tvm_runtime, "load_library", lambda path: (opened.append(path), load(path))[1]
    )
    second = read_index(portable.library)[1]
    content = portable.library.read_bytes()
    monkeypatch.setattr(cpu, "host_cpu_features", lambda: frozenset(second.cpu_features))
    Library.load(portable.library)
    Library.load(portable.library)
    assert opened[0] == opened[1] and opened[0].startswith("/proc/self/fd/")
    assert zlib.decompress(content[second.offset :][: second.size]) == Path(opened[0]).read_bytes()
    assert multiversion._in_memory(b"another library", "its digest") not in opened


# What is asked for


def test_a_request_has_the_options_of_each_version(portable: Portable) -> None:
    if cpu.architecture() != "x86_64":
        pytest.skip("levels of x86-64")
    request = CompileRequest.read(portable.folder, None, "cpu:x86-64-v3,x86-64-v2", None, LIMITS)
    assert [one.arch for one in request.device.versions] == [("x86-64-v2",), ("x86-64-v3",)]
    assert (request.options.opt, request.further[0].options.opt) == ("O2", "O2;act_quant=1")
    assert request.identity()["device"]["versions"] == ["x86-64-v2", "x86-64-v3"]
    alone = CompileRequest.read(portable.folder, None, "cpu:x86-64-v2", None, LIMITS)
    assert json.dumps(request.identity()) != json.dumps(alone.identity())
    with pytest.raises(
        ConfigError, match=r"^--opt act_quant=1 needs a CPU with .*x86-64-v2 is not"
    ):
        CompileRequest.read(
            portable.folder, None, "cpu:x86-64-v3,x86-64-v2", None, LIMITS, "act_quant=1"
        ).compile()


def test_what_portable_stands_for() -> None:
    names = {
        device: [one.arch[0] for one in resolve_device(f"{device}:portable").versions]
        for device in ("linux-x86_64", "linux-arm64", "macos-arm64", "windows-x86_64")
    }
    arm = list(CPU_LEVELS["aarch64"])
    assert names == {
        "linux-x86_64": [name for name in CPU_LEVELS["x86_64"] if name != "x86-64-v4"],
        "linux-arm64": arm,
        "macos-arm64": arm[1:],
        "windows-x86_64": ["x86-64-v2", "x86-64-v3"],
    }


def test_the_plainest_comes_first_and_each_once() -> None:
    device = resolve_device("linux-x86_64", "x86-64-v4,x86-64-v2, x86-64-v3+avxvnni,x86-64-v2")
    names = ["x86-64-v2", "x86-64-v4", "x86-64-v3+avxvnni"]
    assert [one.arch[0] for one in device.versions] == names
    assert device.describe()["versions"] == names
    assert device.further[0].describe()["versions"] == []


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (
            "android-arm64:portable",
            "arch 'portable': nothing chooses among versions of a library for android-arm64 when "
            "it is loaded; name one processor or level",
        ),
        (
            "ios:armv8-a,armv8.6-a",
            "arch 'armv8-a,armv8.6-a': nothing chooses among versions of a library for ios when it "
            "is loaded; name one processor or level",
        ),
        (
            "linux-riscv64:portable",
            "arch 'portable': linux-riscv64 has one architecture; leave it out",
        ),
        (
            "linux-x86_64:x86-64-v2,",
            "arch 'x86-64-v2,': a name is missing between commas",
        ),
    ],
)
def test_what_cannot_be(device: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_device(device)
    assert str(raised.value) == message


def test_object_files_are_for_one_version() -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_device("linux-arm64:portable").check_output(Path("m.tar"))
    assert str(raised.value) == (
        "output m.tar: object files are for one version of the code, not for armv8-a, "
        "armv8.2-a+dotprod, armv8.6-a; name one of them with --arch"
    )
