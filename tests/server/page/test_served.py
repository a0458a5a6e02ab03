"""The page as the server serves it, with the demo model behind it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("playwright")
pytest.importorskip("fastapi")

from playwright.sync_api import expect

from relaxlm.demo import MODEL_DIR
from relaxlm.engine.loop import EngineLoop
from relaxlm.server.app import ApiServer
from relaxlm.server.settings import ServerSettings
from tests.server.page.actions import ask, field, last_reply, reload
from tests.server.page.scripted import FILES, PAGE
from tests.server.page.test_settings import NUMBERS, open_settings, save
from tests.server.serving import Running, running

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.server.page.conftest import OpenPage


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served") / "demo"
    build = [sys.executable, "-m", "relaxlm", "build", MODEL_DIR, "--device", "cpu", "-o", folder]
    subprocess.run(build, check=True, capture_output=True, env=dict(os.environ))
    library = folder / "model-q4f16_1-cpu.so"
    with EngineLoop.load(folder, library, threads=1) as engine:
        with running(ApiServer(engine, ServerSettings())) as server:
            yield server


@pytest.fixture
def page(watched: OpenPage, demo_server: Running) -> Page:
    page = watched(f"{demo_server.url}/")
    expect(page.locator(".model")).to_have_text("demo")
    return page


def set_temperature(page: Page, value: str) -> None:
    open_settings(page).get_by_label("Temperature").fill(value)
    save(page)


def test_the_demo_model_answers(page: Page) -> None:
    set_temperature(page, "0")
    page.get_by_role("button", name="What is 17 + 25?").click()
    field(page).press("Enter")
    reply = last_reply(page)
    expect(reply.locator(".markdown").last).to_contain_text("42")
    reply.get_by_role("button", name="first token").click()
    for row in ("Prompt", "Time to first token", "On the server: waiting", "the model"):
        expect(reply.locator(".stats-table")).to_contain_text(row)
    ask(page, "Who are you?")
    expect(page.locator(".reply")).to_have_count(2)
    expect(page.get_by_role("alert").filter(visible=True)).to_have_count(0)
    reload(page)
    expect(page.locator(".reply")).to_have_count(2)


def test_the_server_takes_every_setting(page: Page) -> None:
    dialog = open_settings(page)
    for label, (typed, _, _) in NUMBERS.items():
        dialog.get_by_label(label).fill(typed)
    dialog.get_by_label("Longest reply, tokens").fill("8")
    dialog.get_by_label("System prompt").fill("Be short.")
    dialog.get_by_label("Stop at").fill("END\n\\n")
    dialog.get_by_label("Format").select_option("JSON object")
    save(page)
    ask(page, "Who are you?")
    reply = last_reply(page)
    expect(reply.get_by_role("button", name="first token")).to_be_visible()
    expect(reply.get_by_role("alert")).to_have_count(0)


def test_what_the_server_refuses_is_told(page: Page) -> None:
    ask(page, "word " * 3000)
    expect(last_reply(page).get_by_role("alert")).to_contain_text("tokens")
    open_settings(page).get_by_label("Thinking").select_option("Off")
    save(page)
    ask(page, "Who are you?")
    expect(last_reply(page).get_by_role("alert")).to_contain_text("enable_thinking")


def test_the_page_is_part_of_the_package() -> None:
    """What the page loads is there, in one folder without others."""
    loaded = set(re.findall(r'(?:src|href)="page/([^"]+)"', (PAGE / "index.html").read_text()))
    for script in PAGE.glob("*.js"):
        loaded |= set(re.findall(r'from "\./([^"]+)"', script.read_text()))
    assert loaded | {"index.html"} == FILES
