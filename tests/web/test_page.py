"""What `relaxlm package --web` writes, in a browser: models on its CPU and its GPU."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from relaxlm import ChatModule
from relaxlm.errors import ConfigError, LibraryError
from relaxlm.web.package import package_web
from tests.server.page.conftest import ARGUMENTS, NAMES
from tests.web.steps import RUN_STEPS, on_cpu

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PATIENCE_MS = 240_000  # a software GPU, on a machine that is busy with something else
WITH_GPU = (
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
)
QUESTION = "What is 12 + 30?"
GREEDY = json.dumps({"numbers": {"temperature": 0}})
# Steps of several sequences: how many tokens each gets.
STEPS = [[[0, 18]], [[0, 1]], [[1, 5], [0, 1]]]

LOGITS = f"""async ({{ steps, library }}) => {{
  const {{ ChatModule }} = await import("./relaxlm/index.js");
  const chat = await ChatModule.load({{ model: "model/", library }});
  const found = await ({RUN_STEPS})(chat, steps);
  chat.dispose();
  return found;
}}"""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder's files."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} is installed")
    arguments = [argument for argument in ARGUMENTS if argument != "--disable-gpu"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*arguments, *WITH_GPU])
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Browser, address: str, expected: str = "nothing", **settings: Any
) -> Iterator[Page]:
    """A page in a browser of its own; errors of its scripts and foreign requests fail the test.

    Args:
        expected: part of the console's errors that do not.
    """
    problems: list[str] = []
    context = browser.new_context(**settings)
    context.set_default_timeout(PATIENCE_MS)
    context.add_init_script(f"localStorage.setItem('relaxlm.settings', {GREEDY!r})")
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on(
        "request",
        lambda r: problems.append(r.url) if not r.url.startswith((address, "blob:")) else None,
    )
    page.goto(address)
    yield page
    context.close()
    assert not [problem for problem in problems if expected not in problem]


def wait_until_ready(page: Page) -> None:
    page.wait_for_selector(".loading:is([data-state=ready], [data-state=failed])")
    line = page.locator(".loading")
    assert line.get_attribute("data-state") == "ready", line.inner_text()


def ask(page: Page) -> str:
    """Ask by keyboard alone; the reply's text."""
    wait_until_ready(page)
    page.locator("#prompt").press_sequentially(QUESTION)
    page.keyboard.press("Enter")
    page.wait_for_selector("#thread .stats")
    return page.locator("#thread .markdown").last.inner_text().strip()


# On the CPU


@pytest.fixture(scope="module")
def cpu_site(
    demo: Path, demo_wasm: Path, kept_cache: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    site = tmp_path_factory.mktemp("site") / "demo"
    package_web(demo, [demo_wasm], site)
    return site


def test_a_phone_chats_on_its_cpu_and_weights_are_fetched_once(
    browser: Browser, cpu_site: Path, demo: Path, demo_cpu: Path
) -> None:
    expected = ChatModule(demo, model_lib=demo_cpu).generate(QUESTION, {"temperature": 0})
    phone = {"viewport": {"width": 390, "height": 760}, "color_scheme": "dark", "has_touch": True}
    with served(cpu_site) as address, opened(browser, address, **phone) as page:
        assert ask(page) == expected
        assert page.locator(".loading").inner_text().endswith("s CPU.")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.locator("#open-settings").click()
        assert page.locator("#set-temperature").is_visible()
        assert not page.locator("#set-key").is_visible()
        fetched: list[str] = []
        page.on("request", lambda request: fetched.append(request.url))
        page.reload()
        wait_until_ready(page)
        assert any(url.endswith("tensor-cache.json") for url in fetched)
        assert not any("params_shard" in url for url in fetched)


def test_the_model_that_is_changed_is_fetched_again(
    browser: Browser, cpu_site: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    shutil.copytree(cpu_site, site)
    with served(site) as address, opened(browser, address) as page:
        wait_until_ready(page)
        index = json.loads((site / "model" / "tensor-cache.json").read_text())
        index["records"][0]["md5sum"] = "0" * 32
        (site / "model" / "tensor-cache.json").unlink()  # it is linked with the other's
        (site / "model" / "tensor-cache.json").write_text(json.dumps(index))
        with page.expect_request(re.compile("params_shard")):
            page.reload()
        wait_until_ready(page)


def in_two_shards(folder: Path) -> Path:
    """Cut a model's only shard in two; the second one is returned."""
    index = json.loads((folder / "tensor-cache.json").read_text())
    (shard,) = index["records"]
    content = (folder / shard["dataPath"]).read_bytes()
    records = sorted(shard["records"], key=lambda record: record["byteOffset"])
    middle = len(records) // 2
    cut = records[middle]["byteOffset"]
    parts = []
    for number, (first, end, some) in enumerate(
        ((0, cut, records[:middle]), (cut, len(content), records[middle:]))
    ):
        name, part = f"params_shard_{number}.bin", content[first:end]
        (folder / name).unlink(missing_ok=True)  # it is linked with the other's
        (folder / name).write_bytes(part)
        moved = [{**record, "byteOffset": record["byteOffset"] - first} for record in some]
        md5 = hashlib.md5(part).hexdigest()
        facts = {"dataPath": name, "nbytes": len(part), "md5sum": md5, "records": moved}
        parts.append({**shard, **facts})
    (folder / "tensor-cache.json").unlink()
    (folder / "tensor-cache.json").write_text(json.dumps({**index, "records": parts}))
    return folder / "params_shard_1.bin"


def test_what_was_fetched_is_kept_when_the_rest_is_missing(
    browser: Browser, cpu_site: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    shutil.copytree(cpu_site, site)
    second = in_two_shards(site / "model")
    second.rename(tmp_path / "second")
    with served(site) as address, opened(browser, address, "404 (File not found)") as page:
        page.wait_for_selector(".loading[data-state=failed]")
        assert page.locator(".loading span").inner_text() == (
            "The model can\u2019t be started here. On the CPU: "
            f"{address}model/params_shard_1.bin: the server answers 404."
        )
        (tmp_path / "second").rename(second)
        fetched: list[str] = []
        page.on("request", lambda request: fetched.append(request.url))
        page.get_by_role("button", name="Try again").click()
        wait_until_ready(page)
        shards = [url.rpartition("/")[2] for url in fetched if "params_shard" in url]
        assert shards == ["params_shard_1.bin"]


def test_a_large_model_is_loaded_when_it_is_wanted(
    browser: Browser, cpu_site: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    shutil.copytree(cpu_site, site)
    manifest = json.loads((site / "model.json").read_text())
    (site / "model.json").write_text(json.dumps({**manifest, "bytes": 4_500_000_000}))
    with served(site) as address, opened(browser, address) as page:
        page.wait_for_selector(".loading[data-state=waiting]")
        assert "The model is not loaded yet: 4.5 GB." in page.locator(".loading").inner_text()
        page.get_by_role("button", name="Load the model").press("Enter")
        wait_until_ready(page)


# On the GPU


@pytest.fixture(scope="module")
def gpu_site(demo32: Path, demo32_webgpu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32: Chromium's software GPU has no float16."""
    site = tmp_path_factory.mktemp("gpu-site") / "demo"
    package_web(demo32, [demo32_webgpu], site)
    return site


def needs_adapter(page: Page) -> None:
    if not page.evaluate("navigator.gpu?.requestAdapter().then(Boolean) ?? false"):
        pytest.skip("this Chromium has no WebGPU, not even in software")


def test_logits_on_the_gpu_are_those_of_the_cpu(
    browser: Browser, gpu_site: Path, demo32: Path, demo32_cpu: Path
) -> None:
    steps, expected = on_cpu(demo32, demo32_cpu, STEPS)
    with served(gpu_site) as address, opened(browser, address) as page:
        needs_adapter(page)
        path = json.loads((gpu_site / "model.json").read_text())["libraries"]["webgpu"]
        found = page.evaluate(LOGITS, {"steps": steps, "library": path})
    # WGSL lets sine and cosine, and with them the rotary embedding, be off by 2 ** -11.
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=5e-3)


def test_a_chat_on_the_gpu_is_that_of_the_cpu(
    browser: Browser, gpu_site: Path, demo32: Path, demo32_cpu: Path
) -> None:
    chat = ChatModule(demo32, model_lib=demo32_cpu)
    expected = chat.generate(QUESTION, {"temperature": 0})
    with served(gpu_site) as address, opened(browser, address) as page:
        needs_adapter(page)
        assert ask(page) == expected
        assert page.locator(".loading").inner_text().endswith("s GPU.")


# What is refused


def test_packages_that_would_not_work_are_refused(
    demo: Path, demo_cpu: Path, demo_wasm: Path, tiny: Any, tmp_path: Path
) -> None:
    with pytest.raises(LibraryError, match=r"demo.so is no library for browsers; make one with"):
        package_web(demo, [demo_cpu], tmp_path / "site")
    with pytest.raises(LibraryError, match="was compiled for quantization = 'q4f16_1', but"):
        package_web(tiny.folder, [demo_wasm], tmp_path / "site")
    with pytest.raises(ConfigError, match="are both for device 'wasm'"):
        package_web(demo, [demo_wasm, demo_wasm], tmp_path / "site")
    assert not (tmp_path / "site").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="mine is not empty, and was not made by `relaxlm pack"):
        package_web(demo, [demo_wasm], tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").is_file()
