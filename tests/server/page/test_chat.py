"""The page in a browser: sending, streaming, stopping, and going on from there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("playwright")

from playwright.sync_api import expect

from tests.server.page.actions import (
    ask,
    field,
    finished,
    last_reply,
    live_answer,
    reload,
    send,
)
from tests.server.page.scripted import MODEL, Answer, text

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.server.page.conftest import OpenPage
    from tests.server.page.scripted import PageServer


def test_a_reply_streams(page: Page, server: PageServer) -> None:
    expect(page.get_by_role("heading", name=f"Chat with {MODEL}")).to_be_visible()
    live = live_answer(server)
    send(page, "Hello?")
    live.put({"role": "assistant", "content": ""})
    live.put({"content": "One"})
    reply = last_reply(page).locator(".markdown").last
    expect(reply).to_have_text("One")
    expect(page.locator(".reply")).to_have_attribute("aria-busy", "true")
    live.put({"content": " **two"})
    expect(reply).to_have_text("One **two")
    live.put({"content": "** three"})
    expect(reply.locator("strong")).to_have_text("two")
    live.put(None)
    finished(page)
    expect(reply).to_have_text("One two three")
    expect(page.locator(".reply")).to_have_attribute("aria-busy", "false")
    assert server.requests == [
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Hello?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    ask(page, "And then?")
    assert [message["content"] for message in server.requests[1]["messages"]] == [
        "Hello?",
        "One **two** three",
        "And then?",
    ]


def test_what_a_reply_cost_is_shown(page: Page, server: PageServer) -> None:
    usage = {
        "prompt_tokens": 1200,
        "completion_tokens": 34,
        "prompt_tokens_details": {"cached_tokens": 1100},
        "completion_tokens_details": {"reasoning_tokens": 30},
        "extra": {"queue_s": 0.25, "prefill_tokens_per_s": 4000.4, "decode_tokens_per_s": 51.5},
    }
    server.answers.append(Answer(text("Some ", "words."), usage=usage))
    ask(page, "Hello?")
    line = page.get_by_role("button", name="first token")
    expect(line).to_contain_text("tokens/s · ")
    expect(line).to_contain_text("34 tokens")
    expect(line).to_have_attribute("aria-expanded", "false")
    line.click()
    expect(line).to_have_attribute("aria-expanded", "true")
    table = page.locator(".stats-table")
    for fact in (
        "1,200 tokens, 1100 of them cached",
        "34 tokens, 30 of them thinking",
        "0.25 s",
        "4000 tokens/s",
        "51.5 tokens/s",
        "the model",
    ):
        expect(table).to_contain_text(fact)


def test_the_speed_is_that_of_the_tokens_after_the_first(page: Page) -> None:
    speed = page.evaluate(
        """async () => (await import("/page/reply.js")).tokensPerSecond(
            {usage: {completion: 21}, timing: {first: 1.5, total: 2.5}})"""
    )
    assert speed == 20


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stopping_keeps_what_came(page: Page, server: PageServer, how: str) -> None:
    live = live_answer(server)
    send(page, "Count!")
    live.put({"content": "1 2 3"})
    reply = last_reply(page)
    expect(reply).to_contain_text("1 2 3")
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    finished(page)
    assert server.gone.wait(10), "the server did not see the client go"
    expect(reply).to_contain_text("1 2 3")
    expect(reply).to_contain_text("Stopped.")
    expect(reply.get_by_role("button", name="about 1 token")).to_be_visible()
    reload(page)
    expect(last_reply(page)).to_contain_text("1 2 3")
    expect(last_reply(page)).to_contain_text("Stopped.")
    ask(page, "Go on")
    assert server.requests[-1]["messages"][1] == {"role": "assistant", "content": "1 2 3"}


def test_stopping_before_the_first_token(page: Page, server: PageServer) -> None:
    live_answer(server)
    send(page, "Hello?")
    expect(page.locator(".waiting")).to_be_visible()
    assert server.asked.wait(10)
    page.keyboard.press("Escape")
    finished(page)
    expect(last_reply(page)).to_contain_text("Stopped.")
    expect(page.locator(".waiting")).to_be_hidden()
    ask(page, "Hello again?")
    # A reply without text is no message for the model.
    roles = [message["role"] for message in server.requests[-1]["messages"]]
    assert roles == ["user", "user"]


def test_enter_does_not_send_while_a_reply_is_written(page: Page, server: PageServer) -> None:
    live = live_answer(server)
    send(page, "Hello?")
    live.put({"content": "Wait"})
    expect(last_reply(page)).to_contain_text("Wait")
    send(page, "Me first!")
    live.put(None)
    finished(page)
    assert len(server.requests) == 1
    expect(field(page)).to_have_value("Me first!")
    expect(page.get_by_text("Stopped.")).to_have_count(0)


def test_two_quick_enters_are_one_message(page: Page, server: PageServer) -> None:
    field(page).fill("Hello?")
    # Before the browser has stored the first message.
    field(page).evaluate(
        """(field) => {
            const enter = { key: "Enter", bubbles: true, cancelable: true };
            field.dispatchEvent(new KeyboardEvent("keydown", enter));
            field.value = "And now?";
            field.dispatchEvent(new KeyboardEvent("keydown", enter));
        }"""
    )
    finished(page)
    assert [len(request["messages"]) for request in server.requests] == [1]
    expect(field(page)).to_have_value("And now?")


def test_regenerating_keeps_the_versions(page: Page, server: PageServer) -> None:
    server.answers += [Answer(text("First.")), Answer(text("Second."))]
    ask(page, "Tell me.")
    page.get_by_role("button", name="Regenerate").click()
    reply = last_reply(page)
    expect(reply).to_contain_text("Second.")
    finished(page)
    assert server.requests[1]["messages"] == [{"role": "user", "content": "Tell me."}]
    expect(reply).to_contain_text("2/2")
    reply.get_by_role("button", name="Earlier version").click()
    expect(reply).to_contain_text("First.")
    reload(page)
    expect(reply).to_contain_text("First.")
    expect(reply).to_contain_text("1/2")
    ask(page, "More.")
    assert server.requests[2]["messages"][1]["content"] == "First."


def test_editing_the_last_message(page: Page, server: PageServer) -> None:
    ask(page, "First question")
    ask(page, "Second question")
    expect(page.get_by_role("button", name="Edit message")).to_have_count(1)
    field(page).press("ArrowUp")
    editor = page.locator(".edit textarea")
    expect(editor).to_be_focused()
    expect(editor).to_have_value("Second question")
    editor.press("Escape")
    expect(page.locator(".edit")).to_have_count(0)
    page.locator(".user").last.hover()
    page.get_by_role("button", name="Edit message").click()
    editor.fill("Better question")
    editor.press("Enter")
    finished(page)
    expect(page.locator(".bubble")).to_have_text(["First question", "Better question"])
    expect(page.locator(".reply")).to_have_count(2)
    assert [message["content"] for message in server.requests[-1]["messages"]] == [
        "First question",
        "An answer.",
        "Better question",
    ]


def test_thinking_is_open_until_the_answer_begins(page: Page, server: PageServer) -> None:
    live = live_answer(server)
    send(page, "Think!")
    live.put({"reasoning_content": "Let me *see*."})
    thoughts = page.locator(".reasoning")
    expect(thoughts.locator("em")).to_have_text("see")
    expect(thoughts.get_by_text("Thinking")).to_be_visible()
    live.put({"content": "Done."})
    expect(thoughts).not_to_have_attribute("open", "")
    expect(thoughts.get_by_text("Thought")).to_be_visible()
    thoughts.locator("summary").click()
    live.put({"content": " Really."})
    expect(last_reply(page)).to_contain_text("Really.")
    expect(thoughts).to_have_attribute("open", "")  # as the reader left it
    live.put(None)
    finished(page)
    ask(page, "Next")
    assert server.requests[-1]["messages"][1]["content"] == "Done. Really."
    reload(page)
    thoughts.first.locator("summary").click()
    expect(thoughts.first.locator("em")).to_have_text("see")


def test_a_reply_goes_on_while_another_conversation_is_open(page: Page, server: PageServer) -> None:
    live = live_answer(server)
    send(page, "Slow one")
    live.put({"content": "First half"})
    expect(last_reply(page)).to_contain_text("First half")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".reply")).to_have_count(0)
    expect(page.get_by_role("img", name="writing")).to_be_visible()
    ask(page, "Quick one")
    live.put({"content": ", second half. "})
    page.wait_for_timeout(1700)  # for what screen readers are told
    expect(page.get_by_role("log", name="Reply")).not_to_contain_text("second half")
    page.get_by_role("button", name="Slow one", exact=True).click()
    expect(last_reply(page)).to_contain_text("First half, second half")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    live.put(None)
    finished(page)
    expect(page.get_by_role("img", name="writing")).to_have_count(0)


def test_the_reader_may_scroll_away_from_a_reply(page: Page, server: PageServer) -> None:
    live = live_answer(server)
    send(page, "Long one")
    live.put({"content": "line\n\n" * 80})
    lines = last_reply(page).locator("p")
    expect(lines).to_have_count(80)
    below = """() => { // pixels
        const {scrollHeight, scrollTop, clientHeight} = document.getElementById("scroller");
        return scrollHeight - scrollTop - clientHeight;
    }"""
    assert page.evaluate(below) < 2, "the end is not followed"
    page.locator("#scroller").hover()
    page.mouse.wheel(0, -600)
    latest = page.get_by_role("button", name="Latest")
    expect(latest).to_be_visible()
    place = page.evaluate("document.getElementById('scroller').scrollTop")
    live.put({"content": "more\n\n" * 40})
    expect(lines).to_have_count(120)
    assert page.evaluate("document.getElementById('scroller').scrollTop") == place
    latest.click()
    expect(latest).to_be_hidden()
    live.put({"content": "end\n\n" * 40})
    expect(lines).to_have_count(160)
    assert page.evaluate(below) < 2
    live.put(None)
    finished(page)


def test_screen_readers_hear_each_sentence_once(page: Page, server: PageServer) -> None:
    live = live_answer(server)
    send(page, "Hello?")
    heard = page.get_by_role("log", name="Reply")
    live.put({"content": "This is one. This"})
    expect(heard).to_have_text("This is one.")
    live.put({"content": " is two. Three"})
    live.put(None)
    finished(page)
    expect(heard).to_have_text("This is one.This is two. ThreeEnd of the reply.")


def test_copying(open_page: OpenPage, server: PageServer) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    server.answers.append(Answer(text("Look:\n\n```py\nprint(1)\n\nx = 2\n```\n")))
    ask(page, "Code, please")
    clipboard = "navigator.clipboard.readText()"
    page.get_by_role("button", name="Copy code").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate(clipboard) == "print(1)\n\nx = 2"
    page.get_by_role("button", name="Copy reply").click()
    expect(page.get_by_role("button", name="Copied")).to_have_count(2)
    assert page.evaluate(clipboard) == "Look:\n\n```py\nprint(1)\n\nx = 2\n```\n"
