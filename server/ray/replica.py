"""One server as a replica of Ray Serve: the engine's process is this actor's child, the routes are those of
`tucka serve`, and requests come through `respond` instead of a socket."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ray import serve
from starlette.types import Message

from tucka_runtime.bases import with_base
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.embedded import with_embedded_default
from tucka_runtime.errors import EngineDeadError
from tucka_runtime.logs import set_up_logging
from tucka_runtime.server.api.app import create_app
from tucka_runtime.server.parts import STOP_ENGINE_SECONDS, Parts
from tucka_runtime.server.ray.relay import Forwarded, answered
from tucka_runtime.server.settings_check import check_settings

REPLICA_HEADER = b"x-tucka-replica"
"""Of every answer: which replica gave it."""

PATIENCE_SECONDS = 60.0
"""For an engine that has died: it is started again here, sooner than Serve would start another replica."""


class Replica:
    """Serve calls the methods by their names."""

    async def __init__(self, engine_config: EngineConfig, config: ServerConfig):  # type: ignore[misc]
        """Loads the model and its adapters. Raises ModelLoadError, ConfigError, TuckaError."""
        set_up_logging(config.log_format, "server")
        engine_config, config = with_base(*with_embedded_default(engine_config, config))
        check_settings(engine_config, config)
        self._parts = Parts(engine_config, config)
        self._service = await self._parts.start()
        self._app = create_app(self._service)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._ready = time.monotonic()
        self._counted = self._service.metrics.generated, time.monotonic()

    async def respond(self, request: Forwarded) -> AsyncGenerator[list[Message], None]:
        """The messages of the answer, as they come. Ends the work where nobody asks for more."""
        async with aclosing(answered(self._app, request)) as answer:
            async for messages in answer:
                for message in messages:
                    if message["type"] == "http.response.start":
                        # Serve's proxy adds the request's id itself, which is the same.
                        headers = [header for header in message["headers"] if header[0] != b"x-request-id"]
                        message["headers"] = [*headers, (REPLICA_HEADER, self._name.encode())]
                yield messages

    async def scrape(self, request: Forwarded) -> tuple[str, list[Message]]:
        """The replica's name, and its answer to a GET of /metrics."""
        return self._name, [message async for messages in answered(self._app, request) for message in messages]

    async def check_health(self) -> None:
        """Raises EngineDeadError where the engine has not come back for long: Serve then starts another replica."""
        if self._service.ready:
            self._ready = time.monotonic()
        elif time.monotonic() - self._ready > PATIENCE_SECONDS:
            raise EngineDeadError("The engine has not come back.")

    async def record_routing_stats(self) -> dict[str, int]:
        """For `router.AdapterRouter`: the rank, which a replica that takes the place of another has from it."""
        return {"rank": serve.get_replica_context().rank.rank}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `scaling.LoadPolicy`. Tokens since the last call, by the second."""
        metrics, (count, at) = self._service.metrics, self._counted
        self._counted = metrics.generated, time.monotonic()
        tokens, seconds = self._counted[0] - count, self._counted[1] - at
        return {"waiting": metrics.waiting, "tokens_per_second": tokens / max(seconds, 1e-3)}

    async def __del__(self) -> None:
        """Serve awaits it when the last answer is given."""
        await self._parts.stop(STOP_ENGINE_SECONDS)
