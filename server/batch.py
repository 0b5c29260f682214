"""`tucka batch`: requests from a file, through the very routes of the server, without a network.

The application answers in this process, its engine runs in its own as ever. So a line is read, refused and answered as
the same request over HTTP.
"""

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from tucka_runtime.bases import with_base
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.embedded import with_embedded_default
from tucka_runtime.errors import ConfigError
from tucka_runtime.progress import AnswerProgress
from tucka_runtime.server.api.app import create_app
from tucka_runtime.server.batch_file import AnswerFile, Item, answer, read_items
from tucka_runtime.server.event_loop import loop_factory
from tucka_runtime.server.parts import STOP_ENGINE_SECONDS, Parts
from tucka_runtime.server.service.service import Service
from tucka_runtime.server.settings_check import check_settings

log = logging.getLogger("tucka_runtime.server")

AGAIN_SECONDS = 0.2  # between tries of what the server could not take now
MOST_RESTARTS = 2  # of the engine that a request may meet: the next it has likely caused itself
QUIET = ("tucka_runtime.server.access", "tucka_runtime.server.requests")  # a line for every request
AGAIN = "The same command goes on where this one ended."


def batch(engine_config: EngineConfig, config: ServerConfig, source: Path, target: Path) -> int:
    """Answers every line of `source` that has no answer in `target` yet. Returns the exit status: 0 when every line has
    its answer or its error, 130 after SIGINT or SIGTERM.

    Raises ConfigError for the files and settings, ModelLoadError, and what loading adapters raises.
    """
    engine_config, config = with_embedded_default(engine_config, config)
    engine_config, config = with_base(engine_config, config)
    # Nobody watches these answers come, so prompts need not make way for them; and no client brings a key.
    engine_config = replace(engine_config, decode_stretch=0)
    config = replace(config, api_key=(), admin_key=(), api_key_file=None, audit_log=None)
    check_settings(engine_config, config)
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError("The two files are the same one: answers need a file of their own.")
    ids = [item.id for item in read_items(source)]  # before the model is loaded: the file may not be there
    output = AnswerFile(target)
    try:
        known = set(ids)
        if foreign := len(output.done - known):
            raise ConfigError(
                f"{target} has {foreign} answers to other lines than {source} has. Give another file, or remove it."
            )
        left = len(known) - len(output.done)
        if output.done:
            print(f"{len(output.done)} of {len(known)} are there already", file=sys.stderr)
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.WARNING)
        if not left:
            return 0
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_run(engine_config, config, source, output, left))
    finally:
        output.close()


async def _run(engine_config: EngineConfig, config: ServerConfig, source: Path, output: AnswerFile, left: int) -> int:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    parts = Parts(engine_config, config)
    try:
        service = await parts.start()
        items = (item for item in read_items(source) if item.id not in output.done)
        await FileBatch(service, output).answer_all(items, left)
        return 0
    except asyncio.CancelledError:
        print(f"stopped. {AGAIN}", file=sys.stderr)
        return 130
    finally:
        await parts.stop(STOP_ENGINE_SECONDS)


class FileBatch:
    """So many requests at once that the engine's batch is full, and no more: the rest of the file waits in it."""

    def __init__(self, service: Service, output: AnswerFile):
        self._service = service
        self._app: ASGIApp = create_app(service)
        self._output = output
        self._workers = 2 * service.engine.config.max_num_seqs
        self.errors = 0

    async def answer_all(self, items: Iterator[Item], total: int) -> None:
        """Writes an answer for every item, in the order in which they are ready. Raises ConfigError where it cannot."""
        with AnswerProgress(total, sys.stderr.isatty()) as bar:

            async def work() -> None:
                for item in items:
                    response = None if item.code else await self._respond(item)
                    self._output.write(answer(item, response))
                    bar.note(self._count(response), True)

            workers = [asyncio.create_task(work()) for _ in range(min(self._workers, total))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:  # where one could not write, or all were told to stop
                    worker.cancel()
        errors = f"; {self.errors} with an error" if self.errors else ""
        print(f"{total} lines in {bar.seconds:.1f} s, {bar.tokens / bar.seconds:.0f} tokens/s{errors}", file=sys.stderr)

    def _count(self, response: dict[str, Any] | None) -> int:
        """How many tokens an answer has; whether it is one is counted."""
        if response is None or response["status_code"] != 200:
            self.errors += 1
            return 0
        tokens: int = response["body"]["usage"].get("completion_tokens", 0)  # embeddings have none
        return tokens

    async def _respond(self, item: Item) -> dict[str, Any]:
        """What the route answers; asked again while the queue has no room, and when the engine has come back."""
        restarts = 0
        while True:
            status, request_id, body = await call(self._app, item.url, item.body)
            restarts += status == 503
            if status not in (429, 503) or restarts > MOST_RESTARTS:
                return {"status_code": status, "request_id": request_id, "body": body}
            await asyncio.sleep(AGAIN_SECONDS)
            while not self._service.ready:
                await asyncio.sleep(AGAIN_SECONDS)


async def call(app: ASGIApp, path: str, body: bytes) -> tuple[int, str, Any]:
    """One POST to the application, by ASGI: status, request id, and the answer's JSON."""
    sent: list[Message] = []
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if left:
            return left.pop()
        never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        return await never  # this client does not leave

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": None,
        "server": None,
        "state": {},
    }
    await app(scope, receive, send)
    start, *parts = sent
    names = dict(start["headers"])
    return start["status"], names[b"x-request-id"].decode(), json.loads(b"".join(part["body"] for part in parts))
