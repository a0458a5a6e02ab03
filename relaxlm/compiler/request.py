"""What to compile, put together from a folder and command-line options, and checked."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relaxlm import models
from relaxlm.compiler.options import CompileOptions, opt_for, with_saved_tuning
from relaxlm.compiler.target import DeviceTarget, resolve_device
from relaxlm.errors import ConfigError
from relaxlm.files import read_json_object
from relaxlm.models.config import DecoderConfig
from relaxlm.quantization.schemes import Scheme, get_scheme

CHAT_CONFIG = "mlc-chat-config.json"


@dataclass(frozen=True)
class CompileRequest:
    """Everything `compile_model` needs; `raw` is the model's configuration as read.

    `further` are the requests of the other versions of a library for several CPUs, in the order of
    `device.further`; their options differ in what each CPU has kernels for.
    """

    config: DecoderConfig
    raw: Mapping[str, Any]
    scheme: Scheme
    device: DeviceTarget
    options: CompileOptions
    further: tuple["CompileRequest", ...] = ()

    @staticmethod
    def read(
        source: Path,
        quantization: str | None = None,
        device: str = "auto",
        arch: str | None = None,
        overrides: str | None = None,
        opt: str | None = None,
    ) -> "CompileRequest":
        """Read a configuration and resolve the options.

        Args:
            source: a folder, or the path of mlc-chat-config.json or config.json. A folder's
                mlc-chat-config.json is preferred.
            quantization: a preset; the one in mlc-chat-config.json if None.
            opt: as `CompileOptions.resolve` takes it; where it does not say whether activations are
                rounded, they are wherever there are kernels for it.

        Raises:
            ConfigError: a missing file, an unknown preset, or options that contradict the folder.
        """
        path = Path(source)
        if path.is_dir():
            found = [path / CHAT_CONFIG, path / "config.json"]
            path = next((file for file in found if file.is_file()), found[0])
        if not path.is_file():
            raise ConfigError(
                f"{path}: no such file. Expected a folder with {CHAT_CONFIG} (made by "
                "`relaxlm gen_config`) or config.json, or the path of one"
            )
        content = read_json_object(path, ConfigError)
        chat = content if "model_config" in content else None
        recorded = content.get("quantization") if chat else None
        if quantization is None and not isinstance(recorded, str):
            raise ConfigError(f"{path} names no quantization: give one with --quantization q4f16_1")
        if quantization and recorded and quantization != recorded:
            raise ConfigError(
                f"--quantization {quantization}, but {path} belongs to weights in {recorded}: "
                "convert the weights again, or leave the option out"
            )
        scheme = get_scheme(quantization or str(recorded))
        raw, _ = models.raw_config(path)
        config = models.load_config(path)
        target = resolve_device(device, arch)

        def version(one: DeviceTarget) -> CompileRequest:
            own = opt_for(with_saved_tuning(opt, one), scheme, one)
            options = CompileOptions.resolve(config, scheme, chat, overrides, own)
            return CompileRequest(config, raw, scheme, one, options)

        plainest, *further = map(version, target.versions)
        return replace(plainest, device=target, further=tuple(further))

    def identity(self) -> dict[str, Any]:
        """All that decides the content of the library, as JSON values."""
        return {
            "config": dict(self.raw),
            "scheme": self.scheme.name,
            "device": self.device.describe(),
            "options": {**vars(self.options), "kv_format": self.options.kv_format.name},
            "further": [other.identity() for other in self.further],
        }

    def compile(self, **arguments: Any):  # -> CompiledModel, whose module imports TVM
        """Run `compile_model` on it; takes its `debug_dump` and `progress`.

        With several versions, the result is a `CompiledVersions`, which is used in the same way.
        """
        if self.further:
            from relaxlm.compiler.multiversion import compile_versions

            return compile_versions(self, **arguments)
        from relaxlm.compiler.build import compile_model

        return compile_model(
            self.config, self.raw, self.scheme, self.device, self.options, **arguments
        )
