"""The JavaScript driver under Node.js, and what it runs.

What takes minutes or the network to make (TVM's runtime for WebAssembly, packages from npm) is
taken from and kept in this machine's own cache, not in the empty one of the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relaxlm.errors import ToolchainError
from relaxlm.files import cache_folder
from relaxlm.web.npm import DRIVER, node_modules

RunNode = Callable[..., Any]
PATIENCE_S = 300
# Drivers of Vulkan that need no GPU: Mesa's, and the one that comes with Chromium.
SOFTWARE_GPUS = (
    ("/usr/share/vulkan/icd.d", "lvp_icd*.json"),
    ("/usr/lib/chromium", "vk_swiftshader_icd.json"),
)


@pytest.fixture(scope="session")
def kept_cache(environment: None) -> None:
    """Lets the parts that are made once per machine come from its cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RELAXLM_CACHE")
        own = cache_folder()
    for part in ("npm", "wasm-runtime"):
        (own / part).mkdir(parents=True, exist_ok=True)
        if not (cache_folder() / part).exists():
            (cache_folder() / part).symlink_to(own / part)


@pytest.fixture(scope="session")
def driver(kept_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver's folder with the packages that it imports beside it."""
    if shutil.which("node") is None:
        pytest.skip("no Node.js: there is no program node")
    try:
        packages = node_modules()
    except ToolchainError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("driver") / "relaxlm"
    shutil.copytree(DRIVER, folder)
    (folder / "node_modules").symlink_to(packages)
    return folder


@pytest.fixture(scope="session")
def node(driver: Path) -> RunNode:
    """Runs the text of a module in the driver's folder; its `input` is what it is given.

    It returns what the module passes to `output`.
    """

    def run(script: str, data: Any = None, **environment: str) -> Any:
        file = driver / f"test-{os.urandom(4).hex()}.mjs"
        result = file.with_suffix(".json")  # the runtime prints to standard output
        file.write_text(
            'import { readFileSync, writeFileSync } from "node:fs";\n'
            'const input = JSON.parse(readFileSync(0, "utf8"));\n'
            f"const output = (value) => writeFileSync({json.dumps(str(result))}, "
            "JSON.stringify(value));\n"
            f"{script}\n"
        )
        ended = subprocess.run(
            ["node", file.name],
            cwd=driver,
            input=json.dumps(data),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env={**os.environ, **environment},
        )
        assert ended.returncode == 0, "\n".join(line[:300] for line in ended.stderr.splitlines())
        return json.loads(result.read_text())

    return run


@pytest.fixture(scope="session")
def dawn() -> str:
    """The beginning of a module for Node.js in which there is WebGPU."""
    try:
        package = node_modules(Path(__file__).parent / "dawn") / "webgpu" / "index.js"
    except ToolchainError as error:
        pytest.skip(str(error))
    return (
        f"import {{ create, globals }} from {json.dumps(package.as_uri())};\n"
        "Object.assign(globalThis, globals);\n"
        "const value = { gpu: create([]) };\n"
        'Object.defineProperty(globalThis, "navigator", { value, configurable: true });\n'
    )


@pytest.fixture(scope="session")
def software_gpu(node: RunNode, dawn: str) -> tuple[str, str]:
    """A driver of Vulkan, and what it computes in: "float16", or "float32" if there is no other."""
    ask = "const found = await navigator.gpu.requestAdapter();\n"
    tell = "output(found ? [...found.features] : null); process.exit(0);"
    found = [str(file) for folder, name in SOFTWARE_GPUS for file in Path(folder).glob(name)]
    features = {driver: node(dawn + ask + tell, VK_ICD_FILENAMES=driver) for driver in found}
    usable = [driver for driver in found if features[driver] is not None]
    if not usable:
        pytest.skip(
            "no GPU in software: install Mesa's, Debian's package mesa-vulkan-drivers from version "
            f"25 on, or Chromium. Drivers found: {', '.join(found) or 'none'}"
        )
    half = [driver for driver in usable if "shader-f16" in features[driver]]
    return (half[0], "float16") if half else (usable[0], "float32")


@pytest.fixture(scope="session")
def webgpu_node(node: RunNode, dawn: str, software_gpu: tuple[str, str]) -> RunNode:
    """Runs a module as `node` does, where there is WebGPU, too."""

    def run(script: str, data: Any = None) -> Any:
        # Dawn would keep the process alive.
        ended = f"{dawn}{script}\nprocess.exit(0);"
        return node(ended, data, VK_ICD_FILENAMES=software_gpu[0])

    return run


SIZES = {"context_window_size": 256, "prefill_chunk_size": 64}


def convert_demo(place: Path, quantization: str) -> Path:
    """The demo model, converted, with a chat configuration."""
    from relaxlm.demo import MODEL_DIR
    from tests.tiny_model import convert

    return convert(MODEL_DIR, place / f"demo-{quantization}", quantization, **SIZES)


def compile_demo(folder: Path, device: str, library: Path) -> Path:
    """Its library, for this machine as exact as browsers; skips without what compiling takes."""
    from relaxlm.compiler.request import CompileRequest
    from relaxlm.compiler.web.runtime import find_emcc

    opt = "O1;act_quant=0" if device == "cpu" else "O1"
    if device != "cpu":
        try:
            find_emcc()
        except ToolchainError as error:
            pytest.skip(str(error))
    # What a step of many sequences takes is planned, too.
    CompileRequest.read(
        folder, device=device, opt=opt, overrides="max_batch_size=4"
    ).compile().save(library)
    return library


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in q4f16_1."""
    return convert_demo(tmp_path_factory.mktemp("demo"), "q4f16_1")


@pytest.fixture(scope="session")
def demo_cpu(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its library for this machine."""
    return compile_demo(demo, "cpu", tmp_path_factory.mktemp("cpu") / "demo.so")


@pytest.fixture(scope="session")
def demo_wasm(demo: Path, kept_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its library for the CPU of browsers."""
    return compile_demo(demo, "wasm", tmp_path_factory.mktemp("wasm") / "demo.wasm")


@pytest.fixture(scope="session")
def demo_webgpu(demo: Path, kept_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its library for the GPU of browsers."""
    return compile_demo(demo, "webgpu", tmp_path_factory.mktemp("webgpu") / "demo.wasm")


@pytest.fixture(scope="session")
def demo32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in q4f32_1, which needs no float16."""
    return convert_demo(tmp_path_factory.mktemp("demo32"), "q4f32_1")


@pytest.fixture(scope="session")
def demo32_cpu(demo32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_demo(demo32, "cpu", tmp_path_factory.mktemp("cpu32") / "demo.so")


@pytest.fixture(scope="session")
def demo32_webgpu(demo32: Path, kept_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_demo(demo32, "webgpu", tmp_path_factory.mktemp("webgpu32") / "demo.wasm")
