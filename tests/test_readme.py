"""Runs README.md: every shell and Python block, in order, in one folder, as a reader would.

The folder looks like the root of the repository, so that relative paths mean what they say, but
what a block writes goes there and not into the repository. A block that is not run has the comment
`<!-- not run: REASON -->` right above it.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

RUN = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
SHOWN = {"text", "json"}  # blocks that show something, and are not meant to be run
LIMIT_S = 300

BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+) -->\n+)?```(?P<language>.*)\n(?P<code>(?:.*\n)*?)```$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    code: str
    not_run: str | None


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text; `line` is that of the first line of code."""
    return [
        Block(
            text.count("\n", 0, match.start("code")) + 1, match["language"], match["code"], reason
        )
        for match in BLOCK.finditer(text)
        for reason in [match["reason"]]
    ]


def stand_in_folder(folder: Path) -> Path:
    """Fill a folder with links to what the repository holds."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("build", "dist"):
            (folder / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    return folder


def environment(folder: Path) -> dict[str, str]:
    """This environment, with its `relaxlm` first on PATH and a cache of its own."""
    path = [str(Path(sys.executable).parent), os.environ["PATH"]]
    if not Path(path[0], "relaxlm").exists():  # it is on PYTHONPATH, and not installed
        program = folder / "programs" / "relaxlm"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m relaxlm "$@"\n')
        program.chmod(0o755)
        path.insert(0, str(program.parent))
    return {
        **os.environ,
        "PATH": os.pathsep.join(path),
        "RELAXLM_CACHE": str(folder / "cache"),
        "NO_COLOR": "1",
    }


def test_blocks_are_found_with_their_lines():
    text = (
        "# T\n\n```bash\na\nb\n```\n\n<!-- not run: needs a GPU -->\n```python\nc\n```\n"
        "<!-- not run: x -->\nText\n```text\nd\n```\n"
    )
    assert blocks(text) == [
        Block(4, "bash", "a\nb\n", None),
        Block(10, "python", "c\n", "needs a GPU"),
        Block(15, "text", "d\n", None),
    ]


@pytest.mark.skipif(os.name == "nt", reason="the shell blocks are for bash")
def test_readme_runs(tmp_path):
    folder, env = stand_in_folder(tmp_path), environment(tmp_path)
    for block in blocks(README.read_text(encoding="utf-8")):
        where = f"README.md, line {block.line}"
        assert block.language in {*RUN, *SHOWN}, (
            f"{where}: ```{block.language}: expected one of {', '.join(sorted({*RUN, *SHOWN}))}"
        )
        if block.not_run or block.language in SHOWN:
            continue
        try:
            result = subprocess.run(
                [*RUN[block.language], block.code],
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            pytest.fail(f"{where}: not done after {LIMIT_S} seconds:\n{block.code}")
        assert result.returncode == 0, f"{where}:\n{block.code}\n{result.stdout[-4000:]}"
