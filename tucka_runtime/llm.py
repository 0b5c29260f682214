"""The engine in this process, offline: prompts in, answers out, every prompt with the adapter that it names.

from tucka_runtime import LLM, SamplingParams

llm = LLM("/models/llama", adapters={"law": "/adapters/law"})
for output in llm.generate(["Once", "Whereas"], adapter=[None, "law"], sampling=SamplingParams(max_tokens=32)):
    print(output.outputs[0].text)

Several adapters at once are a list as requests have it: `adapter=[{"name": "law", "weight": 0.7}, {"name": "tone"}]`.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from tucka_runtime.bases import find_base
from tucka_runtime.config import EngineConfig
from tucka_runtime.engine import environment
from tucka_runtime.errors import ContextLengthError, InvalidRequestError
from tucka_runtime.llm_adapters import Adapters, OfflineAdapters, Parts, is_weighted
from tucka_runtime.messages import (
    AdapterInfo,
    FinishReason,
    Request,
    Route,
    RouteReport,
    RouteScope,
    SamplingParams,
    SequenceOutput,
    Timing,
    TokenLogprob,
)
from tucka_runtime.progress import AnswerProgress
from tucka_runtime.server.service.stops import stop_table
from tucka_runtime.server.service.text import SequenceText, stopping
from tucka_runtime.tokenizer import Tokenizer

log = logging.getLogger(__name__)

T = TypeVar("T")
Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclass
class CompletionOutput:
    """One answer. `text` ends before a stop string, `token_ids` with the last token that the engine made."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    route: RouteReport | None = None
    timing: Timing | None = None


@dataclass
class RequestOutput:
    """One prompt's answers. `prompt_logprobs` are there if they were asked for: None for the first token."""

    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = 0


class LLM:
    """One base model and its adapters.

    Raises ConfigError for wrong settings, ModelLoadError if the model cannot be served, AdapterError for an adapter.
    """

    def __init__(
        self, model: str | Path | None = None, adapters: Mapping[str, str | Path] | None = None, **settings: Any
    ):
        """`model` is a folder, a GGUF file or `org/name` of the Hub's cache, None the embedded one; `adapters` are
        folders by name; `settings` are EngineConfig's fields."""
        environment.prepare()
        from tucka_runtime.engine.engine import Engine

        folder, _ = find_base(model, settings.get("dtype", "auto"), say=log.info)
        self.engine = Engine(EngineConfig(**{"model": str(folder), "decode_stretch": 0, **settings}))
        self.tokenizer = Tokenizer.load(folder)
        self._named = OfflineAdapters(self.engine)
        self._numbers = itertools.count()
        for name, path in (adapters or {}).items():
            self.load_adapter(name, path)

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """What is loaded, by name."""
        return self._named.infos

    def load_adapter(self, name: str, path: str | Path, pinned: Route | None = None) -> AdapterInfo:
        """Makes a name stand for the adapter in a folder, instead of what it stood for. Raises AdapterError."""
        return self._named.load(name, Path(path), pinned)

    def unload_adapter(self, name: str) -> None:
        """Forgets a name. An unknown one is nothing to do."""
        self._named.unload(name)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: Adapters | Sequence[Adapters] = None,
        route: RouteScope | str | None = None,
        n: int = 1,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Continues prompts, texts or token ids, all at once; the outputs come in their order.

        `sampling` and `adapter` (a name, `bank/member`, None for the base, or several with weights, as
        `[{"name": "law", "weight": 0.7}, {"name": "tone", "weight": 0.3}]`) are one for all, or one each. Such a list
        takes a slot while calls ask for it. `route` is the route scope: by default what the adapter was trained for,
        else "batch". `progress` shows on stderr how many are done, and tokens per second. Raises InvalidRequestError
        for a prompt that cannot be read or does not fit, or adapters that cannot be combined, ModelNotFoundError for an
        unknown adapter."""
        listed: list[Any] = [prompts] if isinstance(prompts, str) or _is_ids(prompts) else list(prompts)
        ids = [self._ids(prompt, True) for prompt in listed]
        return self._run(ids, sampling, adapter, route, n, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: Adapters | Sequence[Adapters] = None,
        route: RouteScope | str | None = None,
        n: int = 1,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """The assistant's next turn in one conversation, or in each of several; else as `generate`."""
        listed: list[Any] = [messages] if isinstance(messages[0], Mapping) else list(messages)
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise InvalidRequestError("The base model has no chat template. Use generate().", "messages")
        ids = [self._ids(self.tokenizer.render(conversation), False) for conversation in listed]
        return self._run(ids, sampling, adapter, route, n, progress)

    def _ids(self, prompt: Prompt, add_special_tokens: bool) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(prompt)
        if self.tokenizer is None:
            raise InvalidRequestError("The base model's folder has no tokenizer: give token ids.", "prompt")
        return tuple(self.tokenizer.encode(prompt, add_special_tokens))

    def _run(
        self,
        prompts: Sequence[tuple[int, ...]],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        adapter: Adapters | Sequence[Adapters],
        route: RouteScope | str | None,
        n: int,
        progress: bool,
    ) -> list[RequestOutput]:
        count = len(prompts)
        chosen = self._named.choose(_choices(adapter, count))
        params = _each(sampling or SamplingParams(), count, "sampling")
        made = [
            self._request(ids, own, parts, route, n) for ids, own, parts in zip(prompts, params, chosen, strict=True)
        ]
        running = {request.id: _Running(request, self.tokenizer) for request in made}
        try:
            for request in made:
                self.engine.add(request)
            with AnswerProgress(count * n, progress) as bar:
                self._step(running, bar)
        except BaseException:  # the others would hold their adapters, and be computed beside the next call's
            for request in made:
                self.engine.abort(request.id)
            raise
        return [running[request.id].output for request in made]

    def _step(self, running: dict[str, "_Running"], bar: AnswerProgress) -> None:
        """Until the engine has nothing left. Raises what ended an answer."""
        while self.engine.busy:
            for out in self.engine.step()[0]:
                if (own := running.get(out.request_id)) is None:
                    continue
                if own.ended(out.index):  # by a stop string, in the same step
                    continue
                ended = own.take(out)
                if ended:
                    self.engine.abort(out.request_id, out.index)
                bar.note(len(out.token_ids), ended or out.finish is not None)

    def _request(
        self, ids: tuple[int, ...], sampling: SamplingParams, parts: Parts, route: RouteScope | str | None, n: int
    ) -> Request:
        key, member = self._named.served(parts)
        limit = self.engine.info.max_model_len
        if len(ids) + min(sampling.max_tokens, 1) > limit:
            raise ContextLengthError.too_long(limit, f"{len(ids)} tokens and no room for an answer", "prompt")
        most = min(sampling.max_tokens, limit - len(ids))
        return Request(
            id=f"offline-{next(self._numbers)}",
            prompts=(ids,),
            sampling=replace(stopping(sampling, self.tokenizer), max_tokens=most),
            n=n,
            adapter=key,
            member=member,
            route_scope=RouteScope(route or self._named.scope(parts) or RouteScope.BATCH),
        )


class _Running:
    """A request in the engine and what has come of it."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None):
        p = request.sampling
        self.output = RequestOutput(request.prompts[0], [CompletionOutput(i) for i in range(request.n)])
        table = stop_table(p.stop)
        self._texts = [SequenceText.of(p, tokenizer, table) for _ in range(request.n)]

    def ended(self, index: int) -> bool:
        """Whether nothing more may come of an answer."""
        return self._texts[index].finished

    def take(self, out: SequenceOutput) -> bool:
        """Takes an output in. Returns whether the answer has ended without the engine's knowledge: at a stop string."""
        own, text = self.output.outputs[out.index], self._texts[out.index]
        if out.finish is not None and out.finish.error is not None:
            raise out.finish.error
        own.token_ids += out.token_ids
        own.logprobs += out.logprobs or []
        own.route, own.timing = out.route or own.route, out.timing or own.timing
        if out.prompt_logprobs is not None:
            self.output.prompt_logprobs = out.prompt_logprobs
        self.output.cached_tokens = out.cached_tokens
        delta = text.push(out)
        own.text += delta.text
        own.finish_reason, own.stop_reason = delta.finish_reason, delta.stop_reason
        return text.finished and out.finish is None


def _is_ids(prompts: Prompt | Sequence[Prompt]) -> bool:
    return bool(prompts) and isinstance(prompts[0], int)


def _choices(adapter: Adapters | Sequence[Adapters], count: int) -> list[Adapters]:
    if adapter is None or isinstance(adapter, str) or is_weighted(adapter):
        return [adapter] * count
    return _each(cast(list[Adapters], list(adapter)), count, "adapter")


def _each(value: T | Sequence[T], count: int, name: str) -> list[T]:
    """One value for all, or one each."""
    if not isinstance(value, list | tuple):
        return [value] * count  # type: ignore[list-item]
    if len(value) != count:
        raise InvalidRequestError(
            f"`{name}` has {len(value)} entries for {count} prompts. Give one, or one each.", name
        )
    return list(value)
