"""Settings are sent as they were given, and nothing else; keys and models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("playwright")

from playwright.sync_api import expect

from tests.server.page.actions import ask, finished, last_reply, reload, send
from tests.server.page.scripted import Answer, text

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

    from tests.server.page.scripted import PageServer

NUMBERS = {
    "Temperature": ("0.7", "temperature", 0.7),
    "Top P": ("0,9", "top_p", 0.9),  # a comma, as half of the world writes it
    "Top K": ("40", "top_k", 40),
    "Min P": ("0.05", "min_p", 0.05),
    "Repetition penalty": ("1.1", "repetition_penalty", 1.1),
    "Presence penalty": ("-0.5", "presence_penalty", -0.5),
    "Frequency penalty": ("0.25", "frequency_penalty", 0.25),
    "Longest reply, tokens": ("256", "max_tokens", 256),
    "Seed": ("-7", "seed", -7),
}


def open_settings(page: Page) -> Locator:
    page.get_by_role("button", name="Settings", exact=True).click()
    return page.get_by_role("dialog", name="Settings")


def save(page: Page) -> None:
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#settings-dialog")).to_be_hidden()


def test_settings_are_sent(page: Page, server: PageServer) -> None:
    dialog = open_settings(page)
    for label, (typed, _, _) in NUMBERS.items():
        dialog.get_by_label(label).fill(typed)
    dialog.get_by_label("System prompt").fill("Be short.")
    dialog.get_by_label("Stop at").fill("END\n\\n\\nUser:")
    dialog.get_by_label("Format").select_option("JSON object")
    dialog.get_by_label("Thinking").select_option("Off")
    save(page)
    ask(page, "Hello?")
    (request,) = server.requests
    expected = {name: value for _, name, value in NUMBERS.values()}
    assert {name: request[name] for name in expected} == expected
    assert request["messages"][0] == {"role": "system", "content": "Be short."}
    assert request["stop"] == ["END", "\n\nUser:"]
    assert request["response_format"] == {"type": "json_object"}
    assert request["chat_template_kwargs"] == {"enable_thinking": False}
    # They are those of this conversation, and where a new one begins.
    reload(page)
    page.get_by_role("button", name="New conversation").click()
    dialog = open_settings(page)
    expect(dialog.get_by_label("Temperature")).to_have_value("0.7")
    expect(dialog.get_by_label("Stop at")).to_have_value("END\n\\n\\nUser:")
    dialog.get_by_role("button", name="Reset").click()
    save(page)
    expect(page.get_by_role("button", name="Default settings")).to_be_visible()
    ask(page, "Hello?")
    assert set(server.requests[-1]) == {"model", "messages", "stream", "stream_options"}
    page.get_by_role("button", name="Hello?", exact=True).last.click()
    expect(page.get_by_role("button", name="system prompt · temperature 0.7")).to_be_visible()


def test_a_json_schema_is_sent(page: Page, server: PageServer) -> None:
    dialog = open_settings(page)
    expect(dialog.get_by_label("JSON schema")).to_be_hidden()
    dialog.get_by_label("Format").select_option("JSON with a schema")
    dialog.get_by_label("JSON schema").fill("{type")
    page.get_by_role("button", name="Save").click()
    expect(dialog.get_by_text("This is not JSON")).to_be_visible()
    expect(dialog.get_by_label("JSON schema")).to_be_focused()
    dialog.get_by_label("JSON schema").fill('{"type": "object"}')
    save(page)
    ask(page, "Hello?")
    schema = {"name": "reply", "strict": True, "schema": {"type": "object"}}
    assert server.requests[0]["response_format"] == {"type": "json_schema", "json_schema": schema}


WRONG = (
    ("Temperature", "warm", "Temperature has to be a number, 0 to 2."),
    ("Temperature", "2.5", "Temperature has to be a number, 0 to 2."),
    ("Top K", "1.5", "Top K has to be a whole number, 0 or more."),
    ("Longest reply, tokens", "0", "Longest reply, tokens has to be a whole number, 1 or more."),
)


def test_a_value_that_is_not_possible_is_not_saved(page: Page, server: PageServer) -> None:
    for label, typed, problem in WRONG:
        dialog = open_settings(page)
        dialog.get_by_label(label).fill(typed)
        page.get_by_role("button", name="Save").click()
        expect(dialog.get_by_text(problem)).to_be_visible()
        expect(dialog.get_by_label(label)).to_be_focused()
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
    ask(page, "Hello?")
    assert set(server.requests[0]) == {"model", "messages", "stream", "stream_options"}


def test_an_api_key_is_asked_for_and_kept_for_the_tab(page: Page, server: PageServer) -> None:
    server.key = "sesame"
    reload(page)
    dialog = page.get_by_role("dialog", name="This server asks for an API key")
    expect(dialog).to_be_visible()
    dialog.get_by_label("API key").fill("open up")
    dialog.get_by_role("button", name="Continue").click()
    expect(dialog).to_contain_text("The API key is wrong.")
    dialog.get_by_label("API key").fill("sesame")
    dialog.get_by_label("API key").press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator(".model")).to_have_text("scripted-model")
    ask(page, "Hello?")
    assert server.keys == ["Bearer sesame"]
    reload(page)
    expect(page.locator(".model")).to_have_text("scripted-model")
    expect(dialog).to_be_hidden()
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")


def test_a_key_that_is_asked_for_later_sends_the_message_again(
    page: Page, server: PageServer
) -> None:
    server.key = "sesame"
    send(page, "Hello?")
    dialog = page.get_by_role("dialog", name="This server asks for an API key")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    last_reply(page).get_by_role("button", name="Enter a key").click()
    dialog.get_by_label("API key").fill("sesame")
    dialog.get_by_label("API key").press("Enter")
    expect(last_reply(page)).to_contain_text("An answer.")
    finished(page)
    expect(page.locator(".bubble")).to_have_count(1)


def test_a_choice_of_models(page: Page, server: PageServer) -> None:
    server.models = ["small", "large"]
    reload(page)
    page.get_by_label("Model").select_option("large")
    ask(page, "Hello?")
    assert server.requests[0]["model"] == "large"


ERRORS = {
    "field": (
        Answer(status=400, error={"error": {"message": "Too high.", "param": "top_p"}}),
        "Too high. (top_p)",
    ),
    "busy": (
        Answer(status=503, error={"error": {"message": "Busy."}}, headers={"Retry-After": "7"}),
        "The server suggests to wait 7 s.",
    ),
    "proxy": (Answer(status=502, error="<h1>Bad Gateway</h1>"), "The server answered 502"),
    "in the stream": (
        Answer(text("So far"), failure={"message": "Out of pages."}),
        "Out of pages.",
    ),
    "cut off": (
        Answer(text("So far"), finish=None),
        "The connection ended before the reply was complete.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_shown_and_can_be_tried_again(page: Page, server: PageServer, name: str) -> None:
    answer, message = ERRORS[name]
    server.answers += [answer, Answer(text("Better now."))]
    ask(page, "Hello?")
    reply = last_reply(page)
    alert = reply.get_by_role("alert")
    expect(alert).to_contain_text(message)
    if answer.deltas:
        expect(reply).to_contain_text("So far")
    reload(page)
    expect(alert).to_contain_text("Busy." if name == "busy" else message)
    reply.get_by_role("button", name="Try again").click()
    expect(reply).to_contain_text("Better now.")
    finished(page)
    assert server.requests[0] == server.requests[1]
    expect(reply.get_by_text("2/2")).to_have_count(1 if answer.deltas else 0)


def test_a_server_that_is_away(page: Page, server: PageServer) -> None:
    page.context.set_offline(True)
    ask(page, "Hello?")
    expect(last_reply(page).get_by_role("alert")).to_contain_text("be reached")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(last_reply(page)).to_contain_text("An answer.")
