"""Keys: every path but the probes needs one, however it is spelled and whatever Host says."""

import hmac
import inspect
import itertools

import httpx
import pytest

from tests.support.servers import Server
from tucka_runtime.server.http import access
from tucka_runtime.server.http import keys as auth

PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/base", "/v1/adapters", "/v1/adapters/x",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/metrics", "/version", "/tokenize", "/detokenize", "/",
    "/v1/embeddings", "/tokenizer_info", "/load_lora_adapter", "/unload_lora_adapter",
    "/server_info", "/get_server_info", "/model_info", "/get_model_info",
    "/v1/messages", "/v1/messages/count_tokens", "/docs", "/openapi.json", "/nowhere",
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE")


@pytest.fixture
def server(start_fake) -> Server:
    return start_fake(api_key=("user-1", "user-2"), admin_key=("admin",))


def status(server: Server, method: str, path: str, headers: str = "", host: str = "x") -> int:
    answer = server.raw(
        f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: 0\r\n{headers}\r\n".encode()
    )
    if answer.split()[1] == b"401" and method != "HEAD":
        assert (b'"code":"invalid_api_key"' in answer) != (b'"type":"authentication_error"' in answer)
        assert b"www-authenticate: Bearer" in answer
    return int(answer.split()[1])


def spellings(path: str) -> list[str]:
    encoded = "/" + "".join(f"%{ord(char):02x}" for char in path[1:])
    return [
        path, encoded, path + "/", "/" + path, path + "?a=/health", path + "%00", f"/health/..{path}", f"/.{path}",
        path + "%2f..%2f..%2fhealth", path + ";/health", path.upper() if path != "/" else "/X",
    ]  # fmt: skip


def test_row_23_every_route_method_and_spelling(server: Server) -> None:
    for method, path in itertools.product(METHODS, PATHS):
        for spelling in spellings(path) if method in ("GET", "POST") else (path,):
            assert status(server, method, spelling) == 401, (method, spelling)


@pytest.mark.parametrize("path", ["/health", "/ping", "/ready", "/%68ealth", "/health?x=1"])
def test_row_23_probes_are_open(server: Server, path: str) -> None:
    assert status(server, "GET", path) == 200


@pytest.mark.parametrize(
    "path",
    [
        "/health/",
        "//health",
        "/health%2f",
        "/Health",
        "/health/x",
        "http://health/v1/models",
        "http://x/v1/models#/health",
        "/health%00",
        "/healthz",
    ],
)
def test_row_23_what_only_looks_like_a_probe(server: Server, path: str) -> None:
    assert status(server, "GET", path) == 401


@pytest.mark.parametrize("host", ["x/health?a=", "/health", "health", "x/ready#"])
def test_row_24_host_does_not_matter(server: Server, host: str) -> None:
    assert status(server, "GET", "/v1/models", host=host) == 401
    assert (
        status(server, "GET", "/v1/models", headers="X-Forwarded-Path: /health\r\nX-Original-URL: /health\r\n") == 401
    )


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("Bearer user-1", 200), ("bearer user-2", 200), ("Bearer admin", 200), ("Bearer user-", 401), ("Bearer", 401),
        ("Bearer user-1x", 401), ("user-1", 401), ("Basic user-1", 401), ("Bearer é", 401),
    ],
)  # fmt: skip
def test_keys(server: Server, header: str, expected: int) -> None:
    headers = {"authorization": header.encode()}
    assert httpx.get(server.url + "/v1/models", headers=headers).status_code == expected


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([("x-api-key", "user-1")], 200), ([("X-Api-Key", "admin")], 200), ([("x-api-key", "user-")], 401),
        ([("x-api-key", "Bearer user-1")], 401), ([("x-api-key", "")], 401), ([("x-api-key", "é")], 401),
        # An `Authorization` counts alone, whatever it says, and of several of a name the first.
        ([("authorization", "Bearer user-1"), ("x-api-key", "x")], 200),
        ([("authorization", "Bearer x"), ("x-api-key", "user-1")], 401),
        ([("x-api-key", "user-1"), ("authorization", "")], 401),
        ([("x-api-key", "user-1"), ("authorization", "Basic user-1")], 401),
        ([("x-api-key", "x"), ("x-api-key", "user-1")], 401),
        ([("authorization", "Bearer x"), ("authorization", "Bearer user-1")], 401),
    ],
)  # fmt: skip
def test_keys_as_anthropics_clients_send_them(server: Server, headers: list[tuple[str, str]], expected: int) -> None:
    sent = [(name.encode(), value.encode()) for name, value in headers]
    assert httpx.get(server.url + "/v1/models", headers=sent).status_code == expected


def test_no_key_is_no_key(server: Server) -> None:
    for headers in ({}, {"authorization": ""}, {"authorization": "Bearer"}):
        assert httpx.get(server.url + "/v1/models", headers=headers).status_code == 401
        assert auth._key({"headers": [(k.encode(), v.encode()) for k, v in headers.items()]}) is None


def test_row_25_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    assert access.matching(b"1", [b"1", b"2", b"3"]) == 0
    assert len(compared) == 3, "a match must not end the comparing"
    assert "==" not in inspect.getsource(access.matching) + inspect.getsource(access.Keys.find)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/adapters"), ("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/x"), ("GET", "/v1/%61dapters/x"),
        ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"),
    ],
)  # fmt: skip
def test_row_26_a_users_key_manages_no_adapters(server: Server, method: str, path: str) -> None:
    for user in ({"authorization": "Bearer user-1"}, {"x-api-key": "user-1"}):
        answer = httpx.request(method, server.url + path, headers=user)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "admin_key_required"
    answer = httpx.request(method, server.url + path, headers={"authorization": "Bearer admin"})
    assert answer.status_code in (200, 400, 404)


def test_without_admin_keys_api_keys_manage(start_fake) -> None:
    server = start_fake(api_key=("user",))
    assert httpx.get(server.url + "/v1/adapters", headers={"authorization": "Bearer user"}).status_code == 200


def test_keys_salt_the_cache(server: Server) -> None:
    sent = [{"authorization": f"Bearer {key}"} for key in ("user-1", "user-2", "user-1")]
    for headers in (*sent, {"x-api-key": "user-1"}):
        server.post("/v1/completions", {"model": "base", "prompt": "a"}, headers=headers).raise_for_status()
    first, second, third, fourth = (request.cache_salt for request in server.engine.requests)
    assert first == third == fourth != second and "user" not in first


def test_without_keys_everything_is_open(start_fake) -> None:
    server = start_fake()
    server.post("/v1/completions", {"model": "base", "prompt": "a"}).raise_for_status()
    assert server.engine.requests[0].cache_salt == ""
