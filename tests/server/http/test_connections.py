"""Connections as clients see them: how many there may be, how long, and that every answer arrives."""

import asyncio
import contextlib
import errno
import io
import json
import logging
import resource
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.support.servers import Server, read_all, series
from tucka_runtime.config import ServerConfig
from tucka_runtime.errors import ConfigError
from tucka_runtime.server.http import connection, listener
from tucka_runtime.server.http.server import allow_open_files

ASK = {"model": "base", "prompt": "hi", "max_tokens": 8}
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def ask(version: str = "1.1", **fields: object) -> bytes:
    content = json.dumps(ASK | fields).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "RESERVE", 4)


@pytest.fixture
def full(start_fake, small_reserve: None) -> Iterator[Server]:
    """A server whose two connections are at work."""
    server = start_fake(max_connections=2, api_key=("user",), admin_key=("admin",))
    server.engine.seconds_per_token = 0.2
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(socket.create_connection(server.address, timeout=20)) for _ in range(2)]
        for client in busy:
            client.sendall(ask(max_tokens=100).replace(b"Host: x", b"Host: x\r\nAuthorization: Bearer user"))
        wait_for(lambda: len(server.engine.requests) == 2)
        yield server


def test_connections_are_bounded_and_the_waiting_ones_make_room(start_fake, small_reserve: None) -> None:
    server = start_fake(max_connections=8)
    silent = [socket.create_connection(server.address) for _ in range(30)]
    assert httpx.get(server.url + "/health").status_code == 200
    closed = 0
    for client in silent:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            closed += client.recv(1000) == b""
        client.close()
    assert closed >= 18


def test_a_full_server_says_so_to_a_client_that_sends_first(full: Server) -> None:
    """The answer arrives: a socket that is closed with something unread in it resets the client's."""
    content = ask(prompt="a" * 300_000)
    for _ in range(10):
        with socket.create_connection(full.address, timeout=5) as late:
            late.sendall(content[:1000])
            answer = late.recv(4096)
            with contextlib.suppress(BrokenPipeError):
                late.sendall(content[1000:])
            answer += read_all(late)
        assert answer.startswith(b"HTTP/1.1 429") and b"retry-after" in answer and b"x-request-id" in answer
        assert b"connection: close" in answer.lower() and b'{"error":' in answer
    seen = full.get("/metrics", headers={"Authorization": "Bearer user"}).text
    assert 'tucka_http_requests_total{code="429",method="POST",route="/v1/completions"} 10.0' in seen


def test_a_full_server_has_a_reserve_for_probes_and_admins(full: Server) -> None:
    admin = {"Authorization": "Bearer admin"}
    for path in ("/health", "/ready"):
        assert httpx.get(full.url + path).status_code == 200
    for path in ("/metrics", "/v1/adapters"):
        assert httpx.get(full.url + path, headers=admin).status_code == 200
        assert httpx.get(full.url + path).status_code == 401
    assert httpx.get(full.url + "/v1/models", headers=admin).status_code == 429


def test_beyond_the_reserve_the_oldest_that_waits_makes_room(full: Server) -> None:
    silent = [socket.create_connection(full.address) for _ in range(20)]
    assert httpx.get(full.url + "/ready").status_code == 200
    for client in silent:
        client.close()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_ends_its_sending_gets_its_answer(start_fake, stream: bool, version: str) -> None:
    server = start_fake()
    server.engine.seconds_per_token = 0.1
    with socket.create_connection(server.address, timeout=10) as client:
        client.sendall(ask(version, stream=stream))
        client.shutdown(socket.SHUT_WR)
        answer = read_all(client)
    assert answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert (b"[DONE]" if stream else b'"usage":') in answer
    assert server.engine.requests[0].id in server.engine.aborted, "its lease and its stream are given back"


def test_requests_in_a_row_are_answered_before_the_connection_ends(start_fake) -> None:
    with socket.create_connection(start_fake().address, timeout=10) as client:
        client.sendall(HEALTH * 3 + b"GET /hea")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client).count(b"HTTP/1.1 200") == 3


def test_pipelined_requests_are_answered_in_order(start_fake) -> None:
    answer = start_fake().raw(HEALTH + b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.index(b'"ok"') < answer.index(b'"ready"')


def test_deadlines_do_not_touch_slow_answers_or_long_uploads(start_fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "RECEIVE_SECONDS", 0.3)
    server = start_fake()
    server.engine.seconds_per_token = 0.1
    assert server.post("/v1/completions", ASK).status_code == 200
    content = json.dumps(ASK | {"prompt": "a" * 200}).encode() + b" " * 400_000
    with socket.create_connection(server.address, timeout=10) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content))
        for i in range(0, len(content), 50_000):
            client.sendall(content[i : i + 50_000])
            time.sleep(0.1)
        assert client.recv(100).startswith(b"HTTP/1.1 200")


def test_deadlines_do_not_touch_what_waits_behind_a_slow_answer(start_fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has come whole: the last one's head too, though nobody has read that yet."""
    monkeypatch.setattr(connection, "RECEIVE_SECONDS", 0.3)
    server = start_fake()
    server.engine.seconds_per_token = 0.1
    with socket.create_connection(server.address, timeout=10) as client:
        client.sendall(HEALTH + ask() + HEALTH.replace(b"Host: x", b"Host: x\r\nConnection: close"))
        answer = read_all(client)
    assert answer.count(b"HTTP/1.1 200") == 3 and answer.count(b'"usage":') == 1


def test_deadlines_are_kept_behind_a_slow_answer(start_fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that does not go on is waited for from the answer's end on."""
    monkeypatch.setattr(connection, "RECEIVE_SECONDS", 0.3)
    server = start_fake()
    server.engine.seconds_per_token = 0.1
    with socket.create_connection(server.address, timeout=10) as client:
        client.sendall(HEALTH + ask() + b"GET /hea")
        answer = read_all(client)
    assert answer.count(b"HTTP/1.1 200") == 2 and answer.count(b"HTTP/1.1 408") == 1


def slow_reader(server: Server) -> socket.socket:
    """A client whose answers are more than its own and the kernel's buffers hold, and which reads none of them."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(20)
    client.connect(server.address)
    with contextlib.suppress(TimeoutError):
        client.settimeout(1)
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 2000)
    client.settimeout(20)
    return client


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    made = connection.Connection.connection_made

    def with_small_buffers(self: connection.Connection, transport: asyncio.Transport) -> None:
        made(self, transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    monkeypatch.setattr(connection.Connection, "connection_made", with_small_buffers)
    monkeypatch.setattr(connection, "SEND_SECONDS", 0.5)


def test_a_client_that_never_reads_is_given_up(start_fake, small_buffers: None) -> None:
    server = start_fake()
    with slow_reader(server) as client:
        time.sleep(1.5)
        with pytest.raises(ConnectionResetError):
            client.sendall(HEALTH * 100_000)
    answered = series(server)['tucka_http_requests_total{code="200",method="GET",route="/metrics"}']
    assert answered < 100, "nor was all that it asked for carried out"


def test_a_client_that_reads_slowly_is_served(start_fake, small_buffers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_fake()
    with slow_reader(server) as client:
        got, began = 0, time.monotonic()
        while got < 100_000 or time.monotonic() - began < 5 * connection.SEND_SECONDS:
            received = client.recv(2000)
            assert received, "it was given up"
            got += len(received)
            time.sleep(0.02)


def test_idle_connections_are_kept_as_long_as_the_setting_says(start_fake) -> None:
    server = start_fake(keep_alive_timeout=1)
    assert ServerConfig().keep_alive_timeout == 75
    with socket.create_connection(server.address, timeout=10) as client:
        client.sendall(HEALTH)
        began = time.monotonic()
        read_all(client)
        assert 0.8 < time.monotonic() - began < 4


def test_a_limit_of_open_files_that_is_too_low_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(256, 1024)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: limits.append(new))
    with pytest.raises(ConfigError, match=r"needs 1344 open files, and this process may have 1024.*704 or fewer"):
        allow_open_files(1024)
    allow_open_files(704)
    assert limits[-1] == (1024, 1024)


def test_accepting_without_descriptors_is_said_once(start_fake, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    """What the kernel says is made up, the loop and its listener are real."""
    server = start_fake()
    left = [30]
    accept = socket.socket.accept

    def without(self: socket.socket):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", without)
    monkeypatch.setattr(listener, "RETRY_SECONDS", 0.01)
    with caplog.at_level(logging.INFO):
        assert httpx.get(server.url + "/health", timeout=30).status_code == 200
    assert left == [0]
    (said,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "cannot be accepted: Too many open files" in said.getMessage() and said.exc_info is None


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_stream_is_framed_as_its_client_reads_it(start_fake, version: str) -> None:
    """By chunks, or by the connection's end where a client is too old for them."""
    request = ask(version, stream=True, n=2).replace(b"Host: x", b"Host: x\r\nConnection: close")
    head, _, body = start_fake().raw(request).partition(b"\r\n\r\n")
    assert (b"chunked" in head.lower()) == (version == "1.1")
    if version == "1.1":
        data, chunks = b"", io.BytesIO(body)
        while size := int(chunks.readline(), 16):
            data += chunks.read(size)
            assert chunks.read(2) == b"\r\n"
        assert chunks.read() == b"\r\n"
        body = data
    events = body.decode().split("\n\n")
    assert len(events) == 2 * 8 + 2 and events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events[:-2])
