"""`tucka serve`: brings up engine, adapters and HTTP server, and takes them down again."""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tucka_runtime.adapters.registry import AdapterRegistry
from tucka_runtime.adapters.remote import Source
from tucka_runtime.bases import with_base
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.embedded import EXAMPLE, FOLDER, with_embedded_default
from tucka_runtime.engine.client import EngineClient
from tucka_runtime.errors import ConfigError, InvalidRequestError, TuckaError
from tucka_runtime.names import check_name
from tucka_runtime.server.api.app import create_app
from tucka_runtime.server.http.key_file import read_key_file
from tucka_runtime.server.http.server import BACKLOG, HTTPServer, allow_open_files, bind, check_open
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.reread import reread
from tucka_runtime.server.scrapes import bind_for_scrapes, scraped
from tucka_runtime.server.service.adapters import AdapterNames
from tucka_runtime.server.service.audit import AuditLog
from tucka_runtime.server.service.chat_template import ChatTemplate
from tucka_runtime.server.service.declared import Declared, read_declaration
from tucka_runtime.server.service.defaults import OwnDefaults
from tucka_runtime.server.service.resolver import Resolver
from tucka_runtime.server.service.service import Service
from tucka_runtime.server.service.sources import AdapterSources
from tucka_runtime.server.service.traces import Traces
from tucka_runtime.tokenizer import Tokenizer

log = logging.getLogger("tucka_runtime.server")

T = TypeVar("T")

NAMES_LOGGED = 20  # when the server starts
STOP_ENGINE_SECONDS = 5
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


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's event loop where it is installed: `python -m tucka_runtime.server.bench_stream` shows what it saves."""
    try:
        import uvloop
    except ImportError:
        log.warning("uvloop is not installed here: asyncio's own event loop serves, which takes more of the processor")
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def check_settings(engine_config: EngineConfig, config: ServerConfig) -> None:
    """Raises ConfigError for what is wrong at first sight: the engine takes seconds until it finds out."""
    folder = Path(engine_config.model or "")
    if not os.path.isdir(folder):
        raise ConfigError(
            f"--model {folder} is no folder that can be read here. Give the folder of a Hugging Face model, its name "
            "there (org/name), or a GGUF file."
        )
    if not os.path.isfile(folder / "config.json"):
        raise ConfigError(f"--model {folder} has no config.json: give the folder of a Hugging Face model.")
    for file in (folder / "config.json", *folder.glob("*.safetensors")):
        if not os.access(file, os.R_OK):
            raise ConfigError(f"--model: {file} cannot be read by this user: chmod -R a+rX {folder} lets everybody.")
    for name in config.served_model_name:
        try:
            check_name(name)
        except InvalidRequestError as error:
            raise ConfigError(f"--served-model-name follows the rule of adapters' names: {error.message}") from None
    for root in config.adapter_root:
        if not os.path.isdir(root):
            raise ConfigError(f"--adapter-root {root} is no folder that can be read here.")
    if config.api_key_file is not None:
        read_key_file(config.api_key_file)
    if config.adapter_watch is not None and not os.path.isdir(config.adapter_watch):
        raise ConfigError(f"--adapter-watch {config.adapter_watch} is no folder that can be read here.")
    if config.adapters_file is not None:
        read_declaration(Path(config.adapters_file))
    _first_adapters(config)
    _named_sources(config)


def keep_compiled(state_dir: str | None) -> None:
    """Lets the engine's process, which inherits it, keep compiled kernels below the state folder: in a container they
    would be compiled at every start, for a minute or two on a GPU. What the operator has set stays."""
    if state_dir is not None:
        os.environ.setdefault("TRITON_CACHE_DIR", str(Path(state_dir).resolve() / "triton"))


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


class Parts:
    """All of a server but its HTTP: what `start` brings up, `stop` takes down, however far that came."""

    def __init__(self, engine_config: EngineConfig, config: ServerConfig):
        self._engine_config, self._config = engine_config, config
        keep_compiled(config.state_dir)
        self.engine = EngineClient(engine_config, config.log_format)
        self._registry: AdapterRegistry | None = None
        self._service: Service | None = None
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> Service:
        """The service with its model and adapters loaded. Raises ModelLoadError, ConfigError, TuckaError."""
        state = self._config.state_dir
        self._registry = await asyncio.to_thread(AdapterRegistry, Path(state) if state else None)
        self._service = await _start(self.engine, self._engine_config, self._config, self._registry)
        service, config = self._service, self._config
        declared = Declared(service.adapters, _path(config.adapter_watch), _path(config.adapters_file), service.audit)
        await declared.look(first=True)
        self._keeping = asyncio.create_task(declared.run())
        return self._service

    async def stop(self, timeout: int) -> None:
        """The engine gets `timeout` seconds to end, and none while it still loads: then it does not listen."""
        service = self._service
        if self._keeping is not None:
            self._keeping.cancel()
        await self.engine.stop(0 if service is None else timeout)
        if service is not None and service.template is not None:
            await service.template.stop()
        if service is not None:
            await service.adapters.stop_rendering()
        if service is not None and service.traces is not None:
            await asyncio.to_thread(service.traces.close)
        if service is not None:
            service.adapters.close()
        if service is not None and service.audit is not None:
            await asyncio.to_thread(service.audit.close)
        if self._registry is not None:
            self._registry.close()


async def _start(
    engine: EngineClient, engine_config: EngineConfig, config: ServerConfig, registry: AdapterRegistry
) -> Service:
    """The service with its model and adapters loaded. Raises ModelLoadError, ConfigError, TuckaError."""
    folder = Path(engine_config.model or "")
    audit = AuditLog(config.audit_log) if config.audit_log is not None else None
    log.info("loading %s ...", folder)
    traces = Traces.to(config.otlp_traces_endpoint) if config.otlp_traces_endpoint else None
    started, tokenizer = await asyncio.gather(engine.start(), asyncio.to_thread(Tokenizer.load, folder))
    name, *others = config.served_model_name or (folder.resolve().name,)
    metrics = Metrics(name, engine_config.adapter_slots, engine_config.block_size, config.vllm_metrics)
    metrics.watch_engine(lambda: engine.pid)
    roots, own = [Path(root) for root in config.adapter_root], config.adapter_defaults
    sources = AdapterSources(registry, roots, _named_sources(config), own)
    template = None
    if tokenizer is not None and tokenizer.chat_template:
        template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, tokenizer.tool_template)
        await template.warm_up()
    own_defaults = OwnDefaults(config, tokenizer, template, started.vocab_size) if own else None
    more = config.adapter_versions, others, own_defaults
    adapters = AdapterNames(engine, registry, name, metrics, sources, *more)
    service = Service(config, name, engine, tokenizer, template, adapters, metrics, traces, audit)
    service.resolver = Resolver(adapters, config.adapter_resolve)
    engine.on_step, engine.on_idle = metrics.on_step, metrics.on_idle
    engine.on_restart = adapters.reload
    await adapters.restore(started.fingerprint)
    for adapter_name, path in _first_adapters(config).items():
        try:
            keep = adapter_name in config.adapter_resident or None
            await adapters.load(adapter_name, path, inplace=True, durable=False, keep_resident=keep)
        except TuckaError as error:
            raise ConfigError(f"--adapter {adapter_name}: {error.message}") from None
    adapters.ready = True
    return service


def _path(setting: str | None) -> Path | None:
    return Path(setting) if setting else None


def _first_adapters(config: ServerConfig) -> dict[str, Path]:
    """The names and folders of --adapter. Raises ConfigError."""
    adapters: dict[str, Path] = {}
    for adapter in config.adapter:
        name, _, path = adapter.partition("=")
        if not name or not path:
            raise ConfigError("--adapter takes NAME=PATH: the name for requests and the adapter's folder.")
        if not os.path.isdir(path):
            raise ConfigError(f"--adapter {name}: {path} is no folder that can be read here.")
        if name in adapters:
            raise ConfigError(f"--adapter {name} is given twice: every adapter needs a name of its own.")
        adapters[name] = Path(path).resolve()
    if unknown := set(config.adapter_resident) - adapters.keys():
        raise ConfigError(f"--adapter-resident {min(unknown)}: there is no --adapter of that name.")
    return adapters


def _named_sources(config: ServerConfig) -> list[Source]:
    """Those of --adapter-source. Raises ConfigError."""
    sources = [Source.parse(text) for text in config.adapter_source]
    names = {source.name for source in sources}
    if len(names) < len(sources):
        raise ConfigError("--adapter-source has a name twice: every source needs one of its own.")
    if unknown := set(config.adapter_resolve) - names:
        raise ConfigError(f"--adapter-resolve {min(unknown)}: there is no --adapter-source of that name.")
    return sources


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
