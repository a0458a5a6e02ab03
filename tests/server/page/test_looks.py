"""Light and dark, large and small, and everything by keyboard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("playwright")

from playwright.sync_api import expect

from tests.server.page.actions import ask, field, finished, last_reply, live_answer, reload, send
from tests.server.page.scripted import Answer, text

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.server.page.conftest import OpenPage
    from tests.server.page.scripted import PageServer

LIGHT = "rgb(255, 255, 255)"
READABLE = 4.5  # contrast of text, WCAG 2.2 AA
VISIBLE = 3.0  # of controls and focus rings
PHONE = {"width": 360, "height": 640}

EVERYTHING = """A *reply* with `code`, a [link](https://a.example) and math $x$.

```python
def f(x):  # comment
    return "string" + 1
```

> quoted

| a | b |
|---|---|
| 1 | 2 |

1. one
2. two
"""
WIDE = f"""`{"code" * 40}` {"word" * 60}

```
{"line " * 60}
```

|{"header|" * 20}
|{"-|" * 20}
|{"cell|" * 20}

$$
{"x + " * 60}
$$

https://a.example/{"path" * 50}
"""

CONTRAST = """() => {
    const parse = (color) => {
        const canvas = document.createElement("canvas").getContext("2d");
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map((value) => {
            const part = value / 255;
            return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const ground = (node) => {
        for (let at = node; at; at = at.parentElement) {
            const color = parse(getComputedStyle(at).backgroundColor);
            if (color[3] === 255) return color;
        }
        return [255, 255, 255];
    };
    const texts = [...document.querySelectorAll("body *")].filter((node) =>
        node.checkVisibility({opacityProperty: true, visibilityProperty: true}) &&
        !node.closest(".visually-hidden, .skip-link, :disabled") &&
        [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
    return texts.map((node) => {
        const [a, b] = [luminance(parse(getComputedStyle(node).color)), luminance(ground(node))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        return [ratio, `${node.localName}.${node.className}: ${node.textContent.slice(0, 30)}`];
    });
}"""


def background(page: Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_dark_follows_the_system_until_the_reader_chooses(open_page: OpenPage) -> None:
    page = open_page(color_scheme="dark")
    dark = background(page)
    assert dark != LIGHT
    page.emulate_media(color_scheme="light")
    assert background(page) == LIGHT
    button = page.get_by_role("button", name="Theme:")
    expect(button).to_have_text("Theme: auto")
    button.click()
    expect(button).to_have_text("Theme: light")
    button.click()
    expect(button).to_have_text("Theme: dark")
    assert background(page) == dark
    reload(page)
    expect(button).to_have_text("Theme: dark")
    assert background(page) == dark
    assert page.locator("meta[name=theme-color]").get_attribute("content") == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(open_page: OpenPage, server: PageServer, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    thoughts = {"reasoning_content": "Thinking about it."}
    failed = Answer(status=500, error={"error": {"message": "Out of order."}})
    server.answers += [Answer([thoughts, *text(EVERYTHING)]), failed]
    seen = page.evaluate(CONTRAST)
    ask(page, "Hello?")
    page.locator(".reasoning summary").click()
    page.get_by_role("button", name="first token").click()
    ask(page, "And now?")
    seen += page.evaluate(CONTRAST)
    page.keyboard.press("Control+,")
    seen += page.evaluate(CONTRAST)
    page.keyboard.press("Escape")
    page.keyboard.press("Control+/")
    seen += page.evaluate(CONTRAST)
    assert len(seen) > 150
    faint = {what: ratio for ratio, what in seen if ratio < READABLE}
    assert not faint


def focus_ring(page: Page) -> tuple[str, bool]:
    """What has the focus, and whether the reader can see that."""
    return page.evaluate(
        """() => {
            const node = document.activeElement;
            const ringed = node.closest(".composer, .edit") ?? node;
            const style = getComputedStyle(ringed);
            const outline = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
            const shadow = ringed !== node && style.boxShadow !== "none";
            const name = node.getAttribute("aria-label") || node.labels?.[0]?.textContent
                || node.textContent;
            return [`${node.localName} ${name.trim()}`, outline || shadow];
        }"""
    )


def test_every_control_is_reached_by_keyboard_and_shows_it(page: Page, server: PageServer) -> None:
    server.answers.append(Answer([{"reasoning_content": "Hm."}, *text(EVERYTHING)]))
    ask(page, "Hello?")
    page.locator("body").evaluate("(body) => { body.tabIndex = -1; body.focus(); }")
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name, visible = focus_ring(page)
        if name.startswith("body"):  # the browser's own controls are next
            break
        assert visible, f"no focus ring: {name}"
        reached.append(name)
    every = page.locator("button:visible:enabled, a:visible, input:visible, textarea:visible")
    # Task lists aside, whose boxes are disabled: all controls, code, tables and thoughts.
    for label in (
        "button New conversation",
        "input Search conversations",
        "button Hello?",
        "button Rename “Hello?”",
        "button Delete “Hello?”",
        "button Theme: auto",
        "button Settings",
        "summary Thought",
        "button Copy code",
        "pre python block",
        "div Table",
        "button Copy reply",
        "button Regenerate",
        "button Edit message",
        "textarea Message",
    ):
        assert label in reached, f"{label} is not among {reached}"
    assert len(reached) >= every.count() - 1  # the button to send is off without text


def test_a_conversation_by_keyboard_alone(page: Page, server: PageServer) -> None:
    expect(field(page)).to_be_focused()
    page.keyboard.type("First")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    live = live_answer(server)
    page.keyboard.press("Enter")
    live.put({"content": "Slow"})
    expect(last_reply(page)).to_contain_text("Slow")
    page.keyboard.press("Escape")
    finished(page)
    assert server.requests[0]["messages"][0]["content"] == "First\nline two"
    page.keyboard.press("Control+Shift+Enter")
    expect(last_reply(page)).to_contain_text("2/2")
    page.keyboard.press("Control+Shift+O")
    expect(page.locator(".bubble")).to_have_count(0)
    expect(field(page)).to_be_focused()
    ask(page, "Second")
    page.keyboard.press("Control+K")
    expect(page.get_by_label("Search conversations")).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("button", name="First", exact=True)).to_be_focused()
    page.keyboard.press("F2")
    page.keyboard.type("Renamed")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Renamed", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Renamed")
    page.keyboard.press("Control+K")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Delete")
    expect(page.locator(".conversation")).to_have_count(1)
    page.keyboard.press("Control+B")
    expect(page.locator("#sidebar")).to_be_hidden()
    reload(page)
    expect(page.locator("#sidebar")).to_be_hidden()
    page.keyboard.press("Control+K")
    expect(page.get_by_label("Search conversations")).to_be_focused()
    page.keyboard.press("Control+,")
    settings = page.get_by_role("dialog", name="Settings")
    expect(settings).to_be_visible()
    for _ in range(30):  # the focus stays inside
        page.keyboard.press("Tab")
    assert settings.evaluate(
        "(dialog) => dialog.contains(document.activeElement) "
        "|| document.activeElement === document.body"
    )
    page.keyboard.press("Escape")
    expect(settings).to_be_hidden()
    page.keyboard.press("Control+/")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_contain_text("Stop the reply")


def test_an_input_method_may_use_enter(page: Page, server: PageServer) -> None:
    field(page).fill("に")
    field(page).evaluate(
        """(field) => field.dispatchEvent(new KeyboardEvent("keydown",
            {key: "Enter", isComposing: true, bubbles: true}))"""
    )
    expect(field(page)).to_have_value("に")
    assert server.requests == []


def overflow(page: Page) -> tuple[int, int]:
    """Pixels that the page and the messages are wider than their window."""
    return page.evaluate(
        """() => ["html", "#scroller"].map((name) => {
            const node = document.querySelector(name);
            return node.scrollWidth - node.clientWidth;
        })"""
    )


def test_a_phone_is_wide_enough(open_page: OpenPage, server: PageServer) -> None:
    page = open_page(viewport=PHONE, is_mobile=True, has_touch=True)
    assert overflow(page) == [0, 0]
    server.answers.append(Answer(text(WIDE)))
    ask(page, "long" * 100)
    assert overflow(page) == [0, 0]
    for wide in (".code-block pre", ".table-scroll", ".math-block"):
        box = last_reply(page).locator(wide)
        box.evaluate("(box) => box.scrollBy(50, 0)")
        assert box.evaluate("(box) => box.scrollLeft") == 50, f"{wide} does not scroll"
    page.get_by_role("button", name="first token").tap()
    assert overflow(page) == [0, 0]
    menu = page.get_by_role("button", name="Conversations", exact=True)
    expect(menu).to_have_attribute("aria-expanded", "false")
    expect(page.locator("#sidebar")).to_be_hidden()
    menu.tap()
    expect(menu).to_have_attribute("aria-expanded", "true")
    expect(page.get_by_role("button", name="New conversation")).to_be_in_viewport(ratio=1)
    assert page.locator("#main").evaluate("(main) => main.inert")
    page.locator("#backdrop").tap(position={"x": 350, "y": 300})
    expect(page.locator("#sidebar")).to_be_hidden()
    menu.tap()
    page.get_by_role("button", name="New conversation").tap()
    expect(page.locator("#sidebar")).to_be_hidden()
    expect(page.locator(".bubble")).to_have_count(0)
    menu.tap()
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_be_hidden()
    page.get_by_role("button", name="Settings", exact=True).tap()
    assert overflow(page) == [0, 0]
    expect(page.get_by_role("button", name="Save")).to_be_in_viewport(ratio=1)
    dialog = page.locator("#settings-dialog .dialog-body")
    assert dialog.evaluate("(node) => node.scrollWidth - node.clientWidth") == 0


def test_buttons_are_large_enough_for_fingers(open_page: OpenPage) -> None:
    page = open_page(viewport=PHONE, is_mobile=True, has_touch=True)
    ask(page, "Hello?")
    small = page.locator("button:visible").evaluate_all(
        """(buttons) => buttons.filter((button) => {
            const {width, height} = button.getBoundingClientRect();
            return width < 24 || height < 24; // WCAG 2.2, 2.5.8
        }).map((button) => button.getAttribute("aria-label") ?? button.textContent)"""
    )
    assert small == []


def test_the_policy_allows_no_style_or_script_in_the_page(page: Page, server: PageServer) -> None:
    send(page, "Hello?")
    finished(page)
    inline = page.locator("[style], style, script:not([src]), [onclick], [onload], [onerror]")
    expect(inline).to_have_count(0)


def test_every_control_has_a_name(page: Page) -> None:
    ask(page, "Hello?")
    nameless = page.locator("button, input, select, textarea, a").evaluate_all(
        """(controls) => controls.filter((control) => !(
            control.getAttribute("aria-label") || control.labels?.length
            || control.textContent.trim() || control.hidden
        )).map((control) => control.outerHTML)"""
    )
    assert nameless == ['<button id="confirm-yes" class="button danger" value="yes"></button>']
    headings = page.locator("h1, h2").evaluate_all("(all) => all.map((one) => one.localName)")
    assert headings.count("h1") == 1
