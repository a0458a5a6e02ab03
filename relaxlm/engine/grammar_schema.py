"""JSON schemas inside grammars."""

from __future__ import annotations

import json
from typing import Any

from relaxlm.errors import RequestError

_OPTIONS = {
    "whitespace_pattern": r" |\r?\n[ \t]{0,24}",
    "json_allowed_escapes": 'nrbtf\\"',
}


def json_rule(schema: Any) -> str:
    """What stands in a lark grammar for JSON text that fits a schema.

    Raises:
        RequestError: not a schema.
    """
    if not isinstance(schema, dict):
        raise RequestError(f"JSON schema: expected an object, found {json.dumps(schema)[:60]}")
    return "%json " + json.dumps({**schema, "x-guidance": _OPTIONS})
