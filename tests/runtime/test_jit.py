import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from relaxlm.compiler.request import CompileRequest
from relaxlm.errors import CompileError, ConfigError
from relaxlm.runtime import jit
from relaxlm.runtime.jit import cache_folder, library_for


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RELAXLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "libraries"


@pytest.fixture
def saved(tiny, monkeypatch) -> list[CompileRequest]:
    """The requests that were compiled; a compilation is a copy of the tiny library."""
    requests = []

    class Compiled:
        def __init__(self, progress) -> None:
            progress("lower", 0.0)

        def save(self, path: Path) -> None:
            path.write_bytes(tiny.library.read_bytes())

    def compile(self: CompileRequest, progress) -> Compiled:
        requests.append(self)
        return Compiled(progress)

    monkeypatch.setattr(CompileRequest, "compile", compile)
    return requests


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("RELAXLM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("RELAXLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "relaxlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "relaxlm"


def test_a_library_is_compiled_once(tiny, cache, saved):
    stages: list[str] = []
    first = library_for(tiny.folder, progress=lambda stage, share: stages.append(stage))
    assert (len(saved), stages) == (1, ["lower"])
    second = library_for(tiny.folder, progress=lambda stage, share: stages.append(stage))
    assert (len(saved), stages) == (1, ["lower"])
    assert first.path == second.path
    assert list(cache.iterdir()) == [first.path]


def test_a_folder_seen_before_is_loaded_without_the_compiler(tiny, cache):
    library_for(tiny.folder)
    code = f"""
        import sys
        from pathlib import Path
        from relaxlm.runtime.jit import library_for
        library_for(Path({str(tiny.folder)!r}))
        loaded = {{"tvm", "relaxlm.models", "relaxlm.quantization"}} & set(sys.modules)
        sys.exit(f"imported {{loaded}}" if loaded else 0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_everything_that_decides_its_content_makes_another_library(
    tiny, cache, saved, monkeypatch, tmp_path
):
    paths = [library_for(tiny.folder).path]
    for overrides in ("context_window_size=128", "kv_cache_dtype=fp8", "max_batch_size=3"):
        paths.append(library_for(tiny.folder, overrides=overrides).path)
    with monkeypatch.context() as patch:
        patch.setattr(jit, "RELAXLM_VERSION", "9.9.9")
        paths.append(library_for(tiny.folder).path)
    with monkeypatch.context() as patch:
        patch.setattr(jit, "_code_digest", lambda: "other code")
        paths.append(library_for(tiny.folder).path)
    changed = tmp_path / "changed"
    changed.mkdir()
    text = (tiny.folder / "mlc-chat-config.json").read_text()
    assert '"rope_theta": 5000.0' in text
    (changed / "mlc-chat-config.json").write_text(
        text.replace('"rope_theta": 5000.0', '"rope_theta": 5001.0')
    )
    paths.append(library_for(changed).path)
    assert len(set(paths)) == len(saved) == 7
    # The same setting spelled out is the same library.
    assert library_for(tiny.folder, overrides="context_window_size=256").path == paths[0]
    assert len(saved) == 7


def test_the_code_that_decides_the_content_is_part_of_the_digest(monkeypatch, tmp_path):
    before = jit._code_digest()
    assert jit._code_digest() == before
    copy = tmp_path / "relaxlm"
    for part in ("models/a.py", "compiler/passes/b.py", "quantization/c.py", "runtime/metadata.py"):
        (copy / part).parent.mkdir(parents=True, exist_ok=True)
        (copy / part).write_text("x = 1")
    monkeypatch.setattr(jit.relaxlm, "__file__", str(copy / "__init__.py"))
    digests = {jit._code_digest()}
    for part in ("models/a.py", "compiler/passes/b.py", "quantization/c.py", "runtime/metadata.py"):
        (copy / part).write_text("x = 2")
        digests.add(jit._code_digest())
    assert len(digests) == 5


@pytest.mark.parametrize("damage", [b"", b"\x7fELF\x02\x01", b"something else"])
def test_a_damaged_library_is_compiled_again(tiny, cache, saved, damage):
    path = library_for(tiny.folder).path
    path.unlink()  # the loaded one stays mapped
    path.write_bytes(damage)
    assert library_for(tiny.folder).path == path
    assert len(saved) == 2
    assert path.read_bytes() == tiny.library.read_bytes()


def test_a_wrong_override_is_refused_before_anything_is_compiled(tiny, cache, saved):
    with pytest.raises(ConfigError, match=r"^--overrides: 'x' is not understood"):
        library_for(tiny.folder, overrides="x")
    assert not saved and not cache.exists()


def test_a_gpu_without_a_runtime_is_noticed_before_compiling(tiny, cache, saved):
    with pytest.raises(ConfigError) as caught:
        library_for(tiny.folder, "opencl")
    assert str(caught.value) == (
        "device 'opencl': the TVM installed here has no runtime for it; of the released wheels "
        "none has. Use cpu, or `relaxlm compile --device opencl` for another machine "
        "(docs/targets.md)"
    )
    assert not saved


def test_a_cache_that_cannot_be_written_is_noticed_before_compiling(
    tiny, tmp_path, saved, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RELAXLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(CompileError) as raised:
        library_for(tiny.folder)
    assert str(raised.value) == (
        f"{tmp_path / 'file' / 'libraries'}: the compiled library cannot be kept there (Not a "
        "directory); set RELAXLM_CACHE to a folder that can be written, or name a library with "
        "--model-lib"
    )
    assert not saved


@pytest.mark.parametrize("moment", ["compile", "link", "rename"])
def test_an_interrupted_compilation_leaves_nothing(tiny, cache, monkeypatch, moment):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    if moment == "compile":
        monkeypatch.setattr("tvm.relax.build", interrupted)
    else:
        target = {"link": "relaxlm.compiler.link.Linker.link", "rename": "os.replace"}[moment]
        monkeypatch.setattr(target, interrupted)
    with pytest.raises(KeyboardInterrupt):
        library_for(tiny.folder, overrides="kv_cache_dtype=f16")
    assert list(cache.iterdir()) == []


def test_another_process_finds_the_library(tiny, cache, saved):
    path = library_for(tiny.folder, "cpu").path
    code = """
        import sys
        from pathlib import Path
        from relaxlm.compiler.request import CompileRequest
        CompileRequest.compile = None
        from relaxlm.runtime.jit import library_for
        print(library_for(Path(sys.argv[1]), "cpu").path)
        """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tiny.folder)]
    assert subprocess.check_output(command, text=True, timeout=120) == f"{path}\n"
