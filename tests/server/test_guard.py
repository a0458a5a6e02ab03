"""Who may use a server, and from where."""

from collections.abc import Iterator

import httpx
import pytest

from relaxlm.errors import ConfigError
from relaxlm.server.settings import ServerSettings, check_origin, gather_api_keys, is_loopback
from tests.server.serving import Running, fake_api, running

BODY = {"prompt": "a"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(fake_api(cors_origins=("https://friend.example",))) as started:
        yield started


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with running(fake_api(api_keys=("first-key", "second-key"))) as started:
        yield started


def ask(server: Running, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{server.url}/v1/completions", json=BODY, headers=names)


def test_every_response_has_an_id_of_its_own(server: Running) -> None:
    ids = {ask(server).headers["x-request-id"] for _ in range(3)}
    ids |= {httpx.get(server.url + path).headers["x-request-id"] for path in ("/health", "/no")}
    assert len(ids) == 5 and all(one.startswith("req_") for one in ids)
    assert ask(server).headers["x-content-type-options"] == "nosniff"
    assert "server" not in ask(server).headers


@pytest.mark.parametrize("header", ["Bearer first-key", "bearer second-key", "Bearer  first-key"])
def test_any_of_the_keys_lets_in(locked: Running, header: str) -> None:
    assert ask(locked, authorization=header).status_code == 200


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        ("", "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Basic first-key", "missing_api_key"),
        ("Bearer first", "invalid_api_key"),
        ("Bearer first-key2", "invalid_api_key"),
        ("Bearer FIRST-KEY", "invalid_api_key"),
        ("Bearer caf\xe9", "invalid_api_key"),
    ],
)
def test_no_key_and_a_wrong_one_are_refused(locked: Running, header: str | None, code: str) -> None:
    response = httpx.post(
        f"{locked.url}/v1/completions",
        json=BODY,
        headers={} if header is None else {"authorization": header.encode("latin-1")},
    )
    assert response.status_code == 401
    assert response.json()["error"]["code"] == code
    assert response.headers["www-authenticate"] == "Bearer"


def test_without_a_key_there_are_only_the_page_and_the_health(locked: Running) -> None:
    for path in ("/health", "/", "/page/icon.svg"):
        assert httpx.get(locked.url + path).status_code == 200, path
    for path in ("/metrics", "/v1/models", "/v1/models/fake", "/openapi.json", "/no", "/page/no"):
        assert httpx.get(locked.url + path).status_code == 401, path
    with running(fake_api(api_keys=("k",), open_metrics=True)) as server:
        assert httpx.get(server.url + "/metrics").status_code == 200


def test_without_keys_a_key_does_no_harm(server: Running) -> None:
    assert ask(server, authorization="Bearer whatever").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example"])
def test_a_name_that_another_site_could_own_is_refused(server: Running, host: str) -> None:
    response = ask(server, host=host)
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    "host",
    *[["localhost", "LOCALHOST:80", "a.localhost", "127.0.0.1:1", "[::1]:8000", "10.0.0.7"]],
)
def test_addresses_and_localhost_are_no_names_of_other_sites(server: Running, host: str) -> None:
    assert ask(server, host=host).status_code == 200


def test_names_may_be_allowed() -> None:
    with running(fake_api(allowed_hosts=("gpu-box.lan",))) as server:
        assert ask(server, host="GPU-box.lan:8000").status_code == 200
        assert ask(server, host="other.lan").status_code == 403
        assert ask(server, host="127.0.0.1").status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1"])
def test_pages_of_other_sites_are_refused(server: Running, origin: str) -> None:
    response = ask(server, origin=origin)
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in response.headers


def test_the_own_page_is_let_in(server: Running) -> None:
    assert ask(server, origin=server.url).status_code == 200


def test_pages_of_allowed_origins_are_let_in_and_may_read_errors(server: Running) -> None:
    origin = "https://friend.example"
    for response in (
        ask(server, origin=origin),
        httpx.post(f"{server.url}/v1/completions", content=b"{", headers={"origin": origin}),
    ):
        assert response.headers["access-control-allow-origin"] == origin
    before = httpx.options(
        f"{server.url}/v1/completions",
        headers={
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, content-type",
        },
    )
    assert before.status_code == 200
    assert before.headers["access-control-allow-origin"] == origin


def test_cors_is_off_unless_asked_for(locked: Running) -> None:
    before = httpx.options(
        f"{locked.url}/v1/completions",
        headers={"origin": "https://friend.example", "access-control-request-method": "POST"},
    )
    assert before.status_code == 401
    assert "access-control-allow-origin" not in before.headers


def test_origins_are_spelled_as_browsers_do() -> None:
    for origin in ("*", "null", "https://example.com", "http://localhost:3000"):
        assert check_origin(origin) == origin
    for origin in ("example.com", "https://example.com/", "https://example.com/chat", ""):
        with pytest.raises(ConfigError, match="expected scheme, host and port"):
            check_origin(origin)


def test_a_network_needs_a_key_or_a_decision() -> None:
    with pytest.raises(ConfigError, match="no API key"):
        ServerSettings(host="0.0.0.0").check_exposure(allow_unauthenticated=False)
    ServerSettings(host="0.0.0.0").check_exposure(allow_unauthenticated=True)
    ServerSettings(host="0.0.0.0", api_keys=("k",)).check_exposure(allow_unauthenticated=False)
    ServerSettings(host="127.0.0.1").check_exposure(allow_unauthenticated=False)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("LocalHost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("example.com", False),
        ("192.168.1.2", False),
    ],
)
def test_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_keys_come_from_options_the_environment_and_a_file(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# ours\n\nfrom-file \nfrom-option\n")
    file.chmod(0o600)
    monkeypatch.setenv("RELAXLM_API_KEY", "from-environment")
    keys = gather_api_keys(["from-option"], file)
    assert keys == ("from-option", "from-environment", "from-file")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        gather_api_keys([], file)
    file.chmod(0o600)
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="no API key"):
        gather_api_keys([], file)


@pytest.mark.parametrize("key", ["", " a", "a\n", "caf\xe9"])
def test_keys_that_no_header_carries_are_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--api-key has a key"):
        gather_api_keys([key], None)
    monkeypatch.setenv("RELAXLM_API_KEY", "")
    with pytest.raises(ConfigError, match="RELAXLM_API_KEY has a key"):
        gather_api_keys([], None)
