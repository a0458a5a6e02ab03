"""Requests made up from the OpenAPI document, valid and not: none may bring out a 5xx."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.errors import InvalidSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from relaxlm.engine.loop import EngineLoop
from relaxlm.server.app import ApiServer
from relaxlm.server.settings import ServerSettings

EXAMPLES = 12  # of each kind for each route
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
ROUTES = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/responses", "POST"),
    ("/v1/embeddings", "POST"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"),
    ("/health", "GET"),
    ("/metrics", "GET"),
]


@pytest.fixture(scope="module")
def document(engine: EngineLoop) -> Iterator[Any]:
    api = ApiServer(engine, ServerSettings(max_tokens_limit=4, allowed_hosts=("testserver",)))
    yield schemathesis.openapi.from_asgi("/openapi.json", api.app)
    api.close()


@st.composite
def cases(draw: st.DrawFn, operation: Any, mode: GenerationMode) -> schemathesis.Case:
    """Requests for one route, without those that the generator itself cannot make.

    What it turns a schema into when it looks for wrong requests is now and then a schema that it
    then refuses. If it refused most of them, Hypothesis would say so.
    """
    try:
        return draw(operation.as_strategy(generation_mode=mode))
    except InvalidSchema:
        reject()


def test_all_routes_are_tried(document: Any) -> None:
    operations = [result.ok() for result in document.get_all_operations()]
    assert {(one.path, one.method.upper()) for one in operations} == set(ROUTES)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method"), ROUTES)
def test_no_request_is_more_than_the_server_can_take(
    document: Any, path: str, method: str, mode: GenerationMode
) -> None:
    operation = document[path][method]
    if mode is GenerationMode.NEGATIVE and method == "GET":
        return  # nothing in such a request can be wrong

    @given(case=cases(operation, mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    check()
