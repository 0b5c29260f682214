"""Servers over real sockets, and how to talk to them below HTTP."""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.support import GOLDEN
from tests.support.fake_engine import FakeEngine
from tucka_runtime.server.service.service import Service

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass
class Server:
    """A running server. `engine` is the fake one, where it is, `loop` the one it runs in, `service` what it serves,
    `log` the file that a command writes its lines to."""

    url: str
    pid: int
    engine: FakeEngine | None = None
    loop: asyncio.AbstractEventLoop | None = None
    service: Service | None = None
    log: Path | None = None
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60))

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def post(self, path: str, body: object, **kwargs: object) -> httpx.Response:
        return self.client.post(self.url + path, json=body, **kwargs)  # type: ignore[arg-type]

    def get(self, path: str, **kwargs: object) -> httpx.Response:
        return self.client.get(self.url + path, **kwargs)  # type: ignore[arg-type]

    def raw(self, data: bytes, timeout: float = 15.0) -> bytes:
        """What the server answers to these bytes until it closes the connection."""
        with socket.create_connection(self.address, timeout=timeout) as connection:
            connection.sendall(data)
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


def make_base(folder: Path) -> Path:
    """The golden Llama with a chat template."""
    shutil.copytree(GOLDEN / "bases" / "llama-tiny", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


def start_command(*arguments: str, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """`tucka serve` on a free port, and its address, once it is ready."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TUCKA_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tucka_runtime.cli.main", "serve", "--port", "0", *arguments],
            stderr=file,
            stdout=file,
            env=environment,
        )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"ready at (http://[\w.]+:\d+)\b", log.read_text()):
            return process, found[1]
        time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"the server did not start:\n{log.read_text()}")


def engine_of(server: int) -> int:
    """The process id of the engine of a server."""
    for child in Path(f"/proc/{server}/task/{server}/children").read_text().split():
        if b"tucka_runtime.engine.process" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise LookupError("the server has no engine")


ASK = {"prompt": "hello", "max_tokens": 3, "temperature": 0}


def series(server: Server) -> dict[str, float]:
    """Values by `name{labels}`, both as the server writes them."""
    lines = server.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
