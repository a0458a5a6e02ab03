"""A library for Windows computes there what one for this machine computes here, in each version.

Wine runs Windows' Python with the released wheels, of which only the run-time parts are there
(`tools/windows_root.py`), on a library that was compiled and linked here.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from relaxlm import ChatModule, GenerationConfig
from relaxlm.compiler.request import CompileRequest
from relaxlm.files import cache_folder
from relaxlm.runtime import cpu
from relaxlm.runtime.multiversion import VARIABLE
from tests.compiler import runtime_step
from tests.compiler.conftest import LIMITS, Portable
from tools.windows_root import environment, find_wine

WINE = find_wine()
ROOT = Path(os.environ.get("RELAXLM_WINDOWS_ROOT") or cache_folder().parent / "relaxlm-windows")
PROJECT = Path(__file__).parents[2]
PROMPT = "the cat sat"

pytestmark = [
    pytest.mark.skipif(
        not {"avx2", "f16c", "fma"} <= cpu.host_cpu_features(), reason="runs code with AVX2"
    ),
    pytest.mark.skipif(WINE is None, reason="no Wine (Debian's package wine64)"),
    pytest.mark.skipif(
        not (ROOT / "ready").exists(),
        reason=f"no Windows' Python in {ROOT}: make it with tools/windows_root.py",
    ),
]


pytest.importorskip("ziglang")
pytest.importorskip("lief")


@pytest.fixture(scope="module")
def library(portable: Portable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights' library for Windows, in all versions."""
    path = tmp_path_factory.mktemp("windows") / "there.dll"
    device = "windows-x86_64:portable"
    CompileRequest.read(portable.folder, None, device, None, LIMITS, "O1").compile().save(path)
    return path


def there(path: Path) -> str:
    """What Wine calls a file of this machine."""
    return f"Z:{path}"


def on_windows(*command: str | Path, cache: Path, version: str = "") -> str:
    """What Windows' Python prints.

    Args:
        cache: relaxlm's folder there.
        version: to load; "" for the best that there is.
    """
    variables = {
        **environment(ROOT),
        "PYTHONPATH": f"{there(ROOT / 'packages')};{there(PROJECT)}",
        "RELAXLM_CACHE": there(cache),
        VARIABLE: version,
    }
    words = [there(part) if isinstance(part, Path) else part for part in command]
    result = subprocess.run(
        [WINE, ROOT / "python" / "python.exe", *words],
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("version", ["x86-64-v2", "x86-64-v3"])
def test_logits_are_those_of_this_machine(
    version: str,
    portable: Portable,
    library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, version)
    expected = runtime_step.logits(portable.library, portable.folder)
    script, output = PROJECT / "tests" / "compiler" / "runtime_step.py", tmp_path / "out.npz"
    # Windows tells of all that x86-64-v3 needs: it is the best one.
    asked = "" if version == "x86-64-v3" else version
    on_windows(script, library, portable.folder, output, cache=tmp_path, version=asked)
    found = np.load(output)
    assert found["version"] == version
    # The plainest is the file itself; Windows loads the others from the cache.
    assert len(list(tmp_path.glob("versions/*.dll"))) == (version == "x86-64-v3")
    # Windows' C library and this one's differ in the last bits of sines and powers.
    limit = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(found["logits"], expected, rtol=0, atol=limit)


def test_chat_answers_as_on_this_machine(
    portable: Portable, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "x86-64-v2")
    module = ChatModule(portable.folder, model_lib=portable.library)
    greedy = GenerationConfig(temperature=0, max_tokens=16)
    expected = str(module.generate(PROMPT, generation_config=greedy))
    assert len(set(expected)) > 5 and not expected.isascii(), "text that is hard to print"
    command = ["-m", "relaxlm", "chat", portable.folder, "--model-lib", library]
    command += ["--prompt", PROMPT, "--temperature", "0", "--max-tokens", "16"]
    assert on_windows(*command, cache=tmp_path, version="x86-64-v2").rstrip() == expected.rstrip()
