"""What a model is for: the files of sentence-transformers in a Hugging Face folder say so."""

from pathlib import Path

from relaxlm.errors import ConfigError
from relaxlm.files import read_json

MODULES = "modules.json"


def is_for_embeddings(folder: Path) -> bool:
    """Whether a folder's model is used with sentence-transformers, which pools its states."""
    return (folder / MODULES).is_file() and "Pooling" in dict(module_kinds(folder))


def module_kinds(folder: Path) -> list[tuple[str, str]]:
    """The modules in modules.json: the name of each one's class, and its folder within.

    Raises:
        ConfigError: the file is not a list of modules.
    """
    path = folder / MODULES
    modules = read_json(path, ConfigError)
    try:
        return [(module["type"].rpartition(".")[2], module["path"]) for module in modules]
    except (AttributeError, KeyError, TypeError):
        raise ConfigError(f"{path}: expected a list of modules, each with type and path") from None
