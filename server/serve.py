"""`tucka serve`: brings up engine, adapters and HTTP server, and takes them down again."""

import asyncio
import gc
import logging
import signal
import socket
import sys
from typing import TypeVar

from tucka_runtime.bases import with_base
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.embedded import EXAMPLE, FOLDER, with_embedded_default
from tucka_runtime.errors import TuckaError
from tucka_runtime.server.api.app import create_app
from tucka_runtime.server.event_loop import loop_factory
from tucka_runtime.server.http.server import BACKLOG, HTTPServer, allow_open_files, bind, check_open
from tucka_runtime.server.parts import STOP_ENGINE_SECONDS, Parts
from tucka_runtime.server.reread import reread
from tucka_runtime.server.scrapes import bind_for_scrapes, scraped
from tucka_runtime.server.service.service import Service
from tucka_runtime.server.settings_check import check_settings

log = logging.getLogger("tucka_runtime.server")

T = TypeVar("T")

NAMES_LOGGED = 20  # when the server starts
LAST_WORDS_SECONDS = 2  # for writing what requests end with when the engine was stopped under them


def serve(engine_config: EngineConfig, config: ServerConfig) -> int:
    """Runs until a signal. Returns the exit status: 0 after SIGINT or SIGTERM, 1 when it could not start."""
    try:
        engine_config, config = with_embedded_default(engine_config, config)
        engine_config, config = with_base(engine_config, config)
        check_settings(engine_config, config)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_run(engine_config, config))
    except TuckaError as error:
        log.error("%s", error.message)
        return 1


async def _run(engine_config: EngineConfig, config: ServerConfig) -> int:
    allow_open_files(config.max_connections)
    listener = bind(config.host, config.port)
    check_open(config, listener)
    scrapes = bind_for_scrapes(config)
    parts = Parts(engine_config, config)
    stopping, at_once = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if stopping.is_set():
            log.info("stopping at once")
            at_once.set()
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    hung_up = asyncio.Event()
    if config.api_key_file is not None or config.audit_log is not None:
        loop.add_signal_handler(signal.SIGHUP, hung_up.set)
    rereading: asyncio.Task[None] | None = None
    try:
        starting = asyncio.ensure_future(parts.start())
        await _unless(stopping, starting)
        if not starting.done():
            starting.cancel()
            return 0
        service = starting.result()
        server = HTTPServer(create_app(service), config, listener)
        listener.listen(BACKLOG)  # who reads that it is ready may connect
        async with scraped(service, scrapes):
            _greet(service, listener)
            gc.collect()
            gc.freeze()  # imported modules stay: no collection walks them again
            rereading = asyncio.create_task(reread(service, hung_up))
            await _serve_until_stopped(server, service, stopping, at_once)
        return 0
    finally:
        if rereading is not None:
            rereading.cancel()
        await parts.stop(STOP_ENGINE_SECONDS)
        for port in filter(None, (listener, scrapes)):
            port.close()


async def _serve_until_stopped(
    server: HTTPServer, service: Service, stopping: asyncio.Event, at_once: asyncio.Event
) -> None:
    """Serves. Once told to stop it is not ready any more, but takes requests for --drain-delay seconds; then lets
    running ones finish for --shutdown-timeout seconds. `at_once` cuts both short. What is left then ends with an error:
    the engine's end is theirs."""
    delay, timeout = service.config.drain_delay, service.config.shutdown_timeout
    serving = asyncio.ensure_future(server.serve())
    await _unless(stopping, serving)
    if not serving.done() and delay:
        log.info("stopping: not ready any more, requests are taken for %d s (once more to stop at once)", delay)
        service.draining = True
        server.drain()
        await _unless(at_once, serving, delay)
    if not serving.done():
        log.info("stopping: running requests get up to %d s (once more to stop at once)", timeout)
        server.should_exit = True
        await _unless(at_once, serving, timeout)
    if not serving.done():
        await service.engine.stop(0 if at_once.is_set() else STOP_ENGINE_SECONDS)
        await asyncio.wait((serving,), timeout=LAST_WORDS_SECONDS)
    if not serving.done():
        server.drop_connections()
        await asyncio.wait((serving,), timeout=LAST_WORDS_SECONDS)
        server.force_exit = True  # what is left then is cancelled with the loop
    await serving


async def _unless(event: asyncio.Event, work: "asyncio.Future[T]", timeout: float | None = None) -> None:
    """Waits for `work`, but no longer than until `event`, nor than `timeout` seconds."""
    happening = asyncio.ensure_future(event.wait())
    await asyncio.wait((work, happening), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    happening.cancel()


def _greet(service: Service, listener: socket.socket) -> None:
    info = service.info
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    names = [adapter.key.name for adapter in service.adapters.all()]
    log.info(
        "model %s: %s, %s on %s, %s kernels, %d threads, context %d, %d tokens of KV cache in %s",
        service.model_name,
        info.model_type,
        info.dtype,
        info.device,
        info.kernels,
        info.num_threads,
        info.max_model_len,
        info.kv_cache_tokens,
        info.kv_cache_dtype,
    )
    others = f" and {len(names) - NAMES_LOGGED} others" if len(names) > NAMES_LOGGED else ""
    log.info("adapters: %s%s", ", ".join(names[:NAMES_LOGGED]) or "none", others)
    if service.tokenizer is None:
        log.warning("the model's folder has no tokenizer: only prompts of token ids can be served")
    if service.keys.open and service.config.insecure:
        log.warning("anybody who reaches %s can use this server and manage its adapters (--insecure)", url)
    if not service.keys.open and not service.keys.count:
        log.warning("there is no key in %s yet: every request is refused", service.config.api_key_file)
    key = "" if service.keys.open else "-H 'Authorization: Bearer '$KEY "
    model, prompt = names[0] if names else service.model_name, "Hello"
    if f"{EXAMPLE[0]}={FOLDER / 'adapters' / EXAMPLE[0]}" in service.config.adapter:
        model, prompt = EXAMPLE
    if service.template:
        path, ask = "chat/completions", f'"messages": [{{"role": "user", "content": "{prompt}"}}], "temperature": 0'
    else:
        path, ask = "completions", f'"prompt": "{prompt}"' if service.tokenizer else '"prompt": [1, 2, 3]'
    if service.config.log_format == "json":
        log.info("ready at %s", url)
    else:
        log.info("ready at %s. Try:", url)
        print(
            f"  curl {url}/v1/{path} {key}-H 'Content-Type: application/json' -d '{{\"model\": \"{model}\", {ask}}}'",
            file=sys.stderr,
            flush=True,
        )
