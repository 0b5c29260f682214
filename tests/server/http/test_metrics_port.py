"""`--metrics-port`: figures and probes without a key, beside a server that wants one."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest

from tests.support.servers import Server
from tucka_runtime.config import ServerConfig
from tucka_runtime.errors import ConfigError
from tucka_runtime.server.scrapes import bind_for_scrapes, scraped


@pytest.fixture
def scrapes(start_fake) -> Iterator[tuple[Server, str]]:
    """A server with keys, and the address of its metrics port."""
    server: Server = start_fake(api_key=("secret",), metrics_port=0)
    assert server.service is not None
    listener = bind_for_scrapes(server.service.config)
    assert listener is not None
    port, ready, stopping = listener.getsockname()[1], threading.Event(), threading.Event()

    async def serve() -> None:
        assert server.service is not None
        async with scraped(server.service, listener):
            ready.set()
            await asyncio.to_thread(stopping.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(30)
    yield server, f"http://127.0.0.1:{port}"
    stopping.set()
    thread.join(30)
    assert not thread.is_alive()


def test_it_answers_scrapes_and_probes_and_nothing_else(scrapes: tuple[Server, str]) -> None:
    server, url = scrapes
    assert server.get("/metrics").status_code == 401
    scrape = httpx.get(url + "/metrics")
    assert scrape.status_code == 200 and "tucka_engine_up 1" in scrape.text and "vllm:lora_requests_info" in scrape.text
    assert httpx.get(url + "/health").json() == {"status": "ok"}
    assert httpx.get(url + "/ready").json() == {"status": "ready"}
    for method, path in (
        ("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/v1/adapters"), ("GET", "/"), ("GET", "/version"),
        ("POST", "/v1/load_lora_adapter"), ("DELETE", "/v1/adapters/one"), ("GET", "/openapi.json"),
        ("GET", "/metrics/"),
    ):  # fmt: skip
        assert httpx.request(method, url + path).status_code == 404, path
    assert httpx.post(url + "/metrics").status_code == 405
    assert server.service is not None
    server.service.draining = True
    assert httpx.get(url + "/ready").status_code == 503 and httpx.get(url + "/metrics").status_code == 200


def test_a_taken_port_is_said_by_its_own_flag() -> None:
    assert bind_for_scrapes(ServerConfig()) is None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*another --host or --metrics-port"):
            bind_for_scrapes(ServerConfig(metrics_port=port))
    with pytest.raises(ConfigError, match="metrics_port is port"):
        ServerConfig(port=8000, metrics_port=8000)
    with pytest.raises(ConfigError, match="metrics_port must be between"):
        ServerConfig(metrics_port=70000)
