"""Routes without a model behind them."""

import json
from collections.abc import Iterator

import httpx
import pytest

from relaxlm.errors import LibraryError
from tests.server.serving import FakeService, Running, fake_api, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(fake_api()) as started:
        yield started


def test_unknown_paths_and_methods_have_the_same_error_body(server: Running) -> None:
    missing = httpx.get(server.url + "/v1/files")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "unknown_url"
    assert "'/v1/files'" in missing.json()["error"]["message"]
    wrong = httpx.get(server.url + "/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    assert httpx.request("BREW", server.url + "/health").status_code == 405
    for path in ("/v1/models/", "/health/"):
        assert httpx.get(server.url + path).status_code == 404
    assert httpx.get(server.url + "/v1/models/a/b").json()["error"]["message"] == "no model a/b"


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/page/../app.py", "/page/%2e%2e/app.py"])
def test_there_is_nothing_that_was_not_meant_to_be_there(server: Running, path: str) -> None:
    assert httpx.get(server.url + path).status_code == 404


def test_query_parameters_are_not_ignored(server: Running) -> None:
    response = httpx.post(server.url + "/v1/completions?api-version=1", json={"prompt": "a"})
    assert response.status_code == 400 and "'api-version'" in response.json()["error"]["message"]


def test_bodies_that_are_no_json_are_told_as_errors_of_the_request(server: Running) -> None:
    for body in (b"", b"{", b"[1]", b'{"prompt": NaN}', b"[" * 200_000, b'{"prompt": "\xff"}'):
        response = httpx.post(
            server.url + "/v1/completions",
            content=body,
            headers={"content-type": "application/json"},
        )
        assert response.status_code == 400, body[:20]
        assert response.json()["error"]["type"] == "invalid_request_error"
    unknown = httpx.post(server.url + "/v1/completions", json={"prompt": "a", "prompts": 1})
    assert unknown.status_code == 400 and unknown.json()["error"]["param"] == "prompts"


def test_the_page_loads_nothing_from_elsewhere(server: Running) -> None:
    page = httpx.get(server.url + "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        part.split(" ", 1) for part in page.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-frame-options"] == "DENY"
    script = httpx.get(server.url + "/page/app.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"


def test_the_document_describes_every_route(server: Running) -> None:
    document = httpx.get(server.url + "/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{name}",
        "/tokenize",
        "/detokenize",
        "/health",
        "/metrics",
        "/openapi.json",
    }
    text = json.dumps(document)
    for used in set(text.split('"#/components/schemas/')[1:]):
        assert used.partition('"')[0] in document["components"]["schemas"]
    assert "HTTPValidationError" not in text
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}


def test_health_tells_of_an_engine_that_has_failed(server: Running, monkeypatch) -> None:
    failure = LibraryError("the engine has failed: ZeroDivisionError; start it again")
    monkeypatch.setattr(server.api.engine, "failure", failure)
    response = httpx.get(server.url + "/health")
    assert response.status_code == 500
    assert response.json()["error"]["message"] == str(failure)


def test_health_may_be_asked_with_head(server: Running) -> None:
    response = httpx.head(server.url + "/health")
    assert response.status_code == 200 and response.content == b""
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}


@pytest.mark.parametrize(("given", "taken"), [({}, 5), ({"max_tokens": 3}, 3)])
def test_a_limit_of_tokens_is_also_the_default(given: dict[str, int], taken: int) -> None:
    service = FakeService()
    with running(fake_api(service, max_tokens_limit=5)) as server:
        ok = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", **given})
        assert ok.status_code == 200 and service.seen[-1].max_tokens == taken
        more = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 6})
    assert more.status_code == 400 and more.json()["error"]["param"] == "max_tokens"
    assert "max_tokens = 6 is more than this server allows: 5" in more.json()["error"]["message"]
