"""Three servers over real sockets: `live`, the command `tucka serve` with the real engine, `embedded`, the same with
the embedded default, and `start_fake`, the application in a thread of the tests' own process with a fake engine, for
faults and for settings of all kinds.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import GOLDEN
from tests.support.fake_engine import VOCAB, FakeEngine
from tests.support.servers import Server, make_base, start_command
from tucka_runtime.adapters.registry import AdapterRegistry
from tucka_runtime.adapters.remote import Source
from tucka_runtime.config import ServerConfig
from tucka_runtime.server.api.app import create_app
from tucka_runtime.server.http.server import HTTPServer, bind
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service.adapters import AdapterNames
from tucka_runtime.server.service.audit import AuditLog
from tucka_runtime.server.service.chat_template import ChatTemplate
from tucka_runtime.server.service.defaults import OwnDefaults
from tucka_runtime.server.service.resolver import Resolver
from tucka_runtime.server.service.service import Service
from tucka_runtime.server.service.sources import AdapterSources
from tucka_runtime.tokenizer import Tokenizer


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """What fails against a running server says what that server wrote last."""
    report = yield
    for server in getattr(item, "funcargs", {}).values():
        if report.failed and isinstance(server, Server) and server.log is not None:
            report.sections.append(("the server's last lines", "\n".join(server.log.read_text().splitlines()[-80:])))
    return report


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder below which the live server loads adapters."""
    return tmp_path_factory.mktemp("roots")


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory, roots: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("live")
    process, url = start_command(
        "--model", str(make_base(folder / "llama-tiny")),
        "--adapter", f"one={GOLDEN / 'llama-qv-r8k3t3' / 'adapter'}",
        "--adapter", f"two={GOLDEN / 'llama-all7-r4k2t2' / 'adapter'}",
        "--adapter-resident", "one",
        "--adapter-root", str(GOLDEN),
        "--adapter-root", str(roots),
        "--max-body-bytes", str(2**20),
        "--shutdown-timeout", "5",
        log=folder / "log",
    )  # fmt: skip
    server = Server(url, process.pid, log=folder / "log")
    yield server
    assert process.poll() is None, f"the server died:\n{(folder / 'log').read_text()}"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0, "Ctrl-C must end the server with status 0"
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """`tucka serve` as it is started without arguments: its address and its log."""
    log = tmp_path_factory.mktemp("embedded") / "log"
    process, url = start_command("--shutdown-timeout", "1", log=log)
    yield url, log
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    loaded = Tokenizer.load(GOLDEN / "bases" / "llama-tiny")
    assert loaded is not None
    return loaded


StartFake = Callable[..., Server]


@pytest.fixture
def start_fake(tokenizer: Tokenizer, tmp_path: Path) -> Iterator[StartFake]:
    with fake_servers(tokenizer, tmp_path) as start:
        yield start


@contextmanager
def fake_servers(tokenizer: Tokenizer, folder: Path) -> Iterator[StartFake]:
    """The same for as long as the context is entered; the servers' states lie in the folder."""
    running: list[tuple[HTTPServer, threading.Thread, AdapterRegistry]] = []

    def start(with_tokenizer: bool = True, template: str | None = None, **settings: object) -> Server:
        config = ServerConfig(**{"port": 0, "adapter_root": (str(GOLDEN),)} | settings)  # type: ignore[arg-type]
        engine, metrics = FakeEngine(), Metrics()
        registry = AdapterRegistry(folder / f"state{len(running)}")
        named = [Source.parse(text) for text in config.adapter_source]
        sources = AdapterSources(registry, [Path(root) for root in config.adapter_root], named, config.adapter_defaults)
        renders = ChatTemplate(template, {}) if template else None
        known = tokenizer if with_tokenizer else None
        own = OwnDefaults(config, known, renders, VOCAB) if config.adapter_defaults else None
        more = config.adapter_versions, config.served_model_name[1:], own
        adapters = AdapterNames(engine, registry, "base", metrics, sources, *more)  # type: ignore[arg-type]
        adapters.ready = True
        engine.on_restart = adapters.reload  # type: ignore[assignment]
        service = Service(
            config,
            "base",
            engine,
            known,
            renders,
            adapters,
            metrics,  # type: ignore[arg-type]
            audit=AuditLog(config.audit_log) if config.audit_log else None,
        )
        service.resolver = Resolver(adapters, config.adapter_resolve, service.audit)
        listener = bind(config.host, config.port)
        server = HTTPServer(create_app(service), config, listener)
        server.config.timeout_graceful_shutdown = 1
        loop = asyncio.new_event_loop()

        async def serve() -> None:
            await server.serve()
            if renders is not None:
                await renders.stop()
            await adapters.stop_rendering()

        thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)

        running.append((server, thread, registry))
        port = listener.getsockname()[1]
        return Server(f"http://127.0.0.1:{port}", os.getpid(), engine, loop, service)

    yield start
    for server, thread, registry in running:
        server.should_exit = True
        thread.join()
        registry.close()
