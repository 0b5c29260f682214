"""Hostile and unlucky clients against a server of their own: `python -m tests.chaos.connections KIND --count N`.

Each kind returns its figures, and raises AssertionError where the server did not hold.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from tests.support.servers import Server, make_base, series, start_command

ASK = {"model": "llama", "prompt": "Hello", "max_tokens": 60, "ignore_eos": True, "stream": True}
Figures = dict[str, float]


def request(body: bytes, *headers: bytes) -> bytes:
    head = (b"POST /v1/completions HTTP/1.1", b"Host: x", b"Content-Length: %d" % len(body), *headers, b"", body)
    return b"\r\n".join(head)


class Chaos:
    """A server, its log, and a watch on its probe."""

    def __init__(self, server: Server, log: Path):
        self.server, self.log = server, log

    def said(self) -> str:
        return self.log.read_text()

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.server.pid}/fd"))

    @contextlib.contextmanager
    def probed(self, figures: Figures) -> Iterator[None]:
        """Asks /health by a new connection ten times a second, and leaves how often it failed and how long it took."""
        done = threading.Event()
        figures |= {"probes": 0, "probes_failed": 0, "slowest_probe_seconds": 0}

        def probe() -> None:
            while not done.wait(0.1):
                began = time.monotonic()
                figures["probes"] += 1
                try:
                    httpx.get(self.server.url + "/health", timeout=10).raise_for_status()
                except httpx.HTTPError:
                    figures["probes_failed"] += 1
                figures["slowest_probe_seconds"] = max(figures["slowest_probe_seconds"], time.monotonic() - began)

        thread = threading.Thread(target=probe)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        assert not figures["probes_failed"], figures


def never_readers(chaos: Chaos, count: int, seconds: float) -> Figures:
    """So many clients ask on and read nothing, on a server of so many connections. Others try for `seconds`."""
    figures: Figures = {"refused": 0, "served": 0, "reset": 0}
    body = json.dumps(ASK | {"max_tokens": 1, "stream": False}).encode()
    with contextlib.ExitStack() as stack, chaos.probed(figures):
        for _ in range(count):
            client = stack.enter_context(socket.create_connection(chaos.server.address))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    client.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            with socket.create_connection(chaos.server.address, timeout=30) as other:
                try:
                    other.sendall(request(body, b"Connection: close"))
                    kind = {b"200": "served", b"429": "refused"}.get(other.recv(4096)[9:12], "reset")
                except ConnectionResetError:
                    kind = "reset"
            figures[kind] += 1
            if kind == "served":
                figures.setdefault("first_served_after_seconds", time.monotonic() - began)
            time.sleep(0.1)
    assert figures["refused"] and not figures["reset"], figures
    return figures


def disconnects(chaos: Chaos, count: int, seconds: float) -> Figures:
    """So many clients leave: before their answer, in its middle, or in the middle of what they send."""
    chance, figures, files = random.Random(1), Figures(), chaos.files()
    with chaos.probed(figures):
        for _ in range(count):
            data = request(json.dumps(ASK | {"stream": chance.random() < 0.7}).encode())
            with socket.create_connection(chaos.server.address, timeout=30) as client:
                client.sendall(data[: len(data) if chance.random() < 0.9 else chance.randrange(1, len(data))])
                time.sleep(chance.random() * 0.03)
    began = time.monotonic()
    gauges = ("tucka_requests_running", "tucka_requests_waiting", "tucka_kv_blocks_used")
    while any(series(chaos.server)[name] for name in gauges) or chaos.files() > files + 1:
        assert time.monotonic() - began < 10, (series(chaos.server), chaos.files(), files)
        time.sleep(0.05)
    figures |= {"disconnects": count, "all_free_after_seconds": time.monotonic() - began}
    assert "Traceback" not in chaos.said()
    return figures


def malformed(chaos: Chaos, count: int, seconds: float) -> Figures:
    """So many requests with bytes changed, in chunks and not, cut, or followed by more."""
    chance, figures, before = random.Random(2), Figures(), len(chaos.said())
    body = json.dumps(ASK | {"max_tokens": 1}).encode()
    chunks = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
    good = [request(body), chunks % (len(body), body), request(body, b"Transfer-Encoding: chunked")]
    with chaos.probed(figures):
        for _ in range(count):
            data = bytearray(chance.choice(good) * chance.choice([1, 1, 2]))
            for _ in range(chance.randrange(1, 4)):
                data[chance.randrange(len(data))] = chance.choice(b"\r\n\0 :;09zG\xff")
            with socket.create_connection(chaos.server.address, timeout=30) as client, contextlib.suppress(OSError):
                client.settimeout(0.02)
                client.sendall(data[: chance.randrange(1, len(data) + 1)])
                client.recv(65536)
    said = chaos.said()
    figures |= {"requests": count, "log_bytes_each": (len(said) - before) / count}
    assert "Traceback" not in said, said[said.find("Traceback") :]
    assert figures["log_bytes_each"] < 500, figures
    return figures


def descriptors(chaos: Chaos, count: int, seconds: float) -> Figures:
    """The server may open three files more, and so many clients connect, for `seconds`."""
    pid, before = chaos.server.pid, len(chaos.said())
    limits = resource.prlimit(
        pid, resource.RLIMIT_NOFILE, (chaos.files() + 3, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1])
    )
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection(chaos.server.address, timeout=30))
        time.sleep(seconds)
        said = chaos.said()[before:]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert httpx.get(chaos.server.url + "/health", timeout=30).status_code == 200
    figures: Figures = {"seconds": seconds, "lines": said.count("cannot be accepted"), "log_bytes": len(said)}
    assert 1 <= figures["lines"] <= 1 + seconds / 60 and "Traceback" not in said, said[:2000]
    return figures


KINDS: dict[str, Callable[[Chaos, int, float], Figures]] = {
    kind.__name__: kind for kind in (never_readers, disconnects, malformed, descriptors)
}


def run(kind: str, count: int, seconds: float) -> Figures:
    """One kind against a new server."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        limit = ("--max-connections", str(count)) if kind == "never_readers" else ()
        process, url = start_command("--model", str(make_base(Path(folder) / "llama")), *limit, log=log)
        try:
            return KINDS[kind](Chaos(Server(url, process.pid), log), count, seconds)
        finally:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)
            process.wait(60)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=20, help="clients, or requests (default: 20)")
    parser.add_argument("--seconds", type=float, default=60, help="how long, where that is a question (default: 60)")
    flags = parser.parse_args()
    print(flags.kind, {name: round(value, 3) for name, value in run(flags.kind, flags.count, flags.seconds).items()})
