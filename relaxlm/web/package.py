"""Put a model, its libraries, the driver and a chat page into one folder of static files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import relaxlm.server
from relaxlm.compiler.web.link import read_metadata
from relaxlm.errors import ConfigError
from relaxlm.runtime.chat_config import FILE_NAME, ChatConfigFile
from relaxlm.runtime.library import Library, check_fits_model
from relaxlm.runtime.params import INDEX_NAMES, WeightFolder
from relaxlm.web.npm import DRIVER, node_modules

PAGE = Path(__file__).parent / "page"
SERVER_PAGE = Path(relaxlm.server.__file__).parent / "page"
MANIFEST = "model.json"

# What the driver imports, and the file of each package that has it.
VENDORED = {
    "@huggingface/jinja": "dist/index.js",
    "@huggingface/tokenizers": "dist/tokenizers.min.mjs",
    "@mlc-ai/web-runtime": "lib/index.js",
}
# Not an ES module, unlike the others.
COMMON_JS = "@mlc-ai/web-runtime"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

# Only this folder's files; "wasm-unsafe-eval" allows WebAssembly, and no more than that.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self' 'wasm-unsafe-eval'",
        "worker-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
    )
)
# Of the server's page: what is said of a server there, and of this device here.
_OF_SERVER = "Nothing is sent anywhere but to this server."
_OF_DEVICE = "Nothing is sent anywhere."


def package_web(folder: Path, libraries: Sequence[Path], output: Path) -> None:
    """Write the folder. It appears under its name only when complete.

    Args:
        folder: with mlc-chat-config.json, tokenizer and weights.
        libraries: compiled for browsers, one per device.
        output: is made, or replaced if it is such a folder.

    Raises:
        ConfigError: an output that is something else, a model that does not chat, or two libraries
            for one device.
        LibraryError: a library that does not fit the folder.
        ToolchainError: npm is needed, and not there.
    """
    if output.exists() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise ConfigError(
            f"{output} is not empty, and was not made by `relaxlm package`: name another folder"
        )
    config = ChatConfigFile.load(folder)
    weights = WeightFolder(folder)
    by_device: dict[str, Path] = {}
    for path in libraries:
        metadata = read_metadata(path)
        check_fits_model(Library(None, metadata, path), folder, config)
        if metadata.model_task != "chat":
            raise ConfigError(
                f"{folder}: the page chats, and this model is for {metadata.model_task}; load its "
                "library in a page of your own (docs/web.md)"
            )
        weights.check({param.name: (param.shape, param.dtype) for param in metadata.params})
        device = metadata.target.kind
        if device in by_device:
            raise ConfigError(f"{path} and {by_device[device]} are both for device '{device}'")
        by_device[device] = path
    packages = node_modules()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as place:
        made = Path(place) / "made"
        _write_page(made)
        _write_driver(made / "relaxlm")
        _write_vendored(made / "vendor", packages)
        _copy_model(folder, weights, made / "model")
        name = folder.resolve().name
        paths = {device: f"model/{name}-{device}.wasm" for device in by_device}
        for device, path in by_device.items():
            _link_or_copy(path, made / paths[device])
        manifest = {
            "name": name,
            "folder": "model/",
            "bytes": sum(record.nbytes for record in weights.records.values()),
            "context_window_size": min(
                read_metadata(path).limits.context_window_size for path in by_device.values()
            ),
            "libraries": paths,
        }
        (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if output.exists():
            os.rename(output, Path(place) / "before")
        os.rename(made, output)


def _write_page(target: Path) -> None:
    """The server's chat page with the model in the browser behind it."""
    shutil.copytree(SERVER_PAGE, target / "page", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PAGE, target / "page", dirs_exist_ok=True)
    text = (target / "page" / "index.html").read_text("utf-8")
    (target / "page" / "index.html").unlink()
    changes = {
        '<meta charset="utf-8">': '<meta charset="utf-8">\n    '
        f'<meta http-equiv="content-security-policy" content="{POLICY}">',
        "  </head>": '    <link rel="stylesheet" href="page/loading.css">\n'
        '    <script type="module" src="page/loading.js"></script>\n  </head>',
        _OF_SERVER: _OF_DEVICE,
    }
    for old, new in changes.items():
        assert text.count(old) == 1, f"index.html has {text.count(old)} times {old!r}"
        text = text.replace(old, new)
    (target / "index.html").write_text(text, "utf-8")


def _write_driver(target: Path) -> None:
    """The driver, importing its packages from the folder beside it."""
    target.mkdir(parents=True)
    for file in DRIVER.glob("*.js"):
        text = file.read_text("utf-8")
        for package in VENDORED:
            text = text.replace(f'from "{package}"', f'from "../vendor/{_file_name(package)}"')
        (target / file.name).write_text(text, "utf-8")


def _write_vendored(target: Path, packages: Path) -> None:
    target.mkdir(parents=True)
    for package, file in VENDORED.items():
        text = (packages / package / file).read_text("utf-8")
        if package == COMMON_JS:
            text = (
                "const module = { exports: {} };\nconst { exports } = module;\n"
                f"{text}\nexport default module.exports;\n"
            )
        (target / _file_name(package)).write_text(text, "utf-8")
        notices = [file for file in ("LICENSE", "NOTICE") if (packages / package / file).is_file()]
        description = json.loads((packages / package / "package.json").read_text("utf-8"))
        said = f"{package} {description['version']}, {description['license']}\n\n"
        said += "\n\n".join((packages / package / file).read_text("utf-8") for file in notices)
        (target / f"{_file_name(package)}.LICENSE.txt").write_text(said, "utf-8")


def _file_name(package: str) -> str:
    """ "@mlc-ai/web-runtime" -> "mlc-ai-web-runtime.js"."""
    return package.lstrip("@").replace("/", "-") + ".js"


def _copy_model(folder: Path, weights: WeightFolder, target: Path) -> None:
    target.mkdir(parents=True)
    shards = {record.shard for record in weights.records.values()}
    for name in sorted({FILE_NAME, *INDEX_NAMES, *TOKENIZER_FILES, *shards}):
        if (folder / name).is_file():
            _link_or_copy(folder / name, target / name)


def _link_or_copy(source: Path, target: Path) -> None:
    """Without taking space twice, where the file system allows it."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
