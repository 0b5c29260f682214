"""All of a server but its HTTP: also behind `tucka batch` and in a replica of Ray's."""

import asyncio
import logging
import os
from pathlib import Path

from tucka_runtime.adapters.registry import AdapterRegistry
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.engine.client import EngineClient
from tucka_runtime.errors import ConfigError, TuckaError
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service.adapters import AdapterNames
from tucka_runtime.server.service.audit import AuditLog
from tucka_runtime.server.service.chat_template import ChatTemplate
from tucka_runtime.server.service.declared import Declared
from tucka_runtime.server.service.defaults import OwnDefaults
from tucka_runtime.server.service.resolver import Resolver
from tucka_runtime.server.service.service import Service
from tucka_runtime.server.service.sources import AdapterSources
from tucka_runtime.server.service.traces import Traces
from tucka_runtime.server.settings_check import first_adapters, named_sources
from tucka_runtime.tokenizer import Tokenizer

log = logging.getLogger("tucka_runtime.server")

STOP_ENGINE_SECONDS = 5


class Parts:
    """What `start` brings up, `stop` takes down, however far that came."""

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
    sources = AdapterSources(registry, roots, named_sources(config), own)
    template = None
    if tokenizer is not None and tokenizer.chat_template:
        template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, tokenizer.tool_template)
        await template.warm_up()
    own_defaults = OwnDefaults(config, tokenizer, template, started.vocab_size) if own else None
    more = config.adapter_versions, others, own_defaults
    adapters = AdapterNames(engine, registry, name, metrics, sources, *more)
    service = Service(config, name, engine, tokenizer, template, adapters, metrics, traces, audit)
    service.resolver = Resolver(adapters, config.adapter_resolve, audit)
    engine.on_step, engine.on_idle = metrics.on_step, metrics.on_idle
    engine.on_restart = adapters.reload
    await adapters.restore(started.fingerprint)
    for adapter_name, path in first_adapters(config).items():
        try:
            keep = adapter_name in config.adapter_resident or None
            await adapters.load(adapter_name, path, inplace=True, durable=False, keep_resident=keep)
        except TuckaError as error:
            raise ConfigError(f"--adapter {adapter_name}: {error.message}") from None
    adapters.ready = True
    return service


def _path(setting: str | None) -> Path | None:
    return Path(setting) if setting else None


def keep_compiled(state_dir: str | None) -> None:
    """Lets the engine's process, which inherits it, keep compiled kernels below the state folder: in a container they
    would be compiled at every start, for a minute or two on a GPU. What the operator has set stays."""
    if state_dir is not None:
        os.environ.setdefault("TRITON_CACHE_DIR", str(Path(state_dir).resolve() / "triton"))
