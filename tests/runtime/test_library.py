"""Libraries that cannot run here are refused in words, never by a crash."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from relaxlm.errors import ConfigError, LibraryError, VersionError
from relaxlm.runtime import cpu, library, metadata
from relaxlm.runtime.chat_config import ChatConfigFile
from relaxlm.runtime.library import Library, check_fits_model, check_settings
from relaxlm.versions import PINNED, check_versions


@pytest.fixture(scope="module")
def loaded(tiny) -> Library:
    return Library.load(tiny.library)


def refusal(path: Path) -> str:
    with pytest.raises(LibraryError) as raised:
        Library.load(path)
    return str(raised.value)


def test_a_library_tells_what_it_was_compiled_for(tiny, loaded):
    info = loaded.metadata
    assert (info.model_type, info.quantization, info.vocab_size) == ("llama", "q0f32", 320)
    assert info.limits.context_window_size == 256
    assert info.target.kind == "cpu"
    assert set(info.target.cpu_features) <= cpu.host_cpu_features()
    assert info.model_config_json["rope_theta"] == 5000.0
    assert info.kv_cache.dtype == "float32"
    assert info.memory.params == sum(array.nbytes for array in tiny.weights.values())


def test_a_file_of_this_folder_needs_no_more_than_its_name(tiny, monkeypatch):
    monkeypatch.chdir(tiny.library.parent)
    assert Library.load(Path(tiny.library.name)).metadata.model_type == "llama"


# Files that are no libraries


def test_no_file(tmp_path):
    path = tmp_path / "a.so"
    assert refusal(path) == (
        f"{path}: no such library; make it with `relaxlm compile FOLDER -o {path}`"
    )
    assert refusal(tmp_path).startswith(f"{tmp_path}: no such library")


def test_a_git_lfs_pointer(tmp_path):
    path = tmp_path / "a.so"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert refusal(path) == (
        f"{path} is a Git LFS pointer, not a library (63 bytes): run `git lfs pull` in {tmp_path}, "
        "or download the file again"
    )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"{}"])
def test_another_kind_of_file(tmp_path, content):
    path = tmp_path / "a.so"
    path.write_bytes(content)
    assert refusal(path) == (
        f"{path} is not a shared library (its first bytes are {content[:4]!r})"
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the header of ELF files")
@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.99, 0.9999])
def test_a_truncated_library(tiny, tmp_path, share):
    content = tiny.library.read_bytes()
    path, size = tmp_path / "a.so", int(len(content) * share)
    path.write_bytes(content[:size])
    expected = len(content) if size >= 64 else 64
    assert refusal(path) == (
        f"{path} is truncated: {size} bytes, expected {expected}; copy or compile it again"
    )


def test_another_programs_library():
    (path, *_) = Path(np._core._multiarray_umath.__file__).parent.glob("_multiarray_tests*")
    assert refusal(path).startswith(
        f"{path} is a shared library, but not one that relaxlm compiled: "
    )


def test_a_library_of_gpu_code_on_a_machine_without_gpu(tiny, tmp_path, monkeypatch):
    def load_module(path: str) -> None:
        raise RuntimeError(
            "Library binary was created using {cuda} but a loader of that name is not registered. "
            "Make sure to have runtime that registers ffi.Module.load_from_bytes.cuda"
        )

    monkeypatch.setattr("relaxlm.runtime.tvm_runtime.load_module", load_module)
    monkeypatch.setattr("relaxlm.runtime.cuda.load_runtime", lambda: False)
    assert refusal(tiny.library) == (
        f"{tiny.library} was compiled for cuda, and no usable NVIDIA GPU is here. Compile for this "
        "machine with `relaxlm compile FOLDER --device cpu`"
    )


# Libraries for other machines and releases


def test_one_of_another_release_of_relaxlm(tiny, monkeypatch):
    monkeypatch.setattr(library, "RELAXLM_VERSION", "9.9.9")
    assert refusal(tiny.library) == (
        f"{tiny.library} was compiled with relaxlm 0.1.0, this is relaxlm 9.9.9; compile it again "
        "here: relaxlm compile FOLDER --device cpu"
    )


def test_one_of_another_release_of_tvm(tiny, monkeypatch):
    monkeypatch.setattr(library, "PINNED", {"apache-tvm": "9.0"})
    assert refusal(tiny.library) == (
        f"{tiny.library} was compiled with apache-tvm {PINNED['apache-tvm']}, this is apache-tvm "
        "9.0; compile it again here: relaxlm compile FOLDER --device cpu"
    )


def test_another_tvm_is_noticed_before_the_library_is_touched(tiny, monkeypatch):
    monkeypatch.setitem(PINNED, "apache-tvm-ffi", "0.1.99")
    check_versions.cache_clear()
    with pytest.raises(
        VersionError, match=r"^apache-tvm-ffi is 0\.1\.14\.post1, expected 0\.1\.99"
    ):
        Library.load(tiny.library)


def test_one_of_another_contract(tiny, monkeypatch):
    monkeypatch.setattr(library, "CONTRACT", 77)
    assert refusal(tiny.library) == (
        f"{tiny.library} follows contract {metadata.CONTRACT} (made by relaxlm 0.1.0), this "
        "relaxlm 0.1.0 expects 77; compile it again"
    )


def test_one_for_cpu_features_that_this_machine_lacks(tiny, loaded, monkeypatch):
    features = loaded.metadata.target.cpu_features
    if len(features) < 2:
        pytest.skip("this machine has no features that could be missing")
    monkeypatch.setattr(cpu, "host_cpu_features", lambda: frozenset(features[2:]))
    assert refusal(tiny.library) == (
        f"{tiny.library} needs CPU features that this machine lacks: {', '.join(features[:2])}; "
        "compile it again here: relaxlm compile FOLDER --device cpu, or for many machines with "
        "--arch portable"
    )


def test_one_for_another_kind_of_cpu(tiny, monkeypatch):
    here = cpu.architecture()
    monkeypatch.setattr(cpu, "architecture", lambda: "sparc")
    assert refusal(tiny.library) == (
        f"{tiny.library} was compiled for {cpu.system()} on {here}, this machine is "
        f"{cpu.system()} on sparc; compile it again here: relaxlm compile FOLDER --device cpu"
    )


def test_damaged_metadata(loaded):
    values = json.loads(loaded.metadata.model_dump_json())
    del values["limits"]["context_window_size"]
    with pytest.raises(LibraryError) as raised:
        library.parse_metadata(json.dumps(values), Path("a.so"))
    assert str(raised.value) == (
        "a.so: its metadata is damaged at limits.context_window_size: Field required"
    )


# Libraries for other models


def model_refusal(loaded: Library, tiny, **changes) -> str:
    config = ChatConfigFile.load(tiny.folder)
    architecture = config.architecture | changes.pop("architecture", {})
    config = config.model_copy(update={"architecture": architecture, **changes})
    with pytest.raises(LibraryError) as raised:
        check_fits_model(loaded, tiny.folder, config)
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"quantization": "q4f16_1"}, "quantization = 'q0f32', but {} has 'q4f16_1'"),
        ({"model_type": "qwen2"}, "model_type = 'llama', but {} has 'qwen2'"),
        ({"architecture": {"rope_theta": 1e6}}, "rope_theta = 5000.0, but {} has 1000000.0"),
        ({"architecture": {"rms_norm_eps": 1e-6}}, "rms_norm_eps = 1e-05, but {} has 1e-06"),
    ],
)
def test_one_for_another_model(loaded, tiny, changes, found):
    assert model_refusal(loaded, tiny, **changes) == (
        f"{tiny.library} was compiled for {found.format(tiny.folder)}; compile for this folder: "
        f"relaxlm compile {tiny.folder} -o LIB"
    )


def test_sizes_and_keys_of_training_do_not_matter(loaded, tiny):
    config = ChatConfigFile.load(tiny.folder)
    other = {"max_position_embeddings": 99, "context_window_size": 7, "initializer_range": 0.5}
    check_fits_model(
        loaded,
        tiny.folder,
        config.model_copy(update={"architecture": config.architecture | other}),
    )


def test_settings_that_are_fixed_at_compile_time(loaded, tiny):
    check_settings(loaded, {"context_window_size": 256, "kv_cache_dtype": "float32"})
    check_settings(loaded, {"context_window_size": 100})
    for name, wanted, found in (
        ("context_window_size", 512, "256"),
        ("prefill_chunk_size", 128, "256"),
        ("kv_cache_dtype", "float16", "'float32'"),
    ):
        with pytest.raises(ConfigError) as raised:
            check_settings(loaded, {name: wanted})
        assert str(raised.value) == (
            f"chat_config: {name} = {wanted!r}, but {tiny.library} was compiled with {found}; "
            f'compile it again with --overrides "{name}={wanted}", or leave the setting out'
        )
