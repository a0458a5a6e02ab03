"""The list of conversations: kept in the browser, found again, and moved between browsers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("playwright")

from playwright.sync_api import expect

from tests.server.page.actions import ask, finished, last_reply, live_answer, reload, send, titles
from tests.server.page.scripted import Answer, text

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.server.page.conftest import OpenPage
    from tests.server.page.scripted import PageServer


def new(page: Page) -> None:
    page.get_by_role("button", name="New conversation").click()


def test_conversations_survive_a_reload(page: Page, server: PageServer) -> None:
    server.answers.append(Answer([{"reasoning_content": "Hm."}, *text("A *reply*.")]))
    ask(page, "First question,\nof two lines")
    new(page)
    ask(page, "Second question")
    reload(page)
    expect(page.locator("h1")).to_have_text("Second question")
    expect(page.locator(".bubble")).to_have_text("Second question")
    assert titles(page) == ["Second question", "First question,"]
    page.get_by_role("button", name="First question,", exact=True).click()
    expect(last_reply(page).locator("em")).to_have_text("reply")
    expect(page.locator(".reasoning")).to_have_count(1)
    expect(last_reply(page)).to_contain_text("first token")
    page.go_back()
    expect(page.locator("h1")).to_have_text("Second question")
    expect(page.locator(".bubble")).to_have_text("Second question")


def test_a_reply_in_the_making_survives_a_reload(page: Page, server: PageServer) -> None:
    live = live_answer(server)
    send(page, "Long one")
    live.put({"content": "So far"})
    expect(last_reply(page)).to_contain_text("So far")
    page.wait_for_timeout(1200)  # it is kept once a second
    reload(page)
    expect(last_reply(page)).to_contain_text("So far")
    expect(last_reply(page)).to_contain_text("Stopped.")
    assert server.gone.wait(10)


def test_renaming_and_deleting(page: Page) -> None:
    for question in ("One", "Two", "Three"):
        new(page)
        ask(page, question)
    page.get_by_role("button", name="Rename “Three”").click()
    name = page.get_by_label("Name of the conversation")
    name.fill("Drei")
    name.press("Enter")
    expect(page.locator("h1")).to_have_text("Drei")
    ask(page, "Another question")  # a name given by hand stays
    page.locator(".conversation", has_text="One").hover()
    page.get_by_role("button", name="Delete “One”").click()
    expect(page.locator(".conversation")).to_have_count(2)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("h1")).to_have_text("One")
    expect(page.locator(".conversation")).to_have_count(3)
    reload(page)
    expect(page.locator(".conversation")).to_have_count(3)
    assert titles(page) == ["Drei", "Two", "One"]


def test_deleting_a_conversation_ends_its_reply(page: Page, server: PageServer) -> None:
    live = live_answer(server)
    send(page, "Long one")
    live.put({"content": "So far"})
    expect(last_reply(page)).to_contain_text("So far")
    page.get_by_role("button", name="Delete “Long one”").click()
    assert server.gone.wait(10)
    expect(page.get_by_text("No conversations yet.")).to_be_visible()
    page.wait_for_timeout(1200)  # it would have been kept again by now
    reload(page)
    expect(page.get_by_text("No conversations yet.")).to_be_visible()


def test_deleting_all_asks_first(page: Page) -> None:
    ask(page, "One")
    page.get_by_role("button", name="Delete all").click()
    dialog = page.get_by_role("dialog", name="Delete all conversations?")
    expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(".conversation")).to_have_count(1)
    page.get_by_role("button", name="Delete all").click()
    dialog.get_by_role("button", name="Delete all").click()
    expect(page.locator(".conversation")).to_have_count(0)
    expect(page.locator(".bubble")).to_have_count(0)


def test_searching_titles_and_texts(page: Page, server: PageServer) -> None:
    server.answers += [Answer(text("Foxes are red.")), Answer(text("Owls are wise."))]
    ask(page, "About foxes")
    new(page)
    ask(page, "About birds")
    search = page.get_by_label("Search conversations")
    search.fill("WISE")
    expect(page.locator(".conversation")).to_have_text(["About birds"])
    search.fill("foxes")
    expect(page.locator(".conversation")).to_have_text(["About foxes"])
    search.fill("zebra")
    expect(page.get_by_text("Nothing found.")).to_be_visible()
    search.press("Escape")
    expect(page.locator(".conversation")).to_have_count(2)


def test_export_and_import(page: Page, open_page: OpenPage, tmp_path: Path) -> None:
    ask(page, "Take me along")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / "export.json"
    download.value.save_as(file)
    exported = json.loads(file.read_text(encoding="utf-8"))
    assert exported["format"] == "relaxlm-conversations"
    assert [one["title"] for one in exported["conversations"]] == ["Take me along"]
    elsewhere = open_page()
    elsewhere.locator("#import-file").set_input_files(file)
    expect(elsewhere.get_by_text("Imported one conversation")).to_be_visible()
    elsewhere.get_by_role("button", name="Take me along", exact=True).click()
    expect(last_reply(elsewhere)).to_contain_text("An answer.")
    # Once more: beside the first, not in its place.
    elsewhere.locator("#import-file").set_input_files(file)
    expect(elsewhere.locator(".conversation")).to_have_count(2)


NO_EXPORTS = {
    "{": "not JSON",
    "[]": "not an export of this page",
    '{"format": "relaxlm-conversations", "version": 9, "conversations": []}': "version 9",
    '{"format": "relaxlm-conversations", "version": 1, "conversations": [{"id": "<b>"}]}': (
        "Conversation 1 of the file is damaged"
    ),
}


def test_a_file_that_is_no_export_is_refused(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    for content, problem in NO_EXPORTS.items():
        file.write_text(content, encoding="utf-8")
        page.locator("#import-file").set_input_files(file)
        expect(page.locator(".toast")).to_contain_text(problem)
    expect(page.locator(".conversation")).to_have_count(0)


def test_two_tabs_show_the_same_list(page: Page, server: PageServer) -> None:
    other = page.context.new_page()
    other.goto(server.url)
    expect(other.get_by_text("No conversations yet.")).to_be_visible()
    ask(page, "From one tab")
    expect(other.locator(".conversation")).to_have_text(["From one tab"])


def conversation(messages: int) -> str:
    """An export with one conversation of so many messages."""
    pairs = (
        {"role": "user", "content": f"Question {i}"}
        if i % 2 == 0
        else {"role": "assistant", "shown": 0, "versions": [{"content": f"Answer **{i}**"}]}
        for i in range(messages)
    )
    one = {"id": "long", "title": "Long", "messages": list(pairs)}
    file = {"format": "relaxlm-conversations", "version": 1, "conversations": [one]}
    return json.dumps(file)


def test_long_conversations_are_shown_from_their_end(
    page: Page, server: PageServer, tmp_path: Path
) -> None:
    file = tmp_path / "long.json"
    file.write_text(conversation(600), encoding="utf-8")
    page.locator("#import-file").set_input_files(file)
    page.get_by_role("button", name="Long", exact=True).click()
    expect(page.get_by_text("Answer 599")).to_be_in_viewport()
    assert page.locator(".message").count() == 40
    page.get_by_role("button", name="Show earlier messages (560)").click()
    expect(page.locator(".message")).to_have_count(240)
    page.get_by_role("button", name="Show earlier messages (360)").click()
    page.get_by_role("button", name="Show earlier messages (160)").click()
    expect(page.locator(".message")).to_have_count(600)
    expect(page.get_by_role("button", name="Show earlier")).to_have_count(0)
    assert page.locator(".message h2").all_text_contents()[:2] == ["You", "Reply"]
    expect(page.locator(".bubble").first).to_have_text("Question 0")
    ask(page, "One more")
    assert len(server.requests[-1]["messages"]) == 601
    finished(page)


def test_without_a_database_the_page_still_works(open_page: OpenPage) -> None:
    page = open_page()
    page.add_init_script("Object.defineProperty(window, 'indexedDB', {value: undefined})")
    page.reload()
    expect(page.get_by_text("This browser stores nothing here")).to_be_visible()
    ask(page, "Hello?")
    expect(last_reply(page)).to_contain_text("An answer.")
    expect(page.locator(".conversation")).to_have_text(["Hello?"])
