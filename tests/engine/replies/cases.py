# ruff: noqa: RUF001, UP031 (the marks of DeepSeek have a full-width bar; braces stay readable)
"""Replies in every tool format, whole, cut and malformed, and what is to be read from them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    name: str
    format: str
    text: str
    calls: list[tuple[str, str]] = field(default_factory=list)
    content: str | None = None
    reasoning: str | None = None


HARD = '{"s": "a } ] \\" \\\\", "o": {"x": [1, {"y": "{"}]}, "ł": "</tool_call> 😀 [TOOL_CALLS]"}'


def cases() -> Iterator[Case]:
    yield from _hermes()
    yield from _xml()
    yield from _mistral()
    yield from _bare()
    yield from _others()
    yield from _lists_in_marks()
    yield from _glm4()
    yield from _kimi()
    yield from _minimax()
    yield from _seed()
    yield from _python()
    yield from _apertus()
    yield from _hunyuan()
    yield from _internlm2()
    yield from _harmony()


def _hermes() -> Iterator[Case]:
    def hermes(name: str, text: str, *more: Any) -> Case:
        return Case(f"hermes {name}", "hermes", text, *more)

    one = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>' % HARD
    yield hermes("hard", one, [("f", HARD)])
    yield hermes("text before", f"I look.\n{one}", [("f", HARD)], "I look.")
    yield hermes("two", f'{one}\n<tool_call>{{"name":"g"}}</tool_call>', [("f", HARD), ("g", "{}")])
    yield hermes("text between", f"a {one}\nb {one} c", [("f", HARD)] * 2, "a \nb  c")
    yield hermes(
        "list in one tag",
        '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]</tool_call>',
        [("f", "{}"), ("g", "{}")],
    )
    yield hermes(
        "arguments first",
        '<tool_call>{"arguments": {"a": 1}, "name": "zzz"}</tool_call>',
        [("zzz", '{"a": 1}')],
    )
    yield hermes(
        "arguments in a string",
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        [("f", '{"a": 1}')],
    )
    yield hermes("no arguments", '<tool_call>{"name": "f", "arguments": null}', [("f", "{}")])
    yield hermes(
        "no last brace", '<tool_call>{"name": "f", "arguments": {}</tool_call>', [("f", "{}")]
    )
    yield hermes(
        "members behind",
        '<tool_call>{"name": "f", "arguments": {}, "id": [1, "]"]}</tool_call>x',
        [("f", "{}")],
        "x",
    )
    yield hermes(
        "cut in the arguments",
        '<tool_call>\n{"name": "f", "arguments": {"s": "ab',
        [("f", '{"s": "ab')],
    )
    for cut in ('{"name": "f", "argu', '{"name": "f"', "{", "", '{"name": "f", "arguments": "{'):
        text = f"<tool_call>\n{cut}".rstrip()
        yield hermes(f"cut before the arguments {cut!r}", text, [], text)
    for wrong in (
        "hello</tool_call>",
        '{"name": 1, "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": tru}',
        '{"name": "", "arguments": {}}',
        "{'name': 'f', 'arguments': {}}",
        '{"arguments": {}}',
        '"f"',
    ):
        yield hermes(f"malformed {wrong!r}", f"<tool_call>{wrong}", [], f"<tool_call>{wrong}")
    yield hermes("a beginning only", "a < b <tool", [], "a < b <tool")
    yield hermes(
        "a call behind what is none", f"<tool_call> no {one}", [("f", HARD)], "<tool_call> no"
    )
    yield hermes("white space", "  ", [], "  ")
    yield hermes("nothing", "", [], "")
    yield hermes(
        "reasoning",
        f"\n<think>\nI </thi {one}\n</think>\n\nYes.\n{one}",
        [("f", HARD)],
        "Yes.",
        f"I </thi {one}",
    )
    yield hermes("empty reasoning", "<think>\n\n</think>\n\nYes", [], "Yes", None)
    yield hermes("unfinished reasoning", "<think>a\n", [], "", "a")
    yield hermes("reasoning later is text", "a <think>b</think>", [], "a <think>b</think>")
    yield hermes("function tag", '<tool_call><function=f>{"a":1}</function>', [("f", '{"a":1}')])


def _xml() -> Iterator[Case]:
    qwen = (
        '<tool_call>\n<function=f>\n<parameter=s>\n  a\n"b" </p>\n</parameter>\n'
        '<parameter=n>\n 3\n</parameter>\n<parameter=o>\n{"x": "</f>"}\n</parameter>\n'
        "<parameter=t>\nnull\n</parameter>\n</function>\n</tool_call>"
    )
    arguments = '{"s": "  a\\n\\"b\\" </p>", "n": 3, "o": {"x": "</f>"}, "t": null}'
    yield Case("qwen", "qwen3_coder", f"Hm\n\n{qwen}\n", [("f", arguments)], "Hm")
    yield Case(
        "qwen two, no outer tag, no arguments",
        "qwen3_coder",
        "<function=g>\n</function><function=g></function>",
        [("g", "{}"), ("g", "{}")],
    )
    yield Case(
        "qwen values of other types",
        "qwen3_coder",
        "<function=f><parameter=n>\nmany\n</parameter><parameter=t>5</parameter>"
        "<parameter=ł>\n[1]\n</parameter></function>",
        [("f", '{"n": "many", "t": "5", "ł": "[1]"}')],
    )
    yield Case(
        "qwen cut in a string",
        "qwen3_coder",
        "<tool_call><function=f><parameter=s>\nab\n</param",
        [("f", '{"s": "ab\\n</param')],
    )
    yield Case(
        "qwen cut in a number",
        "qwen3_coder",
        "<tool_call><function=f><parameter=n>\n12",
        [("f", '{"n": 12')],
    )
    yield Case(
        "qwen cut in a key", "qwen3_coder", "<tool_call><function=f><parameter=a", [("f", "")]
    )
    yield Case("qwen malformed", "qwen3_coder", "<function=f> x", [], "<function=f> x")
    yield Case(
        "qwen JSON", "qwen3_coder", '<tool_call>{"name": "f", "arguments": {}}', [("f", "{}")]
    )
    glm = (
        "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>1\n</arg_value>\n<arg_key>n</arg_key>\n"
        "<arg_value>1</arg_value>\n</tool_call>"
    )
    yield Case(
        "glm",
        "glm",
        f"<think>so</think>\nok\n{glm}\n<tool_call>g\n</tool_call>",
        [("f", '{"s": "1\\n", "n": 1}'), ("g", "{}")],
        "ok",
        "so",
    )
    yield Case("glm malformed", "glm", "<tool_call>two words", [], "<tool_call>two words")
    yield Case("glm cut", "glm", "<tool_call>f\n<arg_key>s</arg_key>\n<arg_", [("f", '{"s": ')])


def _mistral() -> Iterator[Case]:
    listed = '[TOOL_CALLS] [{"name": "f", "arguments": %s, "id": "123456789"}, ' % HARD
    yield Case(
        "mistral",
        "mistral",
        listed + '{"name": "g", "arguments": {}}]',
        [("f", HARD), ("g", "{}")],
    )
    yield Case(
        "mistral cut between calls",
        "mistral",
        listed.rstrip(),
        [("f", HARD)],
        ",",
    )
    for name in ("mistral_args", "mistral_call_id"):
        text = f"See.[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{HARD}[TOOL_CALLS]g[ARGS]{{}}"
        yield Case(name, name, text, [("f", HARD), ("g", "{}")], "See.")
    yield Case("mistral name only", "mistral", "[TOOL_CALLS]f{}", [("f", "{}")])
    for wrong in ("[TOOL_CALLS] none", "[TOOL_CALLS][1]", "[TOOL_CALLS]f[ARGS]x", "[TOOL_CALLS]"):
        yield Case(f"mistral malformed {wrong}", "mistral", wrong, [], wrong)


def _bare() -> Iterator[Case]:
    call = '{"name": "f", "parameters": %s}' % HARD
    for name in ("llama3", "json"):
        yield Case(f"{name} call", name, call, [("f", HARD)])
        yield Case(f"{name} two", name, f"{call}; {call}", [("f", HARD)] * 2)
        yield Case(f"{name} list", name, f"[{call},\n{call}] ok", [("f", HARD)] * 2, "ok")
        yield Case(f"{name} text before", name, f"So: {call}", [("f", HARD)], "So:")
        fenced = f"Here:\n```json\n[{call}]\n```\nDone."
        yield Case(f"{name} fenced", name, fenced, [("f", HARD)], "Here:\n\nDone.")
        typed = '{"type": "function", "name": "g", "parameters": {}}'
        yield Case(f"{name} with a type", name, typed, [("g", "{}")])
        nested = '{"type": "function", "function": {"name": "g", "arguments": {"a": 1}}}'
        yield Case(f"{name} as in the API", name, nested, [("g", '{"a": 1}')])
        for answer in (
            '{"name": "Paris", "parameters": {}}',
            '{"name": "f", "age": 3}',
            '{"name": "f"}',
            '{"city": "Paris", "name": "f", "parameters": {}}',
            '[{"name": "x"}, [1, 2], {}]',
            "```json\n{}\n```",
            "if (a) { b; }",
            "{",
        ):
            yield Case(f"{name} answer {answer!r}", name, answer, [], answer)
        cut = '{"name": "g", "parameters": {"a": '
        yield Case(f"{name} cut", name, cut, [("g", '{"a": ')])
    yield Case("python tag", "llama3", f"<|python_tag|>{call}", [("f", HARD)])
    yield Case(
        "python tag, any name",
        "llama3",
        '<|python_tag|>{"name": "x", "parameters": {}}; {"name": "y"}',
        [("x", "{}"), ("y", "{}")],
    )
    built_in = '<|python_tag|>brave_search.call(query="x")'
    yield Case("a built-in tool is content", "llama3", built_in, [], built_in)


def _others() -> Iterator[Case]:
    yield Case(
        "deepseek",
        "deepseek",
        "Ok.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>%s<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>" % HARD,
        [("f", HARD), ("g", "{}")],
        "Ok.",
    )
    first = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
    second = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜>"
    yield Case(
        "deepseek r1",
        "deepseek_r1",
        f"<think>\nhm\n</think>{first}{HARD}\n```<｜tool▁call▁end｜>\n{second}<｜tool▁calls▁end｜>",
        [("f", HARD), ("g", "{}")],
        None,
        "hm",
    )
    wrong = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f {}"
    yield Case("deepseek malformed", "deepseek", wrong, [], wrong)
    yield Case(
        "deepseek, the second malformed",
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>x",
        [("g", "{}")],
        "<｜tool▁call▁begin｜>x",
    )
    yield Case(
        "phi4",
        "phi4",
        '<|tool_call|>[{"name": "f", "arguments": %s}]<|/tool_call|>' % HARD,
        [("f", HARD)],
    )
    yield Case("phi4 functools", "phi4", 'functools[{"name": "g"}]', [("g", "{}")])
    listed = '[\n    {\n        "tool_name": "f",\n        "parameters": %s\n    }\n]' % HARD
    yield Case(
        "cohere",
        "cohere",
        f"I will.\nAction:\n```json\n{listed}```\n",
        [("f", HARD)],
        "I will.",
    )
    yield Case("cohere malformed", "cohere", "Action: go on", [], "Action: go on")


def _lists_in_marks() -> Iterator[Case]:
    """Formats that are a list of JSON objects between two marks."""
    marks = {
        "granite": ("<|tool_call|>", "", "name", "arguments"),
        "nemotron": ("<TOOLCALL>", "</TOOLCALL>", "name", "arguments"),
        "minitron": ("<toolcall> ", " </toolcall>", "name", "arguments"),
        "command_a": ("<|START_ACTION|>", "<|END_ACTION|>", "tool_name", "parameters"),
        "lfm2": ("<|tool_call_start|>", "<|tool_call_end|>", "name", "arguments"),
    }
    for name, (begin, end, key, arguments) in marks.items():
        one = f'{{"{key}": "f", "{arguments}": {HARD}, "id": "0"}}'
        two = f'{begin}[\n  {one},\n  {{"{key}": "g", "{arguments}": {{}}}}\n]{end}'
        yield Case(f"{name} two", name, f"Ok.\n{two}", [("f", HARD), ("g", "{}")], "Ok.")
        yield Case(f"{name} alone", name, f"{begin}{one}{end}", [("f", HARD)])
        yield Case(f"{name} malformed", name, f"{begin}[f", [], f"{begin}[f")
        cut = f'{begin}[{{"{key}": "f", "{arguments}": {{"s": '
        yield Case(f"{name} cut", name, cut, [("f", '{"s": ')])
    yield Case(
        "granite 3.0", "granite", '<tool_call>[{"name": "g", "arguments": {}}]', [("g", "{}")]
    )


def _glm4() -> Iterator[Case]:
    yield Case(
        "glm4",
        "glm4",
        f"<think>so</think>\nI look.\nf\n{HARD}\ng\n {{}}",
        [("f", HARD), ("g", "{}")],
        "I look.",
        "so",
    )
    for text in ("f\nx", "an f\n{}", "f {}", "h\n{}", "f\n"):
        yield Case(f"glm4 malformed {text!r}", "glm4", text, [], text)
    yield Case("glm4 cut", "glm4", 'f\n{"s": "', [("f", '{"s": "')])


def _kimi() -> Iterator[Case]:
    def call(call_id: str, arguments: str) -> str:
        return (
            f"<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        )

    begin, end = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    two = f"{begin}{call('functions.f:0', HARD)}{call('functions.g:1', '{}')}{end}"
    yield Case("kimi", "kimi", f"Ok. {two}", [("f", HARD), ("g", "{}")], "Ok.")
    yield Case("kimi name only", "kimi", begin + call("g", "{}"), [("g", "{}")])
    wrong = f"{begin}<|tool_call_begin|>f f"
    yield Case("kimi malformed", "kimi", wrong, [], wrong)
    cut = f"{begin}<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{{"
    yield Case("kimi cut", "kimi", cut, [("f", "{")])


def _minimax() -> Iterator[Case]:
    two = (
        '<minimax:tool_call>\n<invoke name="f">\n<parameter name="s">a "b" </p>\n</parameter>\n'
        '<parameter name="n">3</parameter>\n<parameter name="o">{"x": 1}</parameter>\n</invoke>\n'
        '<invoke name="g">\n</invoke>\n</minimax:tool_call>'
    )
    arguments = '{"s": "a \\"b\\" </p>\\n", "n": 3, "o": {"x": 1}}'
    yield Case(
        "minimax",
        "minimax",
        f"<think>\nhm\n</think>\n\nOk.\n{two}",
        [("f", arguments), ("g", "{}")],
        "Ok.",
        "hm",
    )
    wrong = '<minimax:tool_call>\n<invoke name="f" x'
    yield Case("minimax malformed", "minimax", wrong, [], wrong)
    cut = '<minimax:tool_call><invoke name="f"><parameter name="s">a'
    yield Case("minimax cut", "minimax", cut, [("f", '{"s": "a')])


def _seed() -> Iterator[Case]:
    two = (
        "<seed:tool_call>\n<function=f>\n<parameter=s>\na</parameter>\n<parameter=n>3</parameter>\n"
        "</function>\n</seed:tool_call>\n<seed:tool_call><function=g></function></seed:tool_call>"
    )
    yield Case("seed", "seed", f"Ok.\n{two}", [("f", '{"s": "\\na", "n": 3}'), ("g", "{}")], "Ok.")
    wrong = "<seed:tool_call>\n<function=f x"
    yield Case("seed malformed", "seed", wrong, [], wrong)
    cut = "<seed:tool_call><function=f><parameter=s>a"
    yield Case("seed cut", "seed", cut, [("f", '{"s": "a')])


def _python() -> Iterator[Case]:
    def lfm2(name: str, text: str, *more: Any) -> Case:
        return Case(f"lfm2 {name}", "lfm2", text, *more)

    begin, end = "<|tool_call_start|>", "<|tool_call_end|>"
    values = "s='it\\'s ü', n=-3, o={'x': [1, \"]\"]}, t=None"
    expected = '{"s": "it\'s ü", "n": -3, "o": {"x": [1, "]"]}, "t": null}'
    yield lfm2(
        "python", f"Ok.{begin}[f({values}), g()]{end}", [("f", expected), ("g", "{}")], "Ok."
    )
    yield lfm2("text behind", f"{begin}[g()]{end} So.", [("g", "{}")], "So.")
    yield lfm2("without brackets", f"{begin}g( ){end}", [("g", "{}")])
    yield lfm2(
        "quotes within",
        f"{begin}[f(s='it's (a) \\'b\\', c', t=true)]{end}",
        [("f", '{"s": "it\'s (a) \\\\\'b\\\\\', c", "t": true}')],
    )
    yield lfm2("no literal", f"{begin}[f(s=Paris, n=1)]", [("f", '{"s": "Paris", "n": 1}')])
    yield lfm2("cut in a string", f"{begin}[f(s='a \"b", [("f", '{"s": "a \\"b')])
    yield lfm2("cut in a list", f"{begin}[f(o=[1, '", [("f", '{"o": [1, \'')])
    yield lfm2("no key", f"{begin}[f(1)]", [], f"{begin}[f(1)]")
    yield lfm2("a second that is none", f"{begin}[g(), f f]", [("g", "{}")], ", f f]")

    yield lfm2(
        "halves of characters",
        f'{begin}[f(s="\\ud83d\\ude00 a\\/b", t="\\ud83d")]',
        [("f", '{"s": "😀 a/b", "t": "\\ud83d"}')],
    )
    olmo = f"<function_calls>f({values})\ng()\ng( )</function_calls>"
    yield Case("olmo3", "olmo3", f"Ok.{olmo}", [("f", expected), ("g", "{}"), ("g", "{}")], "Ok.")
    wrong = "<function_calls>no call</function_calls>"
    yield Case("olmo3 malformed", "olmo3", wrong, [], wrong)


def _apertus() -> Iterator[Case]:
    def apertus(name: str, text: str, *more: Any) -> Case:
        return Case(f"apertus {name}", "apertus", text, *more)

    begin, end = "<|tools_prefix|>", "<|tools_suffix|>"
    two = f'{begin}[{{"f": {HARD}}},\n {{"g": {{}} }}]{end}'
    yield apertus("two", f"Ok. {two} So.", [("f", HARD), ("g", "{}")], "Ok.  So.")
    yield apertus("in the reasoning", f"<think>hm {two}", [("f", HARD), ("g", "{}")], None, "hm")
    yield apertus("cut", f'{begin}[{{"f": {{"s": "a', [("f", '{"s": "a')])
    for text in (f"{begin}{{}}{end}", f'{begin}[{{"f": 1}}]', f'{begin}[{{"": {{}}}}]'):
        yield apertus(f"malformed {text}", text, [], text)
    yield apertus("a second that is none", f'{begin}[{{"g": {{}}}}, 1]', [("g", "{}")], ", 1]")


def _hunyuan() -> Iterator[Case]:
    fenced = "<tool_call>f\n```json\n%s\n```</tool_call>\n<tool_call>g\n```json\n{}\n```" % HARD
    listed = '[{"name": "f", "arguments": %s}, {"name": "g", "arguments": {}}]' % HARD
    lines = listed[1:-1].replace("}, {", "}\n{")
    for name in ("hunyuan", "tool_calls"):
        for kind, body in (("fenced", fenced), ("listed", listed), ("in lines", lines)):
            text = f"Ok.\n<tool_calls>\n{body}\n</tool_calls>"
            yield Case(f"{name} {kind}", name, text, [("f", HARD), ("g", "{}")], "Ok.")
        for wrong in ("<tool_calls>\n<tool_call>f x", "<tool_calls>none</tool_calls>"):
            yield Case(f"{name} malformed {wrong}", name, wrong, [], wrong)


def _internlm2() -> Iterator[Case]:
    call = '<|action_start|><|plugin|>\n{"name": "f", "parameters": %s}<|action_end|>' % HARD
    yield Case("internlm2", "internlm2", f"I look.{call}\n", [("f", HARD)], "I look.")
    code = "<|action_start|><|interpreter|>\n```python\n```<|action_end|>"
    yield Case("internlm2 code", "internlm2", code, [], code)


def _harmony() -> Iterator[Case]:
    analysis = "<|channel|>analysis<|message|>hm\n<|end|><|start|>assistant"
    call = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    yield Case("harmony", "harmony", f"{analysis}{call}{HARD}<|call|>", [("f", HARD)], None, "hm")
    yield Case(
        "harmony recipient first",
        "harmony",
        " to=functions.f<|channel|>commentary json<|message|>{}",
        [("f", "{}")],
    )
    yield Case(
        "harmony answer",
        "harmony",
        f"{analysis}<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant"
        "<|channel|>final<|message|>Here < you are",
        [],
        "Wait.\nHere < you are",
        "hm",
    )
    yield Case(
        "harmony two analyses",
        "harmony",
        f"{analysis}{analysis}<|channel|>final<|message|>x",
        [],
        "x",
        "hm\n\nhm",
    )
    yield Case("harmony cut in a header", "harmony", f"{analysis}<|chan", [], "", "hm")
    yield Case("harmony without header", "harmony", "plain<|end|>x", [], "plain\nx")
    yield Case("harmony cut call", "harmony", f"{call}{{", [("f", "{")])
