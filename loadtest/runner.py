"""One run: drives the conversations in an open or a closed loop, with canaries and churn beside them."""

import asyncio
import contextlib
import gc
import random
import time
from dataclasses import dataclass, field
from typing import Any

from tucka_runtime.loadtest import score
from tucka_runtime.loadtest.canary import Canaries
from tucka_runtime.loadtest.churn import Churn, ChurnedAdapter
from tucka_runtime.loadtest.client import LoadClient
from tucka_runtime.loadtest.record import Record
from tucka_runtime.loadtest.saturation import ClientWatch
from tucka_runtime.loadtest.settings import Settings
from tucka_runtime.loadtest.workload import Conversation, Turn, Workload

CLOSED_LOOP_CONCURRENCY = 4
PAUSE_AFTER_FAILURE = 0.1  # seconds; a closed loop around a dead server would only count how fast it can fail


@dataclass
class RunResult:
    """What one run left: all records (of every kind), the changes of adapters, the tester's own state."""

    records: list[Record] = field(default_factory=list)
    finished: list[Record] = field(default_factory=list)  # those of kind load, in order of their end
    churn_events: list[dict[str, Any]] = field(default_factory=list)
    duration: float = 0.0
    seed: int = 0
    redirected: int = 0
    loop_lags: list[float] = field(default_factory=list)
    core_waits: list[float] = field(default_factory=list)  # how much of each lag was waiting for a core
    cpu_share: float = 0.0
    interrupted: bool = False

    @property
    def load(self) -> list[Record]:
        return [r for r in self.records if r.kind == "load"]


class Run:
    """`to_base` sends every conversation to the base instead, the same in all else."""

    def __init__(
        self,
        settings: Settings,
        client: LoadClient,
        workload: Workload,
        canaries: Canaries | None = None,
        churn_pool: list[ChurnedAdapter] | None = None,
        to_base: str | None = None,
    ) -> None:
        self.settings, self.client, self.workload, self.canaries = settings, client, workload, canaries
        self.to_base = to_base
        self.result = RunResult(seed=settings.seed)
        self.stop = asyncio.Event()
        self.next_index = 0
        limit = settings.concurrency if settings.open_loop else None
        self.cap = asyncio.Semaphore(limit) if limit else contextlib.nullcontext()
        probed = self.result.records.append
        how = settings.churn_rate, settings.churn_inplace, settings.churn_drain, settings.seed
        self.churn = Churn(client, churn_pool or [], *how, self.after_load, probed)

    async def execute(self) -> RunResult:
        plan = self.workload.plan() if self.settings.open_loop else []
        watch = ClientWatch()
        gc.collect()
        gc.freeze()  # what exists now need not be looked at again while times are taken
        began = time.perf_counter()
        self.client.clock = lambda: time.perf_counter() - began
        watch.start()
        side = [asyncio.create_task(self.send_canaries())] if self.canaries and self.settings.canary_rate else []
        if self.churn.pool and self.settings.churn_rate:
            side.append(asyncio.create_task(self.churn.run(self.stop)))
        try:
            await (self.open_loop(plan) if self.settings.open_loop else self.closed_loop())
        finally:
            self.result.interrupted = self.stop.is_set()
            self.stop.set()
            await asyncio.gather(*side)
            await watch.stop()
            await self.churn.restore()
            gc.unfreeze()
        self.result.duration = max((r.end for r in self.result.load), default=self.client.clock())
        self.result.churn_events = self.churn.events
        self.result.loop_lags, self.result.core_waits = watch.lags, watch.waits
        self.result.cpu_share = watch.cpu_share
        return self.result

    async def open_loop(self, plan: list[Conversation]) -> None:
        tasks = []
        for conversation in plan:
            await self.sleep((conversation.at or 0.0) - self.client.clock())
            if self.stop.is_set():
                break
            tasks.append(asyncio.create_task(self.converse(conversation)))
        await asyncio.gather(*tasks)

    async def closed_loop(self) -> None:
        most = self.settings.requests
        workers = self.settings.concurrency or CLOSED_LOOP_CONCURRENCY

        async def worker() -> None:
            while not self.stop.is_set() and self.client.clock() < self.settings.span:
                if most is not None and self.next_index >= most:
                    return
                index, self.next_index = self.next_index, self.next_index + 1
                if not await self.converse(self.workload.conversation(index)):
                    await self.sleep(PAUSE_AFTER_FAILURE)

        await asyncio.gather(*(worker() for _ in range(workers)))

    async def sleep(self, seconds: float) -> None:
        """Returns early when the run is stopped."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), seconds)

    async def converse(self, conversation: Conversation) -> bool:
        """Sends all turns; the first failure ends it. Returns whether all that was sent was answered."""
        conversation = self.redirected(conversation)
        model = self.to_base or conversation.model
        history: list[dict[str, Any]] = []
        text: str | list[int] = ""
        for number, turn in enumerate(conversation.turns):
            if turn.think:
                await self.sleep(turn.think)
            if number and (self.stop.is_set() or not self.churn.serves(model)):
                break
            planned = conversation.at if number == 0 else None
            record = Record("load", model, conversation.index, number, planned, expected=turn.expected)
            history += turn.messages or [{"role": "user", "content": turn.text}]
            text = f"{text}\n{turn.text}" if text else turn.text
            async with self.cap:
                await self.send(record, turn, history if self.client.chat else text)
            if not record.ok:
                return False
            history.append({"role": "assistant", "content": record.text})
            if isinstance(text, str):
                text += record.text
        return True

    def redirected(self, conversation: Conversation) -> Conversation:
        """The same; or, while its model is away, one to another model drawn by popularity."""
        model = conversation.model
        if self.churn.serves(model):
            return conversation
        self.result.redirected += 1
        rng = random.Random(f"{self.settings.seed}/{conversation.index}/redirected")
        for _ in range(100):
            model = self.workload.popularity.draw(rng)
            if self.churn.serves(model):
                break
        return self.workload.conversation(conversation.index, conversation.at, model)

    async def send(self, record: Record, turn: Turn, prompt: str | list[int] | list[dict[str, Any]]) -> None:
        body = self.client.body(record.model, prompt, turn.max_tokens, self.settings.temperature)
        record.generation = self.churn.generation(record.model)
        self.result.records.append(record)
        await self.client.generate(record, body)
        self.forgive(record)
        if record.ok and record.expected is not None:
            record.correct = score.correct(record.text, record.expected, self.settings.score)
        if record.kind == "load":
            self.result.finished.append(record)

    def forgive(self, record: Record) -> None:
        """A 404 to a request that met its adapter's exchange is nobody's failure; it gets a cause of its own."""
        if record.status == 404 and self.churn.absent_during(record.model, record.start, record.end):
            record.cause = "unloaded"

    async def after_load(self, name: str) -> None:
        """The first request after a load: its TTFT is the cold one."""
        index = len(self.churn.events)
        turn = self.workload.opening(random.Random(f"{self.settings.seed}/cold/{index}"), name)
        await self.send(Record("cold", name, index), turn, list(turn.messages) or turn.text)

    async def send_canaries(self) -> None:
        """One after another at a steady pace, every adapter and prompt in turn."""
        assert self.canaries is not None
        tasks: list[asyncio.Task[None]] = []
        models = list(dict.fromkeys(model for model, _ in self.canaries.references))
        rounds = [(model, number) for number in range(len(self.canaries.prompts)) for model in models]
        while rounds:
            await self.sleep(1 / self.settings.canary_rate)
            if self.stop.is_set():
                break
            model, number = rounds[len(tasks) % len(rounds)]
            tasks.append(asyncio.create_task(self.send_canary(model, number)))
        await asyncio.gather(*tasks)

    async def send_canary(self, model: str, number: int) -> None:
        assert self.canaries is not None
        if not self.churn.serves(model):
            return
        path = self.churn.path(model)
        record = await self.canaries.ask(model, number, "canary")
        self.result.records.append(record)
        self.forgive(record)
        self.canaries.judge(record, path, self.churn.changed_during(model, record.start, record.end))
