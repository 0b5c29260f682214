"""The lines that requests leave: one for the HTTP answer, under its route, and one for the generation."""

import json
import logging
import socket
import time

import httpx
import pytest

from tests.support.servers import Server

ASK = {"model": "base", "prompt": "hi", "max_tokens": 8}


def lines(caplog: pytest.LogCaptureFixture, event: str, count: int) -> list[dict[str, object]]:
    """So many lines of an event, waited for: they are written after the answer."""
    deadline = time.monotonic() + 10
    while True:
        found = [record.fields for record in caplog.records if getattr(record, "fields", {}).get("event") == event]
        if len(found) >= count:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tucka_runtime")


def test_refusals_are_logged_under_the_route_that_was_asked_for(start_fake, caplog) -> None:
    server: Server = start_fake(api_key=("user",), admin_key=("admin",))
    user = {"Authorization": "Bearer user"}
    httpx.post(server.url + "/v1/chat/completions", json={})
    httpx.delete(server.url + "/v1/adapters/team/law", headers=user)
    httpx.get(server.url + "/v1/completions", headers=user)
    httpx.get(server.url + "/v1/models", headers=user | {"X": "x" * 20_000})
    httpx.get(server.url + "/nowhere")
    seen = [(line["route"], line["path"], line["code"]) for line in lines(caplog, "http", 5)]
    assert seen == [
        ("/v1/chat/completions", None, 401),
        ("/v1/adapters/{name:path}", None, 403),
        ("/v1/completions", None, 405),
        ("/v1/models", None, 431),
        ("unmatched", "/nowhere", 401),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_any_text(start_fake, caplog, stream: bool) -> None:
    """What it would have seen is held back: it may become the stop string."""
    server: Server = start_fake()
    text = server.post("/v1/completions", ASK).json()["choices"][0]["text"]
    server.engine.seconds_per_token = 0.2
    content = json.dumps(ASK | {"stop": text + "!", "max_tokens": 100, "stream": stream}).encode()
    with socket.create_connection(server.address) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content) + content
        )
        time.sleep(0.7)
    generation, access = lines(caplog, "request", 2)[1], lines(caplog, "http", 2)[1]
    assert generation["outcome"] == "abort" and generation["generation_tokens"] >= 1
    assert generation["decode_seconds"] is None and generation["first_token_seconds"] is None
    assert access["error"] is None and access["code"] == 499


def test_an_answers_id_is_in_its_line_and_the_engines(start_fake, caplog) -> None:
    server: Server = start_fake()
    answer = server.post("/v1/completions", ASK)
    (line,) = lines(caplog, "request", 1)
    assert line["id"] == answer.json()["id"] == server.engine.requests[0].id
    assert line["request_id"] == answer.headers["x-request-id"] != line["id"]
    assert line["decode_seconds"] is not None


def test_a_path_says_all_methods_that_it_takes(start_fake) -> None:
    server: Server = start_fake()
    for path, methods in (("/v1/adapters", "GET, HEAD, POST"), ("/v1/adapters/team/law", "DELETE, GET, HEAD, PUT")):
        answer = httpx.patch(server.url + path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)
