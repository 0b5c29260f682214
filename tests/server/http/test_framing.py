"""What is malformed has done nothing, has one answer and leaves no traceback; a request ends where RFC 9112 says so."""

import contextlib
import json
import logging
import random
import socket
import time

import pytest

from tests.support import GOLDEN
from tests.support.servers import Server, read_all, series
from tucka_runtime.server.http import connection

ADAPTER = str(GOLDEN / "llama-qv-r8k3t3" / "adapter")
CHUNKED = b"Transfer-Encoding: chunked\r\n"
BODY = json.dumps({"model": "base", "prompt": "hi", "max_tokens": 2}).encode()


def head(line: str = "POST /v1/completions HTTP/1.1", *headers: bytes) -> bytes:
    return b"\r\n".join([line.encode(), b"Host: x", *headers, b"", b""])


DELETE = "DELETE /v1/adapters/a HTTP/1.1"
MALFORMED = {
    "bad chunk": head(DELETE, CHUNKED[:-2]) + b"5\r\nhello\r\nzz\r\n",
    "bad chunk's end": head(DELETE, CHUNKED[:-2]) + b"5\r\nhelloworld\r\n0\r\n\r\n",
    "bad trailer": head(DELETE, CHUNKED[:-2]) + b"0\r\na b: c\r\n\r\n",
    "both lengths": head(DELETE, CHUNKED[:-2], b"Content-Length: 4") + b"0\r\n\r\n",
    "chunks in HTTP/1.0": head(DELETE.replace("1.1", "1.0"), CHUNKED[:-2]) + b"0\r\n\r\n",
    "two lengths": head(DELETE, b"Content-Length: 0", b"Content-Length: 5"),
    "signed length": head(DELETE, b"Content-Length: +0"),
    "two codings": head(DELETE, b"Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
    "space before the colon": head(DELETE, b"Content-Length : 0"),
    "HTTP/2": head(DELETE.replace("1.1", "2.0")),
    "no Host": f"{DELETE}\r\n\r\n".encode(),
}


@pytest.fixture
def server(start_fake) -> Server:
    """Has the adapter `a`."""
    server = start_fake()
    server.post("/v1/adapters", {"name": "a", "path": ADAPTER}).raise_for_status()
    return server


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://x/ready", b"200"),
        ("HTTPS://x:8000/v1/models?a=b", b"200"),
        ("http://x", b"200"),
        ("http://x?a=b", b"200"),
        ("http://x/nowhere", b"404"),
        ("ftp://x/ready", b"404"),
    ],
)
def test_whole_urls_as_targets(start_fake, target: str, status: bytes) -> None:
    """RFC 9112, section 3.2.2: clients that take the server for a proxy send them."""
    with socket.create_connection(start_fake().address, timeout=10) as client:
        client.sendall(head(f"GET {target} HTTP/1.1", b"Connection: close"))
        assert read_all(client).split()[1] == status


@pytest.mark.parametrize("kind", MALFORMED)
def test_what_is_malformed_has_done_nothing(server: Server, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """In one packet or byte by byte; what follows it on the connection is no request either."""
    data = MALFORMED[kind] + head("DELETE /v1/adapters/a HTTP/1.1")
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))]):
        with socket.create_connection(server.address, timeout=10) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                client.sendall(piece)
            answer = read_all(client)
        assert answer.split()[1] in (b"400", b"501", b"505") and answer.count(b"x-request-id") == 1
        assert b'{"error":' in answer and b"x-request-id" in answer and b"connection: close" in answer.lower()
    assert [card["id"] for card in server.get("/v1/adapters").json()["data"]] == ["a"]
    assert not [record for record in caplog.records if record.exc_info]
    assert 'tucka_http_requests_total{code="200",method="DELETE",route="/v1/adapters/{name:path}"}' not in series(
        server
    )


def test_an_application_at_work_is_the_one_that_answers(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Its line in the log says what the client was told."""
    with caplog.at_level(logging.INFO, "tucka_runtime"):
        answer = server.raw(MALFORMED["bad chunk"].replace(b"Host: x", b"Host: x\r\nX-Request-Id: mine"))
        assert answer.startswith(b"HTTP/1.1 400") and b"x-request-id: mine" in answer
        server.get("/ready")  # by then the line is written
    lines = [record.fields for record in caplog.records if record.name.endswith("access")]
    (line,) = [line for line in lines if line["method"] == "DELETE"]
    assert (line["route"], line["code"], line["request_id"]) == ("/v1/adapters/{name:path}", 400, "mine")


@pytest.mark.parametrize("end", ["closes", "stops"])
def test_a_body_that_does_not_come_to_its_end(server: Server, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "RECEIVE_SECONDS", 0.3)
    for framing, part in ((b"Content-Length: 9", b"{"), (CHUNKED[:-2], b"5\r\nhello\r\n0\r\n")):
        with socket.create_connection(server.address, timeout=10) as client:
            client.sendall(head(DELETE, framing) + part)
            if end == "closes":
                client.shutdown(socket.SHUT_WR)
            answer = read_all(client)
        assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"x-request-id") == 1
    assert server.get("/v1/adapters/a").status_code == 200


def test_a_length_may_be_said_twice_and_folded_lines_are_joined(server: Server) -> None:
    answer = server.raw(head("GET /health HTTP/1.1", b"X: a\r\n b", b"Content-Length: 0, 0", b"Connection: close"))
    assert answer.startswith(b"HTTP/1.1 200")
    chunks = b"".join(b"%x;x=y\r\n%b\r\n" % (len(part), part) for part in (BODY[:9], BODY[9:])) + b"0\r\nT: x\r\n\r\n"
    answer = server.raw(head("POST /v1/completions HTTP/1.1", CHUNKED[:-2], b"Connection: close") + chunks)
    assert answer.startswith(b"HTTP/1.1 200")


def test_a_compressed_body_is_another_media_type(server: Server) -> None:
    import gzip

    packed = gzip.compress(BODY)
    for headers in ({"Content-Encoding": "gzip"}, {}):
        answer = server.client.post(server.url + "/v1/completions", content=packed, headers=headers)
        assert answer.status_code == 415 and answer.json()["error"]["code"] == "unsupported_media_type"
    plain = server.client.post(server.url + "/v1/completions", content=BODY, headers={"Content-Encoding": "identity"})
    assert plain.status_code == 200


def test_a_byte_order_mark_says_nothing(server: Server) -> None:
    answer = server.client.post(server.url + "/v1/completions", content=b"\xef\xbb\xbf" + BODY)
    assert answer.status_code == 200


def test_garbage_leaves_no_traceback(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Good requests with a byte changed, cut, doubled or followed by more, over connections that are kept."""
    chance = random.Random(9)
    good = [head() + BODY, head("POST /v1/completions HTTP/1.1", b"Content-Length: %d" % len(BODY)) + BODY]
    good += [*MALFORMED.values(), head("GET /health HTTP/1.1", b"Connection: Upgrade", b"Upgrade: websocket")]
    good += [
        head("CONNECT x:1 HTTP/1.1"),
        head("PRI * HTTP/2.0"),
        head("GET /health HTTP/1.1", b"Expect: 100-continue"),
    ]
    for _ in range(300):
        data = bytearray(chance.choice(good) + chance.choice([b"", chance.choice(good)]))
        for _ in range(chance.randrange(3)):
            data[chance.randrange(len(data))] = chance.choice(b"\r\n\0 :;09zG\xff")
        cut = chance.randrange(1, len(data) + 1)
        with socket.create_connection(server.address, timeout=10) as client, contextlib.suppress(OSError):
            client.settimeout(0.02)
            client.sendall(data[:cut])
            if chance.random() < 0.5:
                with contextlib.suppress(TimeoutError):
                    client.recv(1)
            if chance.random() < 0.5:
                client.shutdown(socket.SHUT_WR)
            elif chance.random() < 0.5:
                client.sendall(data[cut:])
    assert server.get("/health").status_code == 200
    time.sleep(0.3)
    assert not [record.getMessage() for record in caplog.records if record.exc_info]
