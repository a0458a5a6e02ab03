"""Renders a model's own chat template, a Jinja program, to the text that transformers gives.

A template comes with downloaded weights and is not trusted: it runs in Jinja's immutable
sandbox, without a loader (so it can read no file), and sees only text, numbers, lists and
dictionaries. The sandbox does not bound time and memory; a template can still loop for long.
"""

import json
import traceback
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from relaxlm.errors import TemplateError
from relaxlm.files import read_json_object, read_text

# Names under which clients pass a message's chain of thought; templates read the first or the
# second.
REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """One compiled template.

    `where` names it in errors: a file, or "chat template of ...".
    """

    def __init__(self, source: str, where: str = "chat template") -> None:
        """
        Raises:
            TemplateError: not valid Jinja; names the line.
        """
        self.source = source
        self.where = where
        try:
            self._template = _compile(source)
        except jinja2.TemplateSyntaxError as reason:
            raise TemplateError(
                f"{where}: line {reason.lineno}: not valid Jinja: {reason.message}"
            ) from reason
        except RecursionError as reason:
            raise TemplateError(f"{where}: nested too deeply to be compiled") from reason

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        special_tokens: Mapping[str, str] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation, special tokens spelled out.

        Args:
            messages: dictionaries with "role" and mostly "content", as in the OpenAI API.
            add_generation_prompt: end with the header of the assistant's turn.
            tools: JSON schemas of functions.
            special_tokens: role ("bos_token") -> token.
            variables: further names that the template reads ("enable_thinking").

        Raises:
            TemplateError: the template refuses the conversation, fails on it, or leaves the
                sandbox; or a value is not plain data.
        """
        context = {
            **(special_tokens or {}),
            **(variables or {}),
            "messages": [_with_reasoning(message) for message in messages],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            data = {name: _plain(value, name) for name, value in context.items()}
        except RecursionError:
            raise TemplateError("the conversation or a tool is nested too deeply") from None
        try:
            return self._template.render(data)
        except Exception as reason:  # a template can fail in any way that Python can
            raise TemplateError(self._explained(reason)) from reason

    def _explained(self, reason: Exception) -> str:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(reason.__traceback__)
            if frame.filename == "<template>"
        ]
        at = f"{self.where}: line {lines[-1]}: " if lines else f"{self.where}: "
        if isinstance(reason, _Refusal):
            return f"{at}refuses this conversation: {reason.message}"
        if isinstance(reason, jinja2.sandbox.SecurityError):
            return f"{at}is not allowed: {reason.message}"
        return f"{at}fails on this conversation: {type(reason).__name__}: {reason}"


class _Refusal(jinja2.TemplateError):
    """What `raise_exception` in a template raises."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant wrote; it renders as
    its content.
    """

    tags = {"generation"}  # noqa: RUF012 (the type is Jinja's)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict` in templates: makes dictionaries, and is no way to the type and what hangs on it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` in templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a keyword of the template's
        self = args[0]
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a namespace with the attribute {name!r}")


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    # Nothing is escaped here, so everything is safe. Jinja's own filter makes text that escapes for
    # HTML whatever it is added to: Mistral's templates would write &#34; for quotes.
    environment.filters["safe"] = str
    environment.globals["raise_exception"] = _raise_exception
    # Looked up at each call, so that tests can stop the clock.
    environment.globals["strftime_now"] = lambda pattern: _strftime_now(pattern)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(source)


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TemplateError(
            f"a message is of type {type(message).__name__}: expected an object with role and "
            f"content"
        )
    found = [message[name] for name in REASONING if message.get(name) is not None]
    if not found:
        return dict(message)
    return {"thinking": found[0], **message, "reasoning_content": found[0]}


def _plain(value: Any, where: str) -> Any:
    """The value rebuilt from JSON's types: no other object's methods reach the template."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, str):
        return str.__str__(value)
    raise TemplateError(
        f"{where} is of type {type(value).__name__}: chat templates take text, numbers, "
        "lists and dictionaries"
    )


# Which template


def load_chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a Hugging Face folder by name ("default"); none is no error.

    They lie in chat_template.jinja and additional_chat_templates/NAME.jinja, in
    chat_template.json, or in tokenizer_config.json as one string or as a list of names and
    templates. The first place that has any is taken, as transformers does.

    Raises:
        TemplateError: a file that cannot be read, or a `chat_template` of another shape.
    """
    templates = {}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = read_text(path, TemplateError)
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = read_text(folder / "chat_template.jinja", TemplateError)
    if templates:
        return templates
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found = read_json_object(folder / name, TemplateError).get("chat_template")
            if found:
                return named_templates(found, str(folder / name))
    return {}


def named_templates(value: Any, where: str) -> dict[str, str]:
    """Name -> template, from the value of a `chat_template` key.

    Raises:
        TemplateError: neither a string, nor a dictionary of strings, nor a list of objects with
            "name" and "template".
    """
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict) and all(
        isinstance(text, str) for pair in value.items() for text in pair
    ):
        return dict(value)
    raise TemplateError(
        f"{where}: chat_template is of type {type(value).__name__}: expected a "
        'string, or a list of objects with "name" and "template"'
    )


def select_template(
    names: Collection[str], tools: Sequence[Mapping[str, Any]] | None = None
) -> str:
    """The template to use: "tool_use" if there are tools and such a template, else "default".

    Raises:
        TemplateError: neither is there, and there is more than one.
    """
    if tools and "tool_use" in names:
        return "tool_use"
    if "default" in names:
        return "default"
    if len(names) == 1:
        return next(iter(names))
    raise TemplateError(
        f"no chat template is named default; there are: {', '.join(sorted(names)) or 'none'}"
    )
