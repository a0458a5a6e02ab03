"""Libraries for other machines: zig links them, and what they need there is known."""

from pathlib import Path

import pytest
from tvm import relax, te, tirx

from relaxlm.compiler import cross
from relaxlm.compiler.cross import allowed_symbols, undefined_symbols, zig_linker
from relaxlm.compiler.link import export_library
from relaxlm.compiler.multiversion import write_object
from relaxlm.compiler.platforms import PLATFORMS
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import CompileError, ToolchainError
from relaxlm.runtime.multiversion import Version, pack, read_index

pytest.importorskip("ziglang")
pytest.importorskip("lief")

# What the files of the platforms' systems begin with.
MAGIC = {
    "linux": b"\x7fELF",
    "android": b"\x7fELF",
    "darwin": b"\xcf\xfa\xed\xfe",
    "win32": b"MZ",
    "ios": b"!<arch>\n",
}


def executable(device: str):
    """A compiled function that calls C's library: the cosine of some halves."""
    builder = relax.BlockBuilder()
    n = tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((n,), "float16"))

    def cosine(x: te.Tensor) -> te.Tensor:
        return te.compute(
            x.shape, lambda i: tirx.cos(x[i].astype("float32")).astype("float16"), name="cosine"
        )

    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit_te(cosine, x))
    target = resolve_device(device)
    static = target.platform.is_static
    return relax.build(builder.finalize(), target.tvm_target(2), system_lib=static)


@pytest.mark.parametrize("name", [name for name in PLATFORMS if name != "linux-x86_64"])
def test_a_library_is_linked_for(name: str, tmp_path: Path) -> None:
    platform = PLATFORMS[name]
    folder = tmp_path / "made"
    output = folder / f"library{platform.suffixes[0]}"
    # As a library with versions for several CPUs has them.
    data = tmp_path / "versions.o"
    packed = pack(Version("plainest", ()), [(Version("best", ("neon",)), b"a library" * 999)])
    write_object(data, packed, resolve_device(name))
    objects = [data] if platform.runs_python else []
    export_library(executable(name), output, zig_linker(platform), objects=objects)
    assert output.read_bytes().startswith(MAGIC[platform.system])
    assert list(folder.iterdir()) == [output], "something else was left behind"
    if objects:
        assert packed in output.read_bytes()
        assert [one.name for one in read_index(output)] == ["plainest", "best"]
    if not platform.is_static:
        needed = undefined_symbols(output)
        assert needed, "it calls C's library"
        assert needed <= allowed_symbols(platform) or platform.system == "win32"


def test_object_files_need_no_linker(tmp_path: Path) -> None:
    import tarfile

    output = tmp_path / "library.tar"
    export_library(executable("linux-arm64"), output)
    with tarfile.open(output) as archive:
        assert all(name.endswith(".o") for name in archive.getnames())
        assert archive.getnames()


def test_a_library_that_needs_more_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross, "C_SYMBOLS", frozenset())
    platform = PLATFORMS["linux-arm64"]
    output = tmp_path / "library.so"
    with pytest.raises(CompileError, match=r"needs .*cosf.*, which neither TVM's runtime nor"):
        export_library(executable("linux-arm64"), output, zig_linker(platform))
    assert not list(tmp_path.iterdir())


def test_without_zig(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cross.shutil, "which", lambda name: None)
    with pytest.raises(ToolchainError) as caught:
        zig_linker(PLATFORMS["linux-arm64"])
    assert str(caught.value) == (
        "libraries for linux-arm64 are linked with zig, which is not installed: "
        "pip install 'relaxlm[cross]'"
    )
    with pytest.raises(ToolchainError, match="libraries are checked with lief"):
        undefined_symbols(Path("library.so"))
