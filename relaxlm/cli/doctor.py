"""`relaxlm doctor`."""

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from relaxlm.doctor import Finding

MARKS = {
    "ok": typer.style("ok     ", fg="green"),
    "absent": typer.style("-      ", dim=True),
    "broken": typer.style("BROKEN ", fg="red", bold=True),
}


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as one JSON object.")
    ] = False,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test/--no-self-test",
            help="Compile a model of one layer and compare its results with NumPy's.",
        ),
    ] = True,
) -> None:
    """Check this installation, and report what it finds on this machine.

    Exit code 1 when something is broken that relaxlm can't work without.
    """
    import json
    from dataclasses import asdict

    from relaxlm.doctor import examine

    findings: list[Finding] = []
    for finding in examine(self_test):
        if not as_json:
            _print(finding, new_section=not findings or findings[-1].section != finding.section)
        findings.append(finding)
    broken = [finding.name for finding in findings if finding.status == "broken"]
    if as_json:
        print(json.dumps({"healthy": not broken, "findings": [*map(asdict, findings)]}, indent=2))
    elif broken:
        print(f"\n{len(broken)} broken: {', '.join(broken)}")
    else:
        print("\nrelaxlm works on this machine.")
    raise typer.Exit(1 if broken else 0)


def _print(finding: "Finding", new_section: bool) -> None:
    if new_section:
        typer.secho(finding.section, bold=True)
    indent = 27
    value = textwrap.wrap(finding.value, 80 - indent, break_long_words=False)
    typer.echo(f"  {MARKS[finding.status]}{finding.name:<17} {value[0]}")
    for line in value[1:]:
        typer.echo(f"{'':{indent}}{line}")
    if finding.advice:  # one line however long: it can be a command to copy
        typer.echo(f"{'':{indent}}{finding.advice}")
