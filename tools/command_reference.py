"""Write docs/commands.md from the signatures of the commands in relaxlm/cli.

    python tools/command_reference.py            write it
    python tools/command_reference.py --check    exit with 1 when it is out of date

It reads Python signatures and typer's annotations, not the text of `--help`, whose layout changes
from one release of typer to the next.
"""

import enum
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from relaxlm.cli.main import COMMANDS, relaxlm

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "commands.md"
TYPES = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}

HEADER = """\
<!-- Written by tools/command_reference.py (`make docs`) from relaxlm/cli; edit the help there. -->

# Commands

Hyphens do for underscores in the names of commands and options: `relaxlm convert-weight` is
`relaxlm convert_weight`. Errors go to standard error.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | something that you can mend, the message says how; or the verdict of `verify` or `doctor` |
| 2 | the command line can't be parsed |
| 70 | an error that relaxlm did not foresee: please report it |
| 130 | interrupted |
"""


def type_name(annotation: Any) -> str:
    """What to write for a value of this type; "" for a flag."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        [annotation] = [part for part in arguments if part is not type(None)]
        return type_name(annotation)
    if origin is list:
        return type_name(arguments[0])
    if origin is tuple:
        return " ".join(type_name(part) for part in arguments)
    if origin is typing.Literal:
        return "\\|".join(map(str, arguments))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "\\|".join(str(member.value) for member in annotation)
    return "" if annotation is bool else TYPES[annotation]


def is_repeated(annotation: Any) -> bool:
    return typing.get_origin(annotation) is list or any(
        is_repeated(part) for part in typing.get_args(annotation)
    )


def one_line(text: str | None) -> str:
    """Help text in a cell of a Markdown table."""
    return re.sub(r"([|*<\\])", r"\\\1", " ".join((text or "").split()))


def spellings(name: str, annotation: Any, info: Any) -> str:
    """How an option is written: "`--output`, `-o` PATH"."""
    # typer.Option("--output", "-o") in an annotation: the first is its parameter `default`.
    written = [info.default, *(info.param_decls or ())]
    written = [spelling for spelling in written if isinstance(spelling, str)]
    if not written:
        option = name.replace("_", "-")
        written = [f"--{option}/--no-{option}" if annotation is bool else f"--{option}"]
    value = info.metavar or type_name(annotation)
    repeated = " (more than once)" if is_repeated(annotation) else ""
    return ", ".join(f"`{spelling}`" for spelling in written) + f" {value}".rstrip() + repeated


def explanation(default: Any, info: Any) -> str:
    """The help of a parameter, and what it is when it is not given."""
    required = default in (inspect.Parameter.empty, ...)
    if isinstance(default, enum.Enum):
        default = default.value
    parts = [one_line(info.help)]
    if required:
        parts.append("Required.")
    elif isinstance(info.show_default, str):
        parts.append(f"Default: {info.show_default}.")
    elif default is True:
        parts.append("Default: on.")
    elif info.show_default and default not in (None, False, "", (), []):
        parts.append(f"Default: `{default}`.")
    if info.envvar:
        parts.append(f"Also from the environment: `{info.envvar}`.")
    return " ".join(filter(None, parts))


def section(title: str, usage: str, function: Callable[..., Any]) -> str:
    """The part of the page on one command."""
    tables: dict[str, list[str]] = {"argument": [], "option": []}
    words = [usage]
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if getattr(parameter.annotation, "__name__", "") == "Context":
            continue
        if typing.get_origin(parameter.annotation) is not typing.Annotated:
            raise TypeError(f"{title}: {name} is not Annotated[..., typer.Option(help=...)]")
        annotation, info = typing.get_args(parameter.annotation)[:2]
        if not info.help:
            raise TypeError(f"{title}: {name} has no help")
        kind = type(info).__name__.removesuffix("Info").lower()
        label = f"`{info.metavar or name.upper()}`"
        if kind == "argument":
            words.append(label.strip("`") + (" ..." if is_repeated(annotation) else ""))
        else:
            label = spellings(name, annotation, info)
        if not info.hidden:
            tables[kind].append(f"| {label} | {explanation(parameter.default, info)} |\n")
    if tables["option"]:
        words.append("[OPTIONS]")
    if function is relaxlm:
        words.append("COMMAND ...")

    text = f"\n## {title}\n\n    {' '.join(words)}\n\n{inspect.getdoc(function)}\n"
    for kind, rows in tables.items():
        if rows:
            text += f"\n| {kind} | |\n|---|---|\n" + "".join(rows)
    return text


def page() -> str:
    text = HEADER + section("relaxlm", "relaxlm", relaxlm)
    for name in COMMANDS:
        function = getattr(import_module(f"relaxlm.cli.{name}"), name)
        text += section(name, f"relaxlm {name}", function)
    return text


def main() -> None:
    text = page()
    if "--check" in sys.argv[1:]:
        current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        if current != text:
            sys.exit(f"{PAGE.relative_to(ROOT)} is out of date: run `make docs`")
    else:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}: {len(COMMANDS)} commands")


if __name__ == "__main__":
    main()
