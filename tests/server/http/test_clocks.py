"""The server's time to the first token is the client's: both ends of it over a socket, with clients that are slow on
purpose, so that what a clock leaves out is seconds and not noise."""

import asyncio
import json
import socket
import time

import pytest

from tests.support.servers import ASK, Server, series
from tucka_runtime.server.http.connection import Connection

STREAM = ASK | {"model": "base", "stream": True}
SLOW = 1.0  # seconds
SLACK = 0.5  # how far the two may be apart on a busy machine


def http(body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: server\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)


def read_answer(connection: socket.socket) -> float:
    """Reads a stream to its end; returns when the first event with text came."""
    received, first = b"", 0.0
    while b"data: [DONE]" not in received or not received.endswith(b"0\r\n\r\n"):
        chunk = connection.recv(4096)
        assert chunk, received
        received += chunk
        first = first or time.monotonic() * (b'"text":"' in received)
    return first


def first_tokens(server: Server) -> tuple[float, float]:
    """(number, sum of seconds)."""
    found = series(server)
    name = "tucka_time_to_first_token_seconds"
    return found[name + "_count"], found[name + "_sum"]


@pytest.mark.parametrize("cut", [3, 40, -20], ids=["request line", "head", "body"])
def test_it_begins_with_the_first_bytes(start_fake, cut: int) -> None:
    server = start_fake()
    ask = http(STREAM)
    with socket.create_connection(server.address, timeout=15) as connection:
        for _ in range(2):  # the second time over a connection that is already open
            count, before = first_tokens(server)
            began = time.monotonic()
            connection.sendall(ask[:cut])
            time.sleep(SLOW)
            connection.sendall(ask[cut:])
            seen = read_answer(connection) - began
            after = first_tokens(server)
            assert after[0] == count + 1
            assert after[1] - before > SLOW - SLACK
            assert after[1] - before == pytest.approx(seen, abs=SLACK)


def test_a_request_right_behind_another_begins_with_its_own_first_bytes(start_fake) -> None:
    server = start_fake()
    server.engine.seconds_per_token = SLOW
    once = http(STREAM | {"max_tokens": 1})
    with socket.create_connection(server.address, timeout=15) as connection:
        began = time.monotonic()
        connection.sendall(once + once[:30])  # its head is complete only when the first one has its answer
        time.sleep(SLOW / 2)
        connection.sendall(once[30:])
        seen = [read_answer(connection) - began, read_answer(connection) - began]
    count, total = first_tokens(server)
    assert count == 2 and total > 3 * SLOW - SLACK
    assert total == pytest.approx(sum(seen), abs=2 * SLACK)


def test_it_ends_when_the_token_is_written(start_fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client does not read: the answer to an earlier request of its own is still in the way."""
    connection_made = Connection.connection_made

    def with_small_buffers(self: Connection, transport: asyncio.Transport) -> None:
        connection_made(self, transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        transport.set_write_buffer_limits(high=1024)

    monkeypatch.setattr(Connection, "connection_made", with_small_buffers)
    server = start_fake()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(15)
        connection.connect(server.address)
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: server\r\n\r\n")
        time.sleep(0.2)
        began = time.monotonic()
        connection.sendall(http(STREAM))
        time.sleep(SLOW)
        seen = read_answer(connection) - began
    count, took = first_tokens(server)
    assert count == 1 and took > SLOW - SLACK
    assert took == pytest.approx(seen, abs=SLACK)
