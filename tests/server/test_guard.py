"""Who may come in: hosts, origins, keys."""

from __future__ import annotations

from typing import Any

import pytest

from nautile.server import ServerOptions
from nautile.server.guard import KeyRing
from nautile.server.service import ServiceError
from nautile.server.serving import check_exposure
from server.local import Local, user

KEYED = ServerOptions(api_keys=("key-of-anna", "key-of-bert"))


def post(local: Local, **headers: str) -> Any:
    return local.http.post("/v1/chat/completions", json={"messages": user()}, headers=headers)


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:9", "[::1]:8000", "10.1.2.3", "LOCALHOST:1", "nas.lan:80"]
)
def test_hosts_that_cannot_be_rebound(host: str) -> None:
    local = Local(ServerOptions(allowed_hosts=("nas.lan",)))
    assert post(local, host=host).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8000", "127.0.0.1.nip.io", "", "nas.lan.evil"])
def test_a_name_that_somebody_else_controls_is_refused(host: str) -> None:
    local = Local(ServerOptions(allowed_hosts=("nas.lan",)))
    answer = post(local, host=host)
    assert answer.status_code == 403 and "--allow-host" in answer.json()["error"]["message"]
    assert local.http.get("/health", headers={"host": host}).status_code == 403
    assert local.engine.requests == []


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://localhost:3000", "http://localhost.evil:8000", "", "http://[", "http://[x]:1"],
)
def test_pages_of_other_sites_are_refused(origin: str) -> None:
    local = Local()
    answer = post(local, origin=origin)
    assert answer.status_code == 403 and "--allow-origin" in answer.json()["error"]["message"]
    assert local.engine.requests == []


def test_a_browser_asks_before_it_sends_the_key() -> None:
    local = Local(ServerOptions(allowed_origins=("https://app.example",), api_keys=("key-of-anna",)))
    asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
    answer = local.http.options("/v1/chat/completions", headers={**asked, "access-control-request-headers": "authorization"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://app.example"
    assert post(local, origin="https://app.example").status_code == 401
    assert local.http.options("/v1/chat/completions", headers={**asked, "origin": "https://evil.example"}).status_code == 403


def test_own_pages_and_allowed_sites_may_call() -> None:
    local = Local(ServerOptions(allowed_origins=("https://app.example",)))
    assert post(local, origin="http://localhost:8000").status_code == 200
    answer = post(local, origin="https://app.example")
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://app.example"
    asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
    assert local.http.options("/v1/chat/completions", headers=asked).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong-key"},
        {"authorization": "Bearer "},
        {"authorization": "Basic key-of-anna"},
        {"x-api-key": "key-of-ann"},
        {"x-api-key": "key-of-annaa"},
        {"x-api-key": ""},
    ],
)
def test_without_the_key_nothing_happens(headers: dict[str, str]) -> None:
    local = Local(KEYED)
    assert post(local, **headers).status_code == 401
    for path in ("/metrics", "/v1/models", "/openapi.json"):
        assert local.http.get(path, headers=headers).status_code == 401
    assert local.http.post("/v1/messages", json={}, headers=headers).json()["error"]["type"] == "authentication_error"
    assert local.engine.requests == []


def test_health_needs_no_key() -> None:
    local = Local(KEYED)
    assert [local.http.get(path).status_code for path in ("/health", "/health/live", "/health/ready")] == [200, 200, 200]


def test_every_key_has_a_partition_of_its_own() -> None:
    local = Local(KEYED)
    assert post(local, authorization="Bearer key-of-anna").status_code == 200
    assert post(local, **{"x-api-key": "key-of-bert"}).status_code == 200
    assert post(local, **{"x-api-key": "key-of-anna"}).status_code == 200
    anna, bert, again = (request.partition for request in local.engine.requests)
    assert anna == again != bert and anna and "anna" not in anna
    assert post(Local()).status_code == 200


def test_keys_are_compared_whole() -> None:
    ring = KeyRing(["abcdefgh"])
    assert ring.partition("abcdefgh") and ring.partition("abcdefg") is None and ring.partition(None) is None
    assert ring.partition("abcdefgh\ud800") is None
    assert KeyRing([]).partition(None) == ""


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_key(host: str) -> None:
    check_exposure(host, ServerOptions())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_any_other_address_needs_one(host: str) -> None:
    with pytest.raises(ServiceError, match="--api-key"):
        check_exposure(host, ServerOptions())
    check_exposure(host, KEYED)


@pytest.mark.parametrize("key", ["", "short", "with space", "ümlaut-key", "line\nbreak-key"])
def test_keys_that_cannot_be_sent_are_refused(key: str) -> None:
    with pytest.raises(ServiceError, match="API key"):
        ServerOptions(api_keys=(key,))


@pytest.mark.parametrize("path", ["/v1/messages/count_tokens", "/v1/responses/input_tokens"])
def test_counting_tokens_takes_a_place_of_the_key(path: str) -> None:
    local = Local(ServerOptions(concurrency=1))
    body = {"messages": user(), "input": "hello"}
    assert local.http.post(path, json=body).status_code == 200 and local.service.in_flight == 0
    local.service.running[""] = 1
    answer = local.http.post(path, json=body)
    assert answer.status_code == 429 and "retry-after" in answer.headers
    local.service.running.clear()
    local.service.draining = True
    assert local.http.post(path, json=body).status_code == 503


@pytest.mark.parametrize("origin", ["https://app.example", "https://APP.example", "HTTPS://app.example"])
def test_an_allowed_page_can_read_why_it_was_refused(origin: str) -> None:
    local = Local(ServerOptions(allowed_origins=("https://App.Example", "HTTP://other:81"), api_keys=("key-of-anna",)))
    refused = post(local, origin=origin), post(local, origin=origin, host="evil.example")
    served = post(local, origin=origin, **{"x-api-key": "key-of-anna"})
    assert [answer.status_code for answer in (*refused, served)] == [401, 403, 200]
    for answer in (*refused, served):
        assert answer.headers.get_list("access-control-allow-origin") == [origin]
        assert "origin" in answer.headers["vary"].lower()


def test_other_pages_and_programs_get_no_headers_for_pages() -> None:
    local = Local(ServerOptions(allowed_origins=("https://app.example",), api_keys=("key-of-anna",)))
    for origin in ("https://evil.example", "https://app.example.evil", "https://appxexample", "https://app.example/x"):
        answer = post(local, origin=origin, **{"x-api-key": "key-of-anna"})
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert "access-control-allow-origin" not in post(local).headers


def test_ids_of_requests_are_the_server_s_own() -> None:
    local = Local()
    for answer in (post(local), post(local, host="evil.example"), local.http.get("/health"), local.http.get("/nothing")):
        assert answer.headers["request-id"] == answer.headers["x-request-id"]
    ids = {post(local, **{"x-request-id": "mine"}).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2 and "mine" not in ids
