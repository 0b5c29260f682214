"""Everything that the routes share: the engine, the tokenizer, the names, the metrics."""

import asyncio
import time
from dataclasses import dataclass, field

from tucka_runtime.config import ServerConfig
from tucka_runtime.engine.client import EngineClient
from tucka_runtime.errors import ContextLengthError, EngineDeadError, InvalidRequestError
from tucka_runtime.messages import EngineInfo, RouteScope
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service.adapters import AdapterNames, Lease, LoadedAdapter
from tucka_runtime.server.service.chat_template import ChatTemplate
from tucka_runtime.server.service.request_log import Sinks
from tucka_runtime.server.service.traces import Traces
from tucka_runtime.tokenizer import Tokenizer


@dataclass
class Service:
    """One server. `tokenizer` and `template` are None where the model's folder has none."""

    config: ServerConfig
    model_name: str
    engine: EngineClient
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    adapters: AdapterNames
    metrics: Metrics
    traces: Traces | None = None
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def ready(self) -> bool:
        return self.engine.ready and self.adapters.ready

    @property
    def info(self) -> EngineInfo:
        """The model as it is served. Raises EngineDeadError before the engine came up for the first time."""
        if self.engine.info is None:
            raise EngineDeadError("The model is still being loaded. Try again later.")
        return self.engine.info

    @property
    def sinks(self) -> Sinks:
        """Who is told of requests."""
        return Sinks(self.metrics, self.traces)

    def resolve(self, model: str) -> Lease:
        """A lease on the adapter that `model` names, or on the base. Raises ModelNotFoundError, EngineDeadError."""
        lease = Lease() if model == self.model_name else self.adapters.lease(model)
        if not self.ready:
            lease.release()
            raise EngineDeadError("The engine is restarting. Try again later.")
        return lease

    def scope(self, adapter: LoadedAdapter | None, asked: RouteScope | None) -> RouteScope | None:
        """The route scope of a request: what it asks for, what its adapter was trained for, or the server's own; None
        for the base and for adapters without a router. Raises InvalidRequestError where the adapter's route is pinned
        and the request asks for another."""
        if adapter is None or adapter.info.kind != "tucka":
            return None
        own = adapter.info.scope
        if own == RouteScope.PINNED and asked is not None:
            raise InvalidRequestError("This adapter was loaded with a pinned route. Leave `route` out.", "route")
        return RouteScope(asked or own or self.config.route)

    def text_tokenizer(self, param: str) -> Tokenizer:
        """The tokenizer. Raises InvalidRequestError if there is none."""
        if self.tokenizer is None:
            raise InvalidRequestError(
                "The base model's folder has no tokenizer, so only prompts of token ids can be served. Send token ids "
                "to /v1/completions, or start the server with a folder that has tokenizer files.",
                param,
            )
        return self.tokenizer

    async def encode(self, texts: list[str], add_special_tokens: bool, param: str) -> list[list[int]]:
        """Token ids, made off the event loop. A text that cannot fit the context is refused without being read."""
        tokenizer = self.text_tokenizer(param)
        if any(len(text) > self.info.max_model_len * tokenizer.longest_token for text in texts):
            raise ContextLengthError(
                f"The prompt has {max(map(len, texts))} characters, more than the context of "
                f"{self.info.max_model_len} tokens can hold. Shorten it.",
                param,
            )
        encoded = await asyncio.to_thread(lambda: [tokenizer.encode(text, add_special_tokens) for text in texts])
        if max((max(ids, default=0) for ids in encoded), default=0) >= self.info.vocab_size:
            raise InvalidRequestError(
                f"The tokenizer makes a token of this text that the model does not have: its ids end at "
                f"{self.info.vocab_size - 1}. Leave that text out; it is often a special token added to the tokenizer.",
                param,
            )
        return encoded

    async def render_chat(self, messages: list[dict[str, str]]) -> str:
        """The messages as one prompt, by the model's chat template. Raises InvalidRequestError."""
        self.text_tokenizer("messages")
        if self.template is None:
            raise InvalidRequestError(
                "The base model has no chat template. Use /v1/completions with a prompt of your own, or start the "
                "server with a folder whose tokenizer has a chat template.",
                "messages",
            )
        return await self.template.render(messages)
