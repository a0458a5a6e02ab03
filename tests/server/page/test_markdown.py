"""Replies as text of the page: Markdown becomes elements, everything else stays text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("playwright")

from playwright.sync_api import expect

from tests.server.page.actions import ask, last_reply, live_answer, send
from tests.server.page.scripted import Answer, text

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.server.page.conftest import OpenPage
    from tests.server.page.scripted import PageServer

RENDER = """async (texts) => {
    const {MarkdownView} = await import("/page/markdown_view.js");
    return texts.map((text) => {
        const view = new MarkdownView();
        view.update(text);
        return view.node.innerHTML;
    });
}"""

EXAMPLES = {
    "plain": "<p>plain</p>",
    "a *b* **c** ***d***": "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em></p>",
    "_a_ __b__ ~~c~~": "<p><em>a</em> <strong>b</strong> <del>c</del></p>",
    "snake_case_name 2*3*4 5 * 6": "<p>snake_case_name 2<em>3</em>4 5 * 6</p>",
    "**open": "<p>**open</p>",
    "*a **b*": "<p>*a *<em>b</em></p>",
    "`*a*` ``b`c``": "<p><code>*a*</code> <code>b`c</code></p>",
    "`open": "<p>`open</p>",
    "\\*a\\* \\`": "<p>*a* `</p>",
    "a\nb\n\nc": "<p>a<br>b</p><p>c</p>",
    "a < b & c > d &amp;": "<p>a &lt; b &amp; c &gt; d &amp;amp;</p>",
    "# A\n### B ##\n#no": ('<h3 class="heading-1">A</h3><h5 class="heading-3">B</h5><p>#no</p>'),
    "A\n===\nB\n---": '<h3 class="heading-1">A</h3><h4 class="heading-2">B</h4>',
    "---": "<hr>",
    "> a\nb\n\nc": "<blockquote><p>a<br>b</p></blockquote><p>c</p>",
    "- a\n- b\n  - c": (
        '<ul class="tight"><li>a</li><li>b<ul class="tight"><li>c</li></ul></li></ul>'
    ),
    "- a\n\n- b": '<ul class="loose"><li><p>a</p></li><li><p>b</p></li></ul>',
    "3. a\n4. b\n  - c": (
        '<ol class="tight" start="3"><li>a</li><li>b<ul class="tight"><li>c</li></ul></li></ol>'
    ),
    "- [x] a\n- [ ] b": (
        '<ul class="tight tasks"><li class="task"><input type="checkbox" disabled="" checked="" '
        'aria-label="done">a</li><li class="task"><input type="checkbox" disabled="" '
        'aria-label="to do">b</li></ul>'
    ),
    "text\n- a": '<p>text</p><ul class="tight"><li>a</li></ul>',
    "text\n1986. A year": "<p>text<br>1986. A year</p>",
    "$a_1*b*c_2$ and $5 or $6": ('<p><span class="math">$a_1*b*c_2$</span> and $5 or $6</p>'),
    "\\(a_1*b*c_2\\)": '<p><span class="math">\\(a_1*b*c_2\\)</span></p>',
    "$$\na_1 *b*\n$$\nc": '<div class="math-block">$$\na_1 *b*\n$$</div><p>c</p>',
    "<b>bold</b>": "<p>&lt;b&gt;bold&lt;/b&gt;</p>",
    "[*a*](https://b.example/c_d_e)": (
        '<p><a href="https://b.example/c_d_e" target="_blank" rel="noopener noreferrer">'
        "<em>a</em></a></p>"
    ),
    "(see https://b.example/a_(b)).": (
        '<p>(see <a href="https://b.example/a_(b)" target="_blank" rel="noopener noreferrer">'
        "https://b.example/a_(b)</a>).</p>"
    ),
    "<a@b.example>": (
        '<p><a href="mailto:a@b.example" target="_blank" rel="noopener noreferrer">'
        "a@b.example</a></p>"
    ),
    "![cat](https://b.example/c.png)": (
        '<p><a href="https://b.example/c.png" target="_blank" rel="noopener noreferrer">cat</a></p>'
    ),
    "[a] [b](relative) [c](javascript:d)": "<p>[a] [b](relative) [c](javascript:d)</p>",
    "|a|b|\n|:-|-:|\n|`c`|d\\|e|\n|f|": (
        '<div class="table-scroll" tabindex="0" role="region" aria-label="Table"><table><thead>'
        '<tr><th class="align-left" scope="col">a</th><th class="align-right" scope="col">b</th>'
        '</tr></thead><tbody><tr><td class="align-left"><code>c</code></td>'
        '<td class="align-right">d|e</td></tr><tr><td class="align-left">f</td>'
        '<td class="align-right"></td></tr></tbody></table></div>'
    ),
    "a | b\nno table": "<p>a | b<br>no table</p>",
}


def test_markdown_becomes_elements(page: Page) -> None:
    rendered = page.evaluate(RENDER, list(EXAMPLES))
    assert dict(zip(EXAMPLES, rendered, strict=True)) == EXAMPLES


CODE = """Before:

```python
def f(x: int) -> str:  # comment
    return "a # b" + str(x)

<b>&amp;</b>
```
After."""


def test_code_keeps_its_text_and_gets_colours(page: Page, server: PageServer) -> None:
    server.answers.append(Answer(text(CODE)))
    ask(page, "Code, please")
    block = last_reply(page).locator(".code-block")
    expect(block.locator("figcaption")).to_contain_text("python")
    assert block.locator("code").evaluate("(node) => node.textContent") == (
        'def f(x: int) -> str:  # comment\n    return "a # b" + str(x)\n\n<b>&amp;</b>'
    )
    expect(block.locator(".code-keyword")).to_have_text(["def", "return"])
    expect(block.locator(".code-comment")).to_have_text("# comment")
    expect(block.locator(".code-string")).to_have_text('"a # b"')
    expect(last_reply(page).locator("p", has_text="After.")).to_be_visible()


def test_colours_never_change_the_code(page: Page) -> None:
    """Random lines in each language: the parts of a line put together are the line."""
    source = random.Random(1)
    pieces = ["x", "if", " ", "\t", '"', "'", "`", "#", "//", "/*", "*/", "\\", "<", "-->", "<!--"]
    pieces += ['"""', "1.5e3", "--", "é", "(", "0x1F", "select", "="]
    lines = ["".join(source.choices(pieces, k=source.randrange(12))) for _ in range(400)]
    changed = page.evaluate(
        """async (lines) => {
            const {colorLine} = await import("/page/code_colors.js");
            const changed = [];
            for (const language of "python js bash sql yaml css html lua x".split(" ")) {
                let state = "";
                for (const line of lines) {
                    const result = colorLine(line, language, state);
                    state = result.state;
                    if (result.parts.map(([, text]) => text).join("") !== line) changed.push(line);
                }
            }
            return changed;
        }""",
        lines,
    )
    assert changed == []


FRAGMENTS = (
    *("word ", "*", "**", "_", "`", "```", "```py\n", "~~~\n", "\n", "\n", "\n\n", "# ", "> "),
    *("- ", "1. ", "2. ", "    ", "  ", "|", "|-|-|\n", "|a|b|\n", "---\n", "===\n", "[a](", ")"),
    *("https://a.example ", "$", "$$", "\\[", "\\", "<b>", "- [ ] ", "![", "]"),
)
GROW = """async (cases) => {
    const {MarkdownView} = await import("/page/markdown_view.js");
    return cases.filter(([text, cuts]) => {
        const grown = new MarkdownView();
        for (const cut of [...cuts, text.length]) grown.update(text.slice(0, cut));
        const whole = new MarkdownView();
        whole.update(text);
        return grown.node.textContent !== whole.node.textContent
            || grown.node.innerHTML !== whole.node.innerHTML;
    });
}"""


def documents(seed: int, count: int) -> Iterator[str]:
    source = random.Random(seed)
    for _ in range(count):
        yield "".join(source.choices(FRAGMENTS, k=source.randrange(40)))


def test_a_growing_text_looks_like_the_whole_text(page: Page) -> None:
    source = random.Random(3)
    cases = []
    for document in [*documents(2, 600), *EXAMPLES, CODE]:
        count = min(len(document), source.randrange(30))
        cases.append([document, sorted(source.sample(range(len(document)), count))])
    assert page.evaluate(GROW, cases) == []


def test_what_is_finished_is_not_made_again(page: Page, server: PageServer) -> None:
    live = live_answer(server)
    send(page, "Long one")
    live.put({"content": "First paragraph.\n\n```py\na = 1\nb = 2\n"})
    code = last_reply(page).locator("code")
    expect(code).to_contain_text("b = 2")
    mark = "(node) => { node.marked = true; }"
    last_reply(page).locator("p").first.evaluate(mark)
    code.evaluate(mark)
    code.locator("span").first.evaluate(mark)
    live.put({"content": "c = 3\n```\n\nLast paragraph."})
    expect(last_reply(page)).to_contain_text("Last paragraph.")
    live.put(None)
    for part in (last_reply(page).locator("p").first, code, code.locator("span").first):
        assert part.evaluate("(node) => node.marked"), "was made again"


HOSTILE = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg onload='window.hacked = 1'>",
    "<iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>",
    "<style>body { display: none }</style>",
    "<meta http-equiv='refresh' content='0;url=https://evil.example'>",
    "[click](javascript:window.hacked=1)",
    "[click](JaVaScRiPt:window.hacked=1)",
    "[click](java\tscript:window.hacked=1)",
    "[click](data:text/html,<script>alert(1)</script>)",
    "[click](vbscript:x) [click](//evil.example) [click](file:///etc/passwd)",
    "<javascript:window.hacked=1>",
    "![x](https://evil.example/steal.png)",
    '[x](https://evil.example/"onmouseover="window.hacked=1)',
    "```<img src=x onerror=window.hacked=1>\n<script>window.hacked=1</script>\n```",
    '```py" onmouseover="window.hacked=1\nx\n```',
    "|<img src=x onerror=window.hacked=1>|\n|-|\n|<script>window.hacked=1</script>|",
    "https://evil.example/<script>window.hacked=1</script>",
)


def test_hostile_text_does_nothing(page: Page, server: PageServer) -> None:
    """That nothing leaves for evil.example is checked for every page (conftest.py)."""
    deltas = [{"reasoning_content": f"{one}\n\n"} for one in HOSTILE]
    server.answers.append(Answer([*deltas, *text(*(f"{one}\n\n" for one in HOSTILE))]))
    before = page.locator("script, img, svg").count()
    ask(page, HOSTILE[1])
    page.locator(".reasoning summary").click()
    assert page.evaluate("window.hacked") is None
    found = page.locator(".thread").evaluate(
        """(thread) => ({
            tags: [...new Set([...thread.querySelectorAll("*")].map((node) => node.localName))],
            attributes: [...new Set([...thread.querySelectorAll("*")].flatMap((node) =>
                node.getAttributeNames()))],
            links: [...new Set([...thread.querySelectorAll("a")].map((link) => link.href))],
            rels: [...new Set([...thread.querySelectorAll("a")].map((link) => link.rel))],
        })"""
    )
    assert not {"script", "img", "iframe", "style", "meta", "object"} & set(found["tags"])
    assert not [name for name in found["attributes"] if name.startswith("on") or name == "style"]
    assert found["links"], "no link at all was shown"
    assert all(link.startswith("https://evil.example/") for link in found["links"])
    assert found["rels"] == ["noopener noreferrer"]
    assert page.locator("script, img").count() <= before
    expect(page.locator(".bubble")).to_have_text(HOSTILE[1])
    expect(page.locator(".conversation-open")).to_have_text(HOSTILE[1])


DEEP = 20_000


# What takes more than linear time, or nests without limit, would not come back from these.
HARD = (
    "*a " * DEEP,
    "*" * DEEP + "a" + "*" * DEEP,
    "**a* " * DEEP,
    "[" * DEEP + "]" * DEEP,
    "[a](" * DEEP,
    "![" * DEEP + "](https://a.example)" * 100,
    "`" + "``a" * DEEP,
    "$a" * DEEP,
    "> " * DEEP + "a",
    "- " * DEEP + "a",
    "1. a\n  " * DEEP,
    "|" * DEEP + "\n" + "|-" * DEEP,
    "a|b\n" * DEEP,
    "# " + "#" * DEEP + " a" + " " * DEEP + "b",
    "http://" * DEEP,
    "<http://" * DEEP,
    "\\[" * DEEP,
    " " * DEEP + "-" + " " * DEEP + "x",
)


def test_hostile_text_does_not_hang_the_page(page: Page) -> None:
    for hostile in HARD:
        (html,) = page.evaluate(RENDER, [hostile])
        assert html, hostile[:20]


def test_events_may_be_cut_anywhere(page: Page) -> None:
    stream = ': ping\r\n\r\ndata: {"a"}\r\n\r\nevent: x\ndata:b\r\ndata:  c\n\n'
    stream += "data: é\r\rdata: [DONE]\n\n"
    expected = ['{"a"}', "b\n c", "é", "[DONE]"]
    results = page.evaluate(
        """async (stream) => {
            const {EventParser} = await import("/page/api.js");
            const cuts = [...Array(stream.length).keys()];
            return cuts.map((cut) => {
                const parser = new EventParser();
                return [...parser.push(stream.slice(0, cut)), ...parser.push(stream.slice(cut))];
            });
        }""",
        stream,
    )
    assert all(result == expected for result in results)


def test_a_page_without_a_clipboard_can_copy(open_page: OpenPage) -> None:
    page = open_page()
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    ask(page, "Hello?")
    page.evaluate(
        "document.addEventListener('copy', () => { window.copied = getSelection().toString(); })"
    )
    page.get_by_role("button", name="Copy reply").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
