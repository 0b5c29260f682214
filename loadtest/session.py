"""A whole test: look at the server, record what is right, warm up, run (repeated, paired), and hand over the result."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest import churn
from tucka_runtime.loadtest.canary import Canaries
from tucka_runtime.loadtest.client import LoadClient, ModelCard, ServerError
from tucka_runtime.loadtest.progress import RunProgress
from tucka_runtime.loadtest.record import Record
from tucka_runtime.loadtest.runner import Run, RunResult
from tucka_runtime.loadtest.settings import Settings
from tucka_runtime.loadtest.workload import WORDS, TokenScale, Workload


@dataclass
class SessionResult:
    """Everything measured. `base_runs[i]` is the twin of `runs[i]` where --versus-base asked for it."""

    settings: Settings
    models: list[str]
    base: str | None
    runs: list[RunResult] = field(default_factory=list)
    base_runs: list[RunResult] = field(default_factory=list)
    canaries: Canaries | None = None
    prepared: list[Record] = field(default_factory=list)


def choose_models(settings: Settings, cards: list[ModelCard]) -> tuple[list[str], str | None]:
    """(adapters in order of popularity, base). Without adapters the base itself is what is tested."""
    names = [card.name for card in cards]
    base = settings.base or next((c.name for c in cards if c.parent is None), None)
    if settings.models:
        models = settings.models.split(",")
        if missing := [m for m in models if m not in names]:
            raise ConfigError(f"--models: {', '.join(missing)} not served; there are {', '.join(names)}")
    else:
        models = [c.name for c in cards if c.parent is not None and not c.alias] or ([base] if base else [])
    if not models:
        raise ServerError("the server lists no models")
    if settings.versus_base and (base is None or base in models):
        raise ConfigError("--versus-base needs a base model and at least one adapter beside it")
    return models, base


class Session:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.current: Run | None = None
        self.stopped = False

    async def execute(self) -> SessionResult:
        settings = self.settings
        async with LoadClient(settings) as client:
            cards = await client.models()
            models, base = choose_models(settings, cards)
            result = SessionResult(settings, models, base)
            scale = await self.measure_tokens(client, models[0], result)
            pool = churn.adapters(settings.churn_adapter, cards, models) if settings.churn_rate else []
            for adapter in pool:
                await self.put(client, adapter.name, adapter.paths[0])
            if settings.canary_rate and not settings.versus_base:
                result.canaries = Canaries(settings, client)
                aliases = {c.name for c in cards if c.alias}
                await self.record_references(client, result, pool, aliases)
            await self.warm_up(client, Workload(settings, models, base, scale), result)
            with self.interruptible():
                for repeat in range(settings.repeats):
                    await self.repeat(client, result, scale, pool, repeat)
        return result

    async def repeat(
        self,
        client: LoadClient,
        result: SessionResult,
        scale: TokenScale,
        pool: list[churn.ChurnedAdapter],
        repeat: int,
    ) -> None:
        """One run, or a pair: adapters first in even repeats, the base first in odd ones."""
        settings = replace(self.settings, seed=self.settings.seed + repeat)
        workload = Workload(settings, result.models, result.base, scale)
        sides: list[str | None] = [None, result.base] if settings.versus_base else [None]
        for to_base in sides if repeat % 2 == 0 else reversed(sides):
            if self.stopped:
                return
            run = self.current = Run(settings, client, workload, result.canaries, pool, to_base)
            title = f"[{repeat + 1}/{settings.repeats}{' base' if to_base else ''}]"
            async with RunProgress(run, title, settings.quiet):
                (result.base_runs if to_base else result.runs).append(await run.execute())

    async def measure_tokens(self, client: LoadClient, model: str, result: SessionResult) -> TokenScale:
        """How many tokens the server makes of words. It is also the first test that it answers at all."""
        counts = []
        few, many = 4, 16  # short: a small model's context must hold them, whatever its tokenizer
        for words in (few, many):
            body = client.body(model, " ".join(WORDS[:: len(WORDS) // words][:words]), 1, 0.0)
            record = await client.generate(Record("warmup", model), body)
            result.prepared.append(record)
            if not record.ok:
                raise ServerError(f"the first request failed ({record.cause}): {record.detail or 'no details'}")
            counts.append(record.prompt_tokens)
        least, most = counts
        if least is None or most is None or least == most:
            return TokenScale()
        per_word = (most - least) / (many - few)
        return TokenScale(least - few * per_word, per_word)

    async def record_references(
        self, client: LoadClient, result: SessionResult, pool: list[churn.ChurnedAdapter], aliases: set[str]
    ) -> None:
        """Each canaried model alone, the base too; an adapter under churn once from each of its paths. An alias gets
        no canaries: it answers as whatever it stands for, which may change."""
        assert result.canaries is not None
        churned = {adapter.name: adapter for adapter in pool}
        names = dict.fromkeys([*([result.base] if result.base else []), *churned, *result.models])
        for name in [n for n in names if n not in aliases][: self.settings.canary_models]:
            paths = churned[name].paths if name in churned else (None,)
            for path in reversed(paths):
                if len(paths) > 1 and path is not None:
                    await self.put(client, name, path)
                result.prepared += await result.canaries.record_references(name, path)

    async def put(self, client: LoadClient, name: str, path: str) -> None:
        """Loads, whether the name is there or not. Nothing is unloaded before its path has been looked at, so that a
        wrong one leaves the server as it was: that is what the load in place is for. vLLM goes on reading an adapter
        that was loaded in place from disk, at every step (0.32), so it is loaded once more without."""
        status, detail = await client.adapter("load", name, path)
        if not 200 <= status < 300:
            status, detail = await client.adapter("load", name, path, inplace=True)
            if 200 <= status < 300 or "already" in detail:  # the latter of a server that cannot load in place
                await client.adapter("unload", name)
                status, detail = await client.adapter("load", name, path)
        if not 200 <= status < 300:
            raise ServerError(f"{name} could not be loaded from its path before the test (status {status}): {detail}")

    async def warm_up(self, client: LoadClient, workload: Workload, result: SessionResult) -> None:
        for index in range(self.settings.warmup):
            conversation = workload.conversation(-1 - index) if not workload.trace else workload.conversation(0)
            turn = conversation.turns[0]
            body = client.body(conversation.model, list(turn.messages) or turn.text, turn.max_tokens, 0.0)
            result.prepared.append(await client.generate(Record("warmup", conversation.model), body))

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """The first Ctrl-C ends sending and waits for answers; the second is an ordinary one."""
        loop = asyncio.get_running_loop()

        def stop() -> None:
            self.stopped = True
            if self.current is not None:
                self.current.stop.set()
            print("\nstopping: waiting for what is running (Ctrl-C again to abort)", file=sys.stderr)
            loop.remove_signal_handler(signal.SIGINT)

        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(signal.SIGINT, stop)
        try:
            yield
        finally:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.remove_signal_handler(signal.SIGINT)
