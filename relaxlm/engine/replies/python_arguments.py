"""Arguments as in Python, name=value with commas between them, as rules of a grammar.

Values are written as in JSON, which the models know from the functions' schemas: `python_calls`
reads either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from relaxlm.engine.grammar_schema import json_rule
from relaxlm.engine.grammar_source import literal
from relaxlm.engine.replies.tools import Function
from relaxlm.engine.replies.xml_arguments import alone

if TYPE_CHECKING:
    from relaxlm.engine.replies.grammar import Rules


def python_arguments(rules: Rules, function: Function, i: int) -> str:
    """All arguments of function number `i`, in the order of its schema."""
    schema = function.parameters
    properties = schema.get("properties") or {}
    if not properties and schema.get("additionalProperties", True) is not False:
        value = rules.add(f"any_value_{i}", json_rule({}))
        argument = rules.add(f"argument_{i}", f'/[a-zA-Z_][a-zA-Z0-9_]{{0,63}}/ "=" {value}')
        return f'({argument} (", " {argument})*)?'
    required = schema.get("required") or []
    arguments = []
    for n, (key, part) in enumerate(properties.items()):
        body = json_rule(alone(part, schema), not function.strict)
        value = rules.add(f"value_{i}_{n}", body)
        arguments.append(f"{literal(f'{key}=')} {value}")
    # What may follow an argument, and what may stand there first.
    after = first = '""'
    for n in reversed(range(len(arguments))):
        ends = "" if list(properties)[n] in required else "?"
        begun = f"{arguments[n]} {after}"
        first = rules.add(f"first_{i}_{n}", f"{begun} | {first}" if ends else begun)
        after = rules.add(f"after_{i}_{n}", f'(", " {arguments[n]}){ends} {after}')
    return first
