"""One run: what is right is found out, the rows are held against it, and the server is left as it was found."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tucka_runtime.loadtest.client import LoadClient, ServerError
from tucka_runtime.loadtest.conform.oracle import BASE, FIRST, SECOND, STREAM, Findings, Judgement, Oracle, label
from tucka_runtime.loadtest.record import Record

PREFIX = "conform-"  # of the names that the kit loads adapters under
CORE = 4  # adapters that most rows use
POLL = 0.002  # seconds between looks at whether a stream has begun


@dataclass(frozen=True)
class Row:
    """One thing that is held: `holds` says what, `sent` how it is tried. `check` fills its findings."""

    name: str
    holds: str
    sent: str
    check: Callable[["Kit", Findings], Awaitable[None]]


@dataclass
class Kit:
    """The server under test and what is loaded there. `contents` are folders of adapters, at least two; `made` says
    that the kit made them, so that they must differ; `slots` is how many the server serves at once, 0 if unknown."""

    client: LoadClient
    oracle: Oracle
    contents: list[str]
    made: bool
    slots: int = 0
    loaded: dict[str, str] = field(default_factory=dict)  # name -> content

    @property
    def names(self) -> list[str]:
        """The adapters that most rows use, by the names that they are loaded under."""
        return [name_of(number) for number in range(min(CORE, len(self.contents)))]

    async def set_up(self) -> None:
        """Asks the base before anything is loaded, then every adapter while it is the only one; then loads the core.

        Raises ServerError where that cannot be done: nothing could be judged without.
        """
        for name in await self.model_names():
            if name.startswith(PREFIX):  # of a run that was killed
                await self.client.adapter("unload", name)
        await self.oracle.record_references(self.oracle.base, BASE)
        for number, content in enumerate(list(self.contents)):
            status, detail = await self.load(name_of(number), content)
            if not ok(status):
                raise ServerError(f"{label(content)} could not be loaded (status {status}): {detail}")
            await self.oracle.record_references(name_of(number), content)
            status, detail = await self.unload(name_of(number))
            if not ok(status):
                raise ServerError(f"{label(content)} could not be unloaded (status {status}): {detail}")
        await self.restore()

    async def restore(self) -> None:
        """The core under its names and nothing else of the kit's. What was loaded in place is loaded anew: vLLM goes on
        reading it from disk."""
        wanted = {name: self.contents[number] for number, name in enumerate(self.names)}
        for name in [n for n, content in self.loaded.items() if wanted.get(n) != content]:
            await self.unload(name)
        for name, content in wanted.items():
            if name not in self.loaded:
                status, detail = await self.load(name, content)
                if not ok(status):
                    raise ServerError(f"{label(content)} could not be loaded again (status {status}): {detail}")

    async def clear(self) -> None:
        for name in list(self.loaded):
            await self.unload(name)

    async def load(self, name: str, content: str, inplace: bool = False) -> tuple[int, str]:
        status, detail = await self.client.adapter("load", name, content, inplace)
        if ok(status):
            self.loaded[name] = content
        return status, detail

    async def unload(self, name: str) -> tuple[int, str]:
        self.loaded.pop(name, None)
        return await self.client.adapter("unload", name)

    async def model_names(self) -> list[str]:
        return [card.name for card in await self.client.models()]

    async def ask(self, name: str, question: int) -> Judgement:
        """`name` may be BASE. Judged by what the name stands for when the request is sent."""
        content = BASE if name == BASE else self.loaded[name]
        model = self.oracle.base if name == BASE else name
        return self.oracle.judge(await self.oracle.ask(model, question), content)

    async def ask_at_once(self, names: list[str], question: int) -> list[Judgement]:
        return list(await asyncio.gather(*(self.ask(name, question) for name in names)))

    async def begin(self, name: str) -> "asyncio.Task[Record]":
        """A long answer that has begun to come (or is over already)."""
        record, body = self.oracle.question(self.oracle.base if name == BASE else name, STREAM)
        task = asyncio.create_task(self.client.generate(record, body))
        while not record.events and not task.done():
            await asyncio.sleep(POLL)
        return task

    async def gone(self, name: str, found: Findings) -> None:
        """A name that must not be served: it is refused, and not listed."""
        record = await self.oracle.ask(name, FIRST)
        if record.status == 200:
            found.faults.append(f"{name}, which is not loaded, answered: {record.text[:60]!r}")
        elif record.status is None or record.status >= 500:
            found.faults.append(f"asked for {name}, which is not loaded, the server broke ({record.cause})")
        else:
            found.notes.append(f"{record.status} for {name} while it is not loaded")
        if name in await self.model_names():
            found.faults.append(f"{name}, which is not loaded, is in /v1/models")

    async def run(self, rows: list[Row]) -> list[dict[str, Any]]:
        results, dead = [], None
        for row in rows:
            found = Findings(inapplicable=dead and f"the server has not answered since {dead}")
            if dead is None and not await self._held(row, found):
                dead = row.name
            results.append(
                {
                    "name": row.name,
                    "holds": row.holds,
                    "sent": row.sent,
                    "came_back": found.came_back(),
                    "verdict": found.verdict(),
                    "reason": found.inapplicable,
                    "evidence": found.evidence(),
                    "answers": [answer.to_json() for answer in found.answers],
                }
            )
        return results

    async def _held(self, row: Row, found: Findings) -> bool:
        """Whether the server lives on: it answers, and takes its adapters again."""
        try:
            await row.check(self, found)
            await self.restore()
            alive = (await self.ask(BASE, SECOND)).outcome != "failed"
        except ServerError as error:
            found.faults.append(error.message)
            alive = False
        if not alive:
            found.faults.append("after this the server answered no more, or took no adapters")
        return alive


def name_of(number: int) -> str:
    return f"{PREFIX}{number + 1}"


def ok(status: int) -> bool:
    return 200 <= status < 300
