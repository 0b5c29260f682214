"""Everything that the routes share: the engine, the tokenizer, the names, the metrics."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tucka_runtime.config import ServerConfig
from tucka_runtime.engine.client import EngineClient
from tucka_runtime.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
    StorageError,
)
from tucka_runtime.messages import EngineInfo, RouteScope
from tucka_runtime.server.http.access import Access, Keys
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service.adapters import AdapterNames
from tucka_runtime.server.service.audit import AuditLog
from tucka_runtime.server.service.chat_template import ChatTemplate, Rendering
from tucka_runtime.server.service.defaults import Defaults
from tucka_runtime.server.service.grammar_cache import GrammarCache
from tucka_runtime.server.service.leases import Combination, Lease, LoadedAdapter, Served
from tucka_runtime.server.service.request_log import Sinks
from tucka_runtime.server.service.resolver import Resolver
from tucka_runtime.server.service.traces import Traces
from tucka_runtime.server.service.truncation import Truncation
from tucka_runtime.tokenizer import Tokenizer, unshielded

Weight = tuple[str, float]
"""The name of an adapter in a combination, and what its change is multiplied with."""


@dataclass
class Service:
    """One server. `tokenizer` and `template` are None where the model's folder has none. While `draining` it serves,
    and says that it is not ready."""

    config: ServerConfig
    model_name: str
    engine: EngineClient
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    adapters: AdapterNames
    metrics: Metrics
    traces: Traces | None = None
    audit: AuditLog | None = None
    resolver: Resolver | None = None
    draining: bool = False
    grammars: GrammarCache = field(default_factory=GrammarCache)
    started: int = field(default_factory=lambda: int(time.time()))
    keys: Keys = field(init=False)

    def __post_init__(self) -> None:
        """Reads the key file. Raises ConfigError."""
        self.keys = Keys(self.config, self.metrics.keys)

    @property
    def ready(self) -> bool:
        return self.engine.ready and self.adapters.ready

    @property
    def info(self) -> EngineInfo:
        """The model as it is served. Raises EngineDeadError before the engine came up for the first time."""
        if self.engine.info is None:
            raise EngineDeadError("The model is still being loaded. Try again later.")
        return self.engine.info

    def vocab_size(self, adapter: Served | None) -> int:
        """How many tokens an adapter has, or the base: their ids are smaller."""
        return (adapter.vocab_size if adapter is not None else None) or self.info.vocab_size

    @property
    def sinks(self) -> Sinks:
        """Who is told of requests."""
        return Sinks(self.metrics, self.traces)

    async def resolve(
        self, model: str, access: Access, user: str | None = None, weighted: Sequence[Weight] | None = None
    ) -> Lease:
        """A lease on the adapter that `model` names for who asks, on what is combined of `weighted`, or on the base.
        Where a name is an alias, all requests of one `user`, or else of one key, get the same. Raises what `find`
        does."""
        adapter = await self.find(model, access, user, weighted)
        return Lease() if adapter is None else self.adapters.lease(adapter)

    async def find(
        self, model: str, access: Access, user: str | None = None, weighted: Sequence[Weight] | None = None
    ) -> Served | None:
        """The adapter of a lease by `resolve`; None is the base. Raises ModelNotFoundError, EngineDeadError while
        nothing can be served, InvalidRequestError for what cannot be combined, and what a lookup in the sources raises
        (`Resolver.look_up`)."""
        if weighted is None:
            await self._look_up(model, access)
            return self._served(model, access, user)
        for name, _ in weighted:
            await self._look_up(name, access)
        return self._combination(model, weighted, access, user)  # from here on nothing can be unloaded in between

    async def _look_up(self, model: str, access: Access) -> None:
        if self.resolver is not None and self.ready and access.sees(model):
            await self.resolver.look_up(model)

    def named(self, model: str, access: Access, user: str | None) -> LoadedAdapter | None:
        """The adapter that is called so, for who asks; None is the base. Raises ModelNotFoundError, StorageError."""
        if model in self.adapters.base_names and access.sees(model):
            return None
        who = f"user:{user}" if user else f"key:{access.name}" if access.name else None
        return self.adapters.asked(model, access.sees, who)

    def _served(self, model: str, access: Access, user: str | None) -> LoadedAdapter | None:
        adapter = self.named(model, access, user)
        if not self.ready:
            raise EngineDeadError("The engine is restarting. Try again later.")
        return adapter

    def _combination(
        self, model: str, weighted: Sequence[Weight], access: Access, user: str | None
    ) -> LoadedAdapter | Combination:
        if model not in self.adapters.base_names:
            raise InvalidRequestError(
                "With `adapters`, `model` has to be the name of the base model, to which they are added. Name every "
                "adapter in `adapters`, or leave that out.",
                "model",
            )
        parts = []
        for i, (name, weight) in enumerate(weighted):
            param = f"adapters[{i}].name"
            try:
                adapter = self._served(name, access, user)
            except (ModelNotFoundError, StorageError) as error:
                raise type(error)(f"`{param}`: {error.message}", param) from None
            if adapter is None:
                raise InvalidRequestError(f"`{param}` is the base model, which is there anyway. Leave it out.", param)
            parts.append((adapter, weight))
        if len(parts) == 1 and parts[0][1] == 1:
            return parts[0][0]
        return self.adapters.combinations.of(parts)

    def scope(self, adapter: Served | None, asked: RouteScope | None) -> RouteScope | None:
        """The route scope of a request: what it asks for, what its adapter was trained for (of a combination all of
        them), or the server's own; None for the base and for adapters without a router. Raises InvalidRequestError
        where the adapter's route is pinned and the request asks for another."""
        scopes = set() if adapter is None else {one.info.scope for one in adapter.routed}
        if not scopes:
            return None
        own = scopes.pop() if len(scopes) == 1 else None
        if own == RouteScope.PINNED and asked is not None:
            raise InvalidRequestError("This adapter was loaded with a pinned route. Leave `route` out.", "route")
        return RouteScope(asked or own or self.config.route)

    async def encode(
        self,
        defaults: Defaults,
        texts: list[str],
        add_special_tokens: bool,
        param: str,
        vocab_size: int,
        split_special_tokens: bool = False,
        truncation: Truncation | None = None,
    ) -> list[list[int]]:
        """Token ids below `vocab_size`, made off the event loop, cut by `truncation`. A text that does not fit the
        context is refused, without being read where its length says so; one that is to be cut is not read where it
        surely will be."""
        tokenizer, context = defaults.text_tokenizer(param), self.info.max_model_len
        readable = context * tokenizer.longest_token
        if truncation is not None:
            texts = [truncation.text(text, readable) for text in texts]
        longest = max(len(unshielded(text)) for text in texts)
        if longest > readable:
            raise ContextLengthError.too_long(context, f"{longest} characters", param)

        def encode(text: str) -> list[int]:
            ids = tokenizer.encode(text, add_special_tokens, split_special_tokens)
            if truncation is None:
                return ids
            return truncation.ids(ids, tokenizer.num_start(ids) if add_special_tokens else 0)

        encoded = await asyncio.to_thread(lambda: [encode(text) for text in texts])
        if (most := max(map(len, encoded))) > context:
            raise ContextLengthError.too_long(context, f"{most} tokens", param)
        if max((max(ids, default=0) for ids in encoded), default=0) >= vocab_size:
            raise InvalidRequestError(
                f"The tokenizer makes a token of this text that the model does not have: its ids end at "
                f"{vocab_size - 1}. Leave that text out; it is often a special token added to the tokenizer.",
                param,
            )
        return encoded

    async def defaults(self, adapter: Served | None) -> Defaults:
        """What requests to an adapter, or to the base, get that leave it unset. Raises StorageError for an adapter
        whose files are nowhere any more."""
        return await self.adapters.defaults(adapter) or self.base_defaults

    @cached_property
    def base_defaults(self) -> Defaults:
        """Those of requests to the base."""
        return Defaults.of(self.tokenizer, self.template, self.config)

    async def render_chat(
        self, defaults: Defaults, messages: list[dict[str, Any]], rendering: Rendering, param: str
    ) -> str:
        """The messages as one prompt, in which what they say of special tokens is marked (`Tokenizer.shield`). Raises
        InvalidRequestError."""
        tokenizer, template = defaults.text_tokenizer(param), defaults.chat_template(param)

        def shielded() -> tuple[list[dict[str, Any]], Rendering]:
            tools, variables = tokenizer.shield(rendering.tools), tokenizer.shield(rendering.variables)
            return tokenizer.shield(messages), replace(rendering, tools=tools, variables=variables)

        return await template.render(*await asyncio.to_thread(shielded), param)
