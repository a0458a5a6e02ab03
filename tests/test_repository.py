"""Rules that hold for the repository as a whole. One more rule is one more test here."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "relaxlm"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What a part of the package imports when it is imported: itself and these. Imports inside
# functions are not counted: the runtime compiles just in time, and commands import what they run.
BELOW = {
    "relaxlm.errors": set(),
    "relaxlm.versions": {"relaxlm.errors"},
    "relaxlm.files": {"relaxlm.errors"},
    "relaxlm.models": {"relaxlm.errors", "relaxlm.files", "relaxlm.versions"},
    "relaxlm.runtime": {"relaxlm.errors", "relaxlm.files", "relaxlm.versions"},
}
BELOW["relaxlm.engine"] = {*BELOW["relaxlm.runtime"], "relaxlm.runtime"}
BELOW["relaxlm.openai_api"] = {*BELOW["relaxlm.engine"], "relaxlm.engine"}
BELOW["relaxlm.server"] = {*BELOW["relaxlm.openai_api"], "relaxlm.openai_api"}
BELOW["relaxlm.quantization"] = {*BELOW["relaxlm.models"], "relaxlm.models"}
# The compiler uses what the runtime says of this machine and of the files it will load.
BELOW["relaxlm.compiler"] = {
    *BELOW["relaxlm.quantization"],
    "relaxlm.quantization",
    "relaxlm.runtime",
}
BELOW["relaxlm.web"] = {*BELOW["relaxlm.compiler"], "relaxlm.compiler", "relaxlm.server"}


def tracked_files() -> list[Path]:
    """The files that are in the repository; all files where it is no repository (an archive)."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.split("\0") if name]
    return [file for file in files if file.is_file()]


def tracked_text() -> Iterator[tuple[str, str]]:
    """The name and the text of each file in the repository that is text."""
    for file in tracked_files():
        try:
            yield str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def imports_on_import(tree: ast.Module) -> Iterator[str]:
    """The modules that importing a module imports: not those inside functions or TYPE_CHECKING."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import; the package imports by full names"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part(module: str) -> str:
    """ "relaxlm.runtime.cpu" -> "relaxlm.runtime"."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("file", MODULES, ids=module_name)
def test_imports_point_one_way(file):
    home = part(module_name(file))
    if home not in BELOW:
        return
    imported = set(imports_on_import(ast.parse(file.read_text(encoding="utf-8"))))
    ours = {part(module) for module in imported if module.startswith("relaxlm.")}
    wrong = ours - BELOW[home] - {home}
    assert not wrong, f"{module_name(file)} must not import {', '.join(sorted(wrong))}"


def test_torch_is_for_tests_and_tools_only():
    for file in MODULES:
        imported = set(imports_on_import(ast.parse(file.read_text(encoding="utf-8"))))
        for heavy in ("torch", "transformers"):
            assert heavy not in {name.split(".")[0] for name in imported}, f"{file} imports {heavy}"


@pytest.mark.parametrize("module", ["relaxlm", "relaxlm.cli.main", "relaxlm.models"])
def test_importing_is_cheap(module):
    if module == "relaxlm" and not (PACKAGE / "__init__.py").exists():
        pytest.skip("relaxlm has no __init__.py")
    code = f"import sys, {module}; sys.exit('tvm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_file_is_longer_than_500_lines():
    long = []
    for file in MODULES:
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > 500:
            long.append(f"{file.relative_to(ROOT)} ({lines})")
    assert not long, f"is there a second idea inside? {', '.join(long)}"


def test_no_paths_of_one_machine_and_no_package_hosts():
    # The words are in pieces, so that this file does not match.
    folders = "|".join(["wo" + "rk", "ro" + "ot", "ho" + r"me/\w+"])
    hosts = "|".join(["pypi", "pythonhosted", "registry" + r"\.npmjs", "download" + r"\.pytorch"])
    patterns = (rf"(?<![\w.])/(?:{folders})/", rf"\b(?:{hosts})\.(?:org|com)\b")
    found = [
        f"{name}: {match[0]}"
        for name, text in tracked_text()
        for pattern in patterns
        for match in re.finditer(pattern, text)
    ]
    assert not found, f"mend these: {', '.join(found)}"


def test_no_large_files():
    sizes = {str(file.relative_to(ROOT)): file.stat().st_size for file in tracked_files()}
    large = {name: size for name, size in sizes.items() if size > 4_000_000}
    assert not large


def test_links_between_pages_lead_somewhere():
    dead = [
        f"{name}: {target}"
        for name, text in tracked_text()
        if name.endswith(".md")
        for target in re.findall(r"\]\(([^)#\s]+)", text)
        if "://" not in target and not (ROOT / name).parent.joinpath(target).exists()
    ]
    assert not dead, f"these lead nowhere: {', '.join(dead)}"


def test_every_test_folder_mirrors_a_folder_of_the_package():
    for folder in (ROOT / "tests").rglob("__init__.py"):
        mirrored = PACKAGE / folder.parent.relative_to(ROOT / "tests")
        assert mirrored.is_dir(), f"{folder.parent} mirrors nothing: {mirrored} is not there"


def test_the_command_reference_is_up_to_date():
    path = ROOT / "tools" / "command_reference.py"
    spec = importlib.util.spec_from_file_location("command_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert written == module.page(), "run `make docs`"
