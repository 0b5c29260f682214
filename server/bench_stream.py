"""What streaming costs the API's process: `python -m tucka_runtime.server.bench_stream [--streams 8,32]`.

Starts `tucka serve` with the embedded default, has some clients stream answers all at once, short ones and long ones,
and reads the CPU time of the server's process alone (/proc/PID/stat, user and system, all of its threads; the engine is
another process). Per token is the slope between the two lengths, per request what is left at none; medians of the
rounds, which alternate. The client counts events, and looks for them 20 times a second: it takes next to nothing of
the cores, and no write has to wake it, which the kernel would charge to the server, as it would not with clients
elsewhere.
"""

import argparse
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tucka_runtime.children import python

START_SECONDS = 120
POLL_SECONDS = 0.05
TICKS = os.sysconf("SC_CLK_TCK")


def main(given: list[str] | None = None) -> None:
    flags = _arguments(given)
    with _server(flags.server_argument) as (pid, address):
        print(f"{'streams':>8}  {'us/token':>9}  {'ms/request':>10}  {'tokens/s':>9}  {'events/token':>12}")
        for streams in map(int, flags.streams.split(",")):
            bodies = [_body(flags, models[i % len(models)]) for i in range(streams)] if (models := flags.models) else []
            slopes, requests, speeds, events = [], [], [], []
            for _ in range(flags.rounds + 1):  # the first warms up
                short, _, _ = _run(pid, address, flags.path, bodies, flags.short)
                cpu, seconds, seen = _run(pid, address, flags.path, bodies, flags.long)
                slopes.append((cpu - short) / (streams * (flags.long - flags.short)))
                requests.append((short - slopes[-1] * streams * flags.short) / streams)
                speeds.append(streams * flags.long / seconds)
                events.append(seen / (streams * flags.long))
            token, request, speed, event = (statistics.median(of[1:]) for of in (slopes, requests, speeds, events))
            print(f"{streams:8d}  {1e6 * token:9.1f}  {1e3 * request:10.2f}  {speed:9.0f}  {event:12.2f}", flush=True)


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tucka_runtime.server.bench_stream", description="What streaming costs the API's process."
    )
    parser.add_argument("--streams", default="8,32", help="numbers of streams at once (default: 8,32)")
    parser.add_argument("--models", nargs="+", default=["base"], help="what they ask for in turn (default: base)")
    parser.add_argument("--path", default="/v1/completions", help="/v1/completions or /v1/chat/completions")
    parser.add_argument("--short", type=int, default=64, help="tokens of a short answer (default: 64)")
    parser.add_argument("--long", type=int, default=1024, help="tokens of a long one (default: 1024)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (default: 3)")
    parser.add_argument("--fields", type=json.loads, default={}, help="further fields of every body, as JSON")
    parser.add_argument("server_argument", nargs="*", help="arguments of `tucka serve`, after --")
    return parser.parse_args(given)


def _body(flags: argparse.Namespace, model: str) -> dict[str, object]:
    chat = "chat" in flags.path
    asked = {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Hello"}
    return {"model": model, "stream": True, "ignore_eos": True, "temperature": 0, **asked, **flags.fields}


@contextlib.contextmanager
def _server(arguments: list[str]) -> Iterator[tuple[int, tuple[str, int]]]:
    """The process id and the address of a server that is ready."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            command = python("-m", "tucka_runtime.cli.main", "serve", "--port", "0", *arguments)
            process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + START_SECONDS
            while (found := re.search(r"ready at http://([\d.]+):(\d+)", log.read_text())) is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"the server did not start:\n{log.read_text()}")
                time.sleep(0.1)
            yield process.pid, (found[1], int(found[2]))
        finally:
            process.terminate()
            process.wait()


def _run(
    pid: int, address: tuple[str, int], path: str, bodies: list[dict[str, object]], tokens: int
) -> tuple[float, float, int]:
    """Streams all answers at once. Returns the server's CPU seconds, the clock's, and how many events came."""
    begin, before = time.monotonic(), _cpu_seconds(pid)
    reading = [_ask(address, path, body | {"max_tokens": tokens}) for body in bodies]
    events = ended = 0
    while reading:
        time.sleep(POLL_SECONDS)
        for connection in list(reading):
            with contextlib.suppress(BlockingIOError):
                while received := connection.recv(1 << 16):
                    events += received.count(b"data: {")
                    ended += received.count(b"data: [DONE]")
                connection.close()
                reading.remove(connection)
    if ended != len(bodies):
        sys.exit(f"{len(bodies) - ended} of {len(bodies)} streams did not end as they should")
    return _cpu_seconds(pid) - before, time.monotonic() - begin, events


def _ask(address: tuple[str, int], path: str, body: dict[str, object]) -> socket.socket:
    data = json.dumps(body).encode()
    lines = f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(data)}"
    connection = socket.create_connection(address)
    connection.sendall("\r\n".join((*lines, "\r\n")).encode() + data)
    connection.setblocking(False)
    return connection


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


if __name__ == "__main__":
    main()
