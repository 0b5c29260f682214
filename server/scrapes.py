"""A port for scrapers and probes, without a key: what `--metrics-port` opens."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from tucka_runtime.config import ServerConfig
from tucka_runtime.server.api.app import create_metrics_app
from tucka_runtime.server.http.server import BACKLOG, HTTPServer, bind
from tucka_runtime.server.service.service import Service

log = logging.getLogger("tucka_runtime.server")

CONNECTIONS = 16
LAST_SCRAPE_SECONDS = 1


def bind_for_scrapes(config: ServerConfig) -> socket.socket | None:
    """The port, on the address of all others, if one is wanted. Raises ConfigError."""
    return None if config.metrics_port is None else bind(config.host, config.metrics_port, "--metrics-port")


@asynccontextmanager
async def scraped(service: Service, listener: socket.socket | None) -> AsyncIterator[None]:
    """Answers scrapes on the listener, if there is one, while the context is entered, draining included."""
    if listener is None:
        yield
        return
    config = replace(service.config, max_connections=CONNECTIONS)
    server = HTTPServer(create_metrics_app(service), config, listener)
    server.config.timeout_graceful_shutdown = LAST_SCRAPE_SECONDS
    listener.listen(BACKLOG)
    log.info("metrics without a key on port %d", listener.getsockname()[1])
    serving = asyncio.create_task(server.serve())
    try:
        yield
    finally:
        server.should_exit = True
        await serving
