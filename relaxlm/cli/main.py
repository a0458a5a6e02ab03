"""The `relaxlm` program: its table of commands, and what becomes of their errors.

A command is a function in a file of its own, imported when it is asked for; its name, in
underscores, is also the file's. Hyphens do for underscores everywhere on the command line, in the
names of commands, options and choices alike; in the names of commands, a space does, too:
`relaxlm bench serve`.

Exit codes: 0 done; 1 a RelaxLMError, a file that can't be read or written, or a command's own
verdict (`verify`, `doctor`); 2 a command line that can't be parsed; 70 an error that relaxlm did
not foresee; 130 interrupted.
"""

import errno
import os
import sys
from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from relaxlm.errors import RelaxLMError

# In the order of `relaxlm --help`; relaxlm/cli/NAME.py has the function NAME.
COMMANDS = (
    *("convert_weight", "gen_config", "compile", "chat", "embed", "serve", "verify"),
    *(
        "bench",
        "bench_serve",
        "profile",
        "tune",
        "build",
        "package",
        "estimate",
        "new_model",
        "demo",
        "doctor",
    ),
)

FAILED = 1
INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class _LazyCommands(MutableMapping[str, Any]):
    """COMMANDS as a group's mapping from names to click commands, each made on first use."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in COMMANDS:
            raise KeyError(name)
        if name not in self._made:
            function = getattr(import_module(f"relaxlm.cli.{name}"), name)
            single = typer.Typer(add_completion=False, rich_markup_mode=None)
            first_line = (function.__doc__ or "").strip().split("\n")[0]
            single.command(name, short_help=first_line)(function)  # short_help is never cut off
            self._made[name] = typer.main.get_command(single)
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> NoReturn:
        raise TypeError(f"{name}: commands are listed in COMMANDS, not added at run time")

    def __delitem__(self, name: str) -> NoReturn:
        raise TypeError(f"{name}: commands are listed in COMMANDS, not removed at run time")

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Commands(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _LazyCommands()

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        two_words = "_".join(args[:2])
        if len(args) > 1 and two_words in COMMANDS:
            args = [two_words, *args[2:]]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error
        except (RelaxLMError, OSError) as error:
            # A closed pipe (`relaxlm ... | head`) is nobody's error; typer ends quietly.
            closed_pipe = isinstance(error, OSError) and error.errno == errno.EPIPE
            if _debugging() or closed_pipe:
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(FAILED) from error


def _print_versions(wanted: bool) -> None:
    if not wanted:
        return
    from relaxlm.versions import PINNED, RELAXLM_VERSION, installed_version

    tvm = [f"{name} {installed_version(name) or 'missing'}" for name in PINNED]
    typer.echo(f"relaxlm {RELAXLM_VERSION} ({', '.join(tvm)})")
    raise typer.Exit


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help is plain text: "[N, K]" and "*.safetensors" stay as written
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("-", "_"),
    },
)


@app.callback()
def relaxlm(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_versions, is_eager=True, help="Print the versions."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", envvar="RELAXLM_DEBUG", help="Show the stack trace of an error."),
    ] = False,
) -> None:
    """Compile open language models into one fast library per device, and run them.

    Hyphens do for underscores in the names of commands and options, and in those of commands a
    space does, too: bench serve.
    """
    if debug:
        os.environ["RELAXLM_DEBUG"] = "1"
    if context.invoked_subcommand != "doctor":  # it reports wrong versions, and goes on
        from relaxlm.versions import check_versions

        check_versions()


def main() -> NoReturn:
    """Run the command line of `sys.argv` and exit with its status."""
    try:
        app(prog_name="relaxlm")
    except Exception as error:
        if _debugging():
            raise
        print(
            f"error: relaxlm did not foresee this: {type(error).__name__}: {error}\n"
            "Please report it with its stack trace, which `relaxlm --debug COMMAND ...` or "
            "RELAXLM_DEBUG=1 shows.",
            file=sys.stderr,
        )
        sys.exit(INTERNAL_ERROR)
    sys.exit(0)


def _debugging() -> bool:
    return os.environ.get("RELAXLM_DEBUG", "") not in ("", "0")


if __name__ == "__main__":
    main()
