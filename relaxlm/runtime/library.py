"""Load a compiled library, and refuse one that does not fit this machine, TVM, relaxlm or model."""

import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from relaxlm.errors import ConfigError, LibraryError
from relaxlm.files import refuse_lfs_pointer
from relaxlm.runtime import cpu, gpu, multiversion, tvm_runtime
from relaxlm.runtime.chat_config import ChatConfigFile
from relaxlm.runtime.metadata import CONTRACT, LibraryMetadata
from relaxlm.versions import PINNED, RELAXLM_VERSION, check_versions

# First bytes of what a shared library can be: ELF, Mach-O (64 bit, universal), Windows.
_MAGIC = (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe", b"MZ")

# Keys of config.json that change what a model computes and not the shapes of its weights.
_NOT_IN_SHAPES = (
    "head_dim",
    "hidden_act",
    "layer_types",
    "max_window_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
)


class Library:
    """A compiled model, loaded.

    Attributes:
        path: the file, for messages.
        metadata: what it says of itself, or of its version that was loaded.
        versions: the names of those that the file holds, if it holds several.
    """

    def __init__(
        self, module: Any, metadata: LibraryMetadata, path: Path, versions: Sequence[str] = ()
    ) -> None:
        self.module, self.metadata, self.path = module, metadata, path
        self.versions = tuple(versions)

    @property
    def device(self) -> str:
        """For people: "cpu"; with several versions, also which of them runs."""
        target = self.metadata.target
        if not self.versions:
            return target.kind
        return f"{target.kind} ({target.arch[0]}, of {', '.join(self.versions)})"

    @staticmethod
    def load(path: Path | str) -> "Library":
        """Load a library file and check that it can run here.

        Of a library with several versions, the best one that can run here is loaded, or the one
        that the environment variable RELAXLM_CPU_VERSION names.

        Raises:
            LibraryError: not a library of relaxlm; made by another release; or made for a CPU
                or device that this machine lacks. No code of the model has run by then.
        """
        check_versions()
        path = Path(path)
        _check_file(path)
        module = _load_module(path)
        metadata = _read_metadata(module, path)
        versions = metadata.target.versions
        if versions:
            _check_made_for(metadata, path)
            version = multiversion.choose(multiversion.read_index(path), path)
            if version.name != versions[0]:
                module = multiversion.load(version, path)
                metadata = _read_metadata(module, path)
        elif metadata.target.kind == "cpu":
            multiversion.refuse_other_versions(metadata.target.arch, path)
        check_runs_here(metadata, path)
        return Library(module, metadata, path, versions)


def check_runs_here(metadata: LibraryMetadata, path: Path | str) -> None:
    """Compare what a library needs with this machine and these packages.

    Raises:
        LibraryError: names the difference and the command that mends it.
    """
    _check_made_for(metadata, path)
    missing = cpu.missing_features(metadata.target.cpu_features)
    if missing:
        raise LibraryError(
            f"{path} needs CPU features that this machine lacks: {', '.join(missing)}; "
            f"{_again(metadata)}, or for many machines with --arch portable"
        )


def _again(metadata: LibraryMetadata) -> str:
    return "compile it again here: relaxlm compile FOLDER --device " + metadata.target.kind


def _check_made_for(metadata: LibraryMetadata, path: Path | str) -> None:
    """Compare the releases, operating system and architecture, and not yet the extensions."""
    for package, version in {"relaxlm": RELAXLM_VERSION, **PINNED}.items():
        found = metadata.versions.get(package)
        if found != version:
            raise LibraryError(
                f"{path} was compiled with {package} {found}, this is {package} {version}; "
                + _again(metadata)
            )
    target = metadata.target
    if (target.cpu, target.system) != (cpu.architecture(), cpu.system()):
        raise LibraryError(
            f"{path} was compiled for {target.system} on {target.cpu}, this machine is "
            f"{cpu.system()} on {cpu.architecture()}; {_again(metadata)}"
        )


def check_fits_model(library: Library, folder: Path, config: ChatConfigFile) -> None:
    """Compare what a library was compiled for with a folder. Its weights are compared on loading.

    Raises:
        LibraryError: another model type, preset, or value of the architecture.
    """
    info = library.metadata
    pairs: dict[str, tuple[Any, Any]] = {
        "model_type": (info.model_type, config.model_type),
        "quantization": (info.quantization, config.quantization),
    }
    if not info.is_encoder:  # of which older folders name no task
        pairs["model_task"] = (info.model_task, config.model_task)
    compiled, ours = info.model_config_json, config.architecture
    for name in _NOT_IN_SHAPES:
        if name in compiled and name in ours:
            pairs[name] = (compiled[name], ours[name])
    for name, (found, expected) in pairs.items():
        if found != expected:
            raise LibraryError(
                f"{library.path} was compiled for {name} = {found!r}, but {folder} has "
                f"{expected!r}; compile for this folder: relaxlm compile {folder} -o LIB"
            )


def refuse_compile_options(path: Path | str, **options: str | None) -> None:
    """Refuse options of `compile` that were given along with a library, where they change nothing.

    Raises:
        ConfigError: names the option.
    """
    for name, value in options.items():
        if value:
            raise ConfigError(
                f"{name} = {value!r} is for compiling, and {path} is compiled already: leave one "
                f'of them out, or compile again with --{name} "{value}"'
            )


def check_device(library: Library, device: str) -> None:
    """Refuse a device, as `--device` names it, that is not the library's.

    Raises:
        ConfigError: names both.
    """
    kind = library.metadata.target.kind
    if device.partition(":")[0] not in ("auto", kind):
        raise ConfigError(f"device {device!r}, but {library.path} was compiled for {kind}")


def check_settings(library: Library, settings: Mapping[str, int | str]) -> None:
    """Compare settings that are fixed at compile time; a smaller context is possible.

    Raises:
        ConfigError: the library was compiled with another value.
    """
    cache = library.metadata.kv_cache
    compiled = {**library.metadata.limits.model_dump(), "kv_cache_dtype": cache.dtype}
    for name, wanted in settings.items():
        found = compiled[name]
        if wanted == found or (name == "context_window_size" and wanted < found):
            continue
        raise ConfigError(
            f"chat_config: {name} = {wanted!r}, but {library.path} was compiled with {found!r}; "
            f'compile it again with --overrides "{name}={wanted}", or leave the setting out'
        )


def _load_module(path: Path) -> Any:
    try:
        return tvm_runtime.load_module(path)
    except Exception as error:
        # The loader of GPU code, which is there when the runtime for such a GPU is.
        loader = re.search(r"load_from_bytes\.(\w+)", str(error))
        if loader is None or loader[1] not in gpu.LOADERS:
            raise _not_ours(path, error) from None
        kind = gpu.LOADERS[loader[1]]
    if gpu.why_missing(kind):
        raise gpu.missing_gpu(path, kind)
    return tvm_runtime.load_module(path)


def _read_metadata(module: Any, path: Path) -> LibraryMetadata:
    try:
        # The VM's byte code returns the text; no machine code of the model runs for it.
        text = str(tvm_runtime.machine(module, tvm_runtime.device("cpu"))["_metadata"]())
    except Exception as error:
        raise _not_ours(path, error) from None
    return parse_metadata(text, path)


def _not_ours(path: Path, error: Exception) -> LibraryError:
    reason = str(error).strip().splitlines()
    return LibraryError(
        f"{path} is a shared library, but not one that relaxlm compiled: "
        f"{reason[-1] if reason else type(error).__name__}"
    )


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise LibraryError(
            f"{path}: no such library; make it with `relaxlm compile FOLDER -o {path}`"
        )
    refuse_lfs_pointer(path, LibraryError, "a library")
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(b"\0asm"):
        raise LibraryError(
            f"{path} was compiled for browsers: relaxlm's JavaScript driver runs it there and in "
            "Node.js (docs/web.md). Compile for this machine with --device cpu"
        )
    if not start.startswith(_MAGIC):
        raise LibraryError(f"{path} is not a shared library (its first bytes are {start[:4]!r})")
    size, expected = path.stat().st_size, _elf_size(start)
    if size < expected:
        raise LibraryError(
            f"{path} is truncated: {size} bytes, expected {expected}; copy or compile it again"
        )


def _elf_size(start: bytes) -> int:
    """Bytes that an ELF file has at least, by its header; 0 for other kinds of files.

    The loader maps a file that is too short, and ends in a bus error where it reads the rest.
    Linkers write the table of sections last. Source: System V ABI, "ELF header".
    """
    if not start.startswith(b"\x7fELF\x02\x01"):  # 64 bit, little-endian
        return 0
    if len(start) < 64:
        return 64
    (section_table,) = struct.unpack_from("<Q", start, 40)
    entry_size, entries = struct.unpack_from("<HH", start, 58)
    return section_table + entry_size * entries


def parse_metadata(text: str, path: Path) -> LibraryMetadata:
    """The metadata of a library from its JSON.

    Raises:
        LibraryError: another contract, or damaged.
    """
    raw = json.loads(text)
    if raw.get("contract") != CONTRACT:
        made_by = raw.get("versions", {}).get("relaxlm", "another program")
        raise LibraryError(
            f"{path} follows contract {raw.get('contract')} (made by relaxlm {made_by}), this "
            f"relaxlm {RELAXLM_VERSION} expects {CONTRACT}; compile it again"
        )
    try:
        return LibraryMetadata.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise LibraryError(
            f"{path}: its metadata is damaged at {place}: {problem['msg']}"
        ) from None


def is_batch_invariant(metadata: LibraryMetadata) -> bool:
    """Whether a token's logits are the same, bit for bit, whatever else is in the step."""
    return "batch_invariant=1" in metadata.opt.split(";")
