import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relaxlm.errors import TemplateError
from relaxlm.runtime import template as module
from relaxlm.runtime.template import (
    ChatTemplate,
    load_chat_templates,
    named_templates,
    select_template,
)
from tests.runtime.tokenizer_samples import shared_file
from tests.shared_data import SHARED, needs_shared_data

HELLO = [{"role": "user", "content": "Hello"}]
# The clock of the reference renderings; other patterns gave the first.
DATES = {"%d %b %Y": "26 Jul 2024", "%Y-%m-%d": "2024-07-26", "%B %d, %Y": "July 26, 2024"}


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_strftime_now", lambda pattern: DATES.get(pattern, "26 Jul 2024"))


def reference() -> dict[str, Any]:
    path = SHARED / "tokenizers" / "chat_template_expected.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {"templates": {}}


def cases() -> Iterator[tuple[str, str]]:
    for name, entry in reference()["templates"].items():
        for conversation in entry["rendered"]:
            yield name, conversation


def source(name: str) -> str:
    content = shared_file(name).decode("utf-8")
    if name.endswith(".jinja"):
        return content
    return named_templates(json.loads(content)["chat_template"], name)["default"]


@needs_shared_data
@pytest.mark.usefixtures("stopped_clock")
def test_real_templates_render_as_in_transformers() -> None:
    expected = reference()
    rendered = refused = 0
    for name, conversation in cases():
        entry, chat = expected["templates"][name], expected["conversations"][conversation]
        wanted = entry["rendered"][conversation]
        render = dict(
            messages=chat["messages"],
            add_generation_prompt=chat["add_generation_prompt"],
            tools=chat.get("tools"),
            special_tokens={key: entry[key] for key in ("bos_token", "eos_token")},
        )
        if isinstance(wanted, str):
            # Mistral's templates have a `safe` that makes transformers escape quotes for HTML. What
            # Mistral's own tokenizer writes is in test_prompt.py.
            wanted = wanted.replace("&#34;", '"')
            assert ChatTemplate(source(name), name).render(**render) == wanted, (name, conversation)
            rendered += 1
            continue
        kind, _, text = wanted["error"].partition(": ")
        with pytest.raises(TemplateError) as caught:
            ChatTemplate(source(name), name).render(**render)
        words = "refuses" if kind == "TemplateError" else f"fails on this conversation: {kind}"
        assert words in str(caught.value)
        assert str(caught.value).endswith(text)
        refused += 1
    assert (rendered, refused) == (171, 14)


def test_white_space_is_trimmed_around_blocks() -> None:
    text = (
        "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n"
    )
    assert ChatTemplate(text).render(HELLO) == "Hello\n"


def test_loop_controls_and_generation_blocks() -> None:
    text = (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
        "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{% generation %}-{{ messages[0]['content'] }}-{% endgeneration %}"
    )
    assert ChatTemplate(text).render(HELLO) == "023-Hello-"


def test_tojson_does_not_escape_html() -> None:
    chat = [{"role": "user", "content": "<é> & 'x'", "n": [1, None, True]}]
    assert ChatTemplate("{{ messages[0] | tojson }}").render(chat) == (
        '{"role": "user", "content": "<é> & \'x\'", "n": [1, null, true]}'
    )
    text = "{{ {'b': 1, 'a': 'é'} | tojson(indent=2, sort_keys=true, ensure_ascii=true) }}"
    assert ChatTemplate(text).render(HELLO) == '{\n  "a": "\\u00e9",\n  "b": 1\n}'


def test_safe_text_does_not_make_other_text_html() -> None:
    template = ChatTemplate("""{{ '"' + (messages | tojson | safe) }}""")
    assert template.render([]) == '"[]'


def test_what_a_template_sees() -> None:
    text = (
        "{{ bos_token }}{{ eos_token }}{{ thinking }}{{ add_generation_prompt }}"
        "{{ tools is none }}{{ documents is none }}"
    )
    rendered = ChatTemplate(text).render(
        HELLO,
        special_tokens={"bos_token": "<s>"},
        variables={"thinking": False},
        add_generation_prompt=False,
    )
    assert rendered == "<s>FalseFalseTrueTrue"


def test_reasoning_has_one_name() -> None:
    text = "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        chat = [{"role": "assistant", "content": "4", name: "2+2"}]
        assert ChatTemplate(text).render(chat) == "2+2|2+2"
    assert ChatTemplate(text).render(HELLO) == "|"


def test_dates() -> None:
    assert len(ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render(HELLO)) == 10


def test_the_caller_s_messages_are_not_changed() -> None:
    chat = [{"role": "user", "content": "a", "tags": ["x"]}]
    ChatTemplate("{{ messages[0].content }}").render(chat)
    assert chat == [{"role": "user", "content": "a", "tags": ["x"]}]


UNSAFE = "is not allowed: access to attribute "
REFUSED = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": UNSAFE,
    "{{ messages[0].__class__.__init__.__globals__ }}": UNSAFE,
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}": UNSAFE,
    "{{ self.__init__.__globals__ }}": UNSAFE,
    "{{ lipsum.__globals__['os'] }}": UNSAFE,
    "{{ joiner.__init__.__globals__ }}": UNSAFE,
    "{% set _ = messages.append(1) %}": UNSAFE,
    "{% set _ = messages[0].update({'role': 'x'}) %}": UNSAFE,
    "{{ namespace(__class__=1).x }}": "is not allowed: a namespace with the attribute '__class__'",
    "{% set ns = namespace() %}{% set ns._x = 1 %}": "is not allowed: a namespace with",
    "{% include '/etc/passwd' %}": "TypeError: no loader for this environment",
    "{% import '/etc/passwd' as x %}": "TypeError: no loader for this environment",
    "{% extends '/etc/passwd' %}": "TypeError: no loader for this environment",
    "{{ open('/etc/passwd') }}": "UndefinedError: 'open' is undefined",
    "{{ environment.loader }}": "UndefinedError: 'environment' is undefined",
    "{{ range(10 ** 9) | list }}": "OverflowError: Range too big.",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError: maximum recursion",
}
HIDDEN = [
    "{{ messages.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ dict.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ messages | map(attribute='__class__') | join }}",
]


@pytest.mark.parametrize("text", REFUSED)
def test_what_leaves_the_sandbox_is_refused(text: str) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(text).render(HELLO)
    assert REFUSED[text] in str(caught.value)


@pytest.mark.parametrize("text", HIDDEN)
def test_attributes_of_python_are_not_there(text: str) -> None:
    assert ChatTemplate(text).render(HELLO) == ""


def test_only_plain_data_reaches_a_template() -> None:
    class Text(str):
        def run(self) -> str:
            return "reached"

    chat = [{"role": "user", "content": Text("abc")}]
    with pytest.raises(TemplateError):
        ChatTemplate("{{ messages[0].content.run() }}").render(chat)
    assert ChatTemplate("{{ messages[0].content }}").render(chat) == "abc"
    with pytest.raises(TemplateError) as caught:
        ChatTemplate("").render([{"role": "user", "content": [{"image": object()}]}])
    assert str(caught.value) == (
        "messages[0].content[0].image is of type object: chat templates take text, numbers, lists "
        "and dictionaries"
    )
    with pytest.raises(TemplateError) as caught:
        ChatTemplate("").render(["hello"])  # type: ignore[list-item]
    assert str(caught.value) == (
        "a message is of type str: expected an object with role and content"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a\n{{ b",
            "t: line 2: not valid Jinja: unexpected end of template, expected 'end of print ",
        ),
        ("{% nope %}", "t: line 1: not valid Jinja: Encountered unknown tag 'nope'."),
        ("{{ raise_exception('no tools') }}", "t: line 1: refuses this conversation: no tools"),
        (
            "\n{{ messages + 1 }}",
            "t: line 2: fails on this conversation: TypeError: can only concatenate list ",
        ),
        (
            "{{ nothing.there }}",
            "t: line 1: fails on this conversation: UndefinedError: 'nothing' is undefined",
        ),
        (
            "{{ ''.__class__() }}",
            "t: line 1: is not allowed: access to attribute '__class__' of 'str' object is unsafe.",
        ),
    ],
)
def test_errors_name_the_line_and_the_reason(text: str, expected: str) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(text, "t").render(HELLO)
    assert str(caught.value).startswith(expected)


def test_values_that_are_nested_too_deeply_are_refused() -> None:
    deep: object = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(TemplateError, match="the conversation or a tool is nested too deeply"):
        ChatTemplate("").render([{"role": "user", "content": deep}])


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert load_chat_templates(tmp_path) == {}
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": null}')
    assert load_chat_templates(tmp_path) == {}
    config.write_text('{"chat_template": "A"}')
    assert load_chat_templates(tmp_path) == {"default": "A"}
    several = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    config.write_text(json.dumps({"chat_template": several}))
    assert load_chat_templates(tmp_path) == {"default": "A", "tool_use": "B"}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "C"}')
    assert load_chat_templates(tmp_path) == {"default": "C"}
    (tmp_path / "chat_template.jinja").write_text("D")
    assert load_chat_templates(tmp_path) == {"default": "D"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("E")
    assert load_chat_templates(tmp_path) == {"default": "D", "rag": "E"}


def test_a_chat_template_key_of_another_shape(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"chat_template": [{"name": "default"}]}')
    with pytest.raises(TemplateError) as caught:
        load_chat_templates(tmp_path)
    assert str(caught.value) == (
        f"{path}: chat_template is of type dict: expected a string, or a list of objects with "
        '"name" and "template"'
    )


def test_which_of_several_templates_is_used() -> None:
    tools = [{"type": "function"}]
    assert select_template(["default", "tool_use"]) == "default"
    assert select_template(["default", "tool_use"], tools) == "tool_use"
    assert select_template(["default", "rag"], tools) == "default"
    assert select_template(["rag"]) == "rag"
    with pytest.raises(TemplateError) as caught:
        select_template(["rag", "b"])
    assert str(caught.value) == "no chat template is named default; there are: b, rag"
