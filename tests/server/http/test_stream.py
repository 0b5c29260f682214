"""Streams that say nothing for a while: heartbeats, and clients that leave meanwhile."""

import json
import socket
import time

import pytest

from tests.support.servers import Server

ASK = {"model": "base", "prompt": "hi", "max_tokens": 3, "stream": True}


@pytest.fixture
def beating(start_fake) -> Server:
    """A server whose streams get a comment after 50 ms, and whose engine takes four times as long for a token."""
    server: Server = start_fake(sse_heartbeat=0.05)
    server.engine.seconds_per_token = 0.2
    return server


def kinds(text: str) -> list[str]:
    """Comments and events in order, each run of comments as one."""
    found: list[str] = []
    for line in filter(None, text.split("\n")):
        kind = "comment" if line.startswith(":") else line.removeprefix("data: ") if "[" in line[:8] else "event"
        if kind != "comment" or found[-1:] != ["comment"]:
            found.append(kind)
    return found


def test_silence_before_and_between_tokens_is_broken_by_comments(beating: Server) -> None:
    text = beating.post("/v1/completions", ASK).text
    assert kinds(text) == ["comment", "event", "comment", "event", "comment", "event", "[DONE]"]
    assert text.count(": still here\n\n") >= 6


def test_a_failure_after_a_heartbeat_is_an_event(beating: Server) -> None:
    beating.engine.fail_after = 1
    answer = beating.post("/v1/completions", ASK)
    assert answer.status_code == 200 and kinds(answer.text) == ["comment", "event", "event"]
    assert json.loads(answer.text.strip().rpartition("data: ")[2])["error"]["code"] == "engine_unavailable"
    beating.engine.fail_after = 0
    assert beating.post("/v1/completions", ASK).status_code == 503, "before the first heartbeat it has its status"


def test_a_client_that_leaves_in_the_silence_aborts_its_request(beating: Server) -> None:
    beating.engine.seconds_per_token = 5.0
    content = json.dumps(ASK).encode()
    with socket.create_connection(beating.address, timeout=10) as client:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        client.sendall(head % len(content) + content)
        seen = b""
        while b": still here" not in seen:
            seen += client.recv(1000)
    deadline = time.monotonic() + 2
    while beating.engine.requests[0].id not in beating.engine.aborted:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_the_setting_there_are_no_comments(start_fake) -> None:
    server = start_fake()
    server.engine.seconds_per_token = 0.1
    assert "comment" not in kinds(server.post("/v1/completions", ASK).text)
