"""What is held, row by row. Those that a server may not survive come last."""

import asyncio

from tucka_runtime.loadtest.conform.kit import Kit, Row, name_of, ok
from tucka_runtime.loadtest.conform.oracle import BASE, FIRST, SECOND, Findings, label
from tucka_runtime.loadtest.record import Record

ROUNDS = 5  # of batches
TURNS = 8  # of alternation
CANCELLED = 8  # streams that are cancelled together


async def applied(kit: Kit, found: Findings) -> None:
    """Without this no other row could tell one adapter from another."""
    for first, second in kit.oracle.twins():
        line = f"{label(first)} and {label(second)} answer both prompts alike: no leak between them can be seen"
        if kit.made:
            found.faults.append(line)
        else:
            found.inapplicable = line
    known = kit.oracle.references.items()
    found.answers = [kit.oracle.judge(answers[number], c) for c, answers in known for number in (FIRST, SECOND)]


async def own(kit: Kit, found: Findings) -> None:
    for names, question in ((kit.names, FIRST), (kit.names[::-1], SECOND)):
        for name in names:
            found.answers.append(await kit.ask(name, question))


async def base(kit: Kit, found: Findings) -> None:
    for name in kit.names:
        for question in (FIRST, SECOND):
            found.answers.append(await kit.ask(BASE, question))
            await kit.ask(name, question)
            found.answers.append(await kit.ask(BASE, question))


async def alternation(kit: Kit, found: Findings) -> None:
    for turn in range(TURNS):
        for name in [BASE, *kit.names][:: -1 if turn % 2 else 1]:
            found.answers.append(await kit.ask(name, turn % 2))


async def batch(kit: Kit, found: Findings) -> None:
    for turn in range(ROUNDS):
        found.answers += await kit.ask_at_once([*kit.names, BASE], turn % 2)
    note_overlap(found)


def note_overlap(found: Findings) -> None:
    """How many answers came at the same time: one after the other they prove nothing of batches."""
    spans = [(a.record.events[0][0], a.record.events[-1][0]) for a in found.answers if a.record.events]
    most = max((sum(begin <= start <= end for begin, end in spans) for start, _ in spans), default=0)
    found.notes.append(f"up to {most} answers at the same time")
    if most < 2:
        found.inapplicable = "the server answers one request after the other"


async def unload(kit: Kit, found: Findings) -> None:
    name, *others = kit.names
    found.answers.append(await kit.ask(name, FIRST))
    status, detail = await kit.unload(name)
    if not ok(status):
        found.faults.append(f"the unload was refused ({status}): {detail}")
    await kit.gone(name, found)
    found.answers += [await kit.ask(other, FIRST) for other in [*others, BASE]]
    await kit.restore()
    found.answers.append(await kit.ask(name, FIRST))


async def new_content(kit: Kit, found: Findings) -> None:
    """The new content is asked a prompt whose keys and values the server may have, of the old content."""
    name, (old, new) = kit.names[0], kit.contents[:2]
    for content in (old, new, old):
        if content != kit.loaded.get(name):
            await kit.unload(name)
            await must_load(kit, name, content, found)
        if name in kit.loaded:
            found.answers += [await kit.ask(name, question) for question in (FIRST, SECOND, FIRST, SECOND)]


async def must_load(kit: Kit, name: str, content: str, found: Findings, inplace: bool = False) -> bool:
    status, detail = await kit.load(name, content, inplace)
    if not ok(status):
        found.faults.append(f"{label(content)} could not be loaded as {name} ({status}): {detail}")
    return ok(status)


async def in_place(kit: Kit, found: Findings) -> None:
    """The new content after the server's 200, the old one's stream as it began, and everyone else untouched."""
    name, other = kit.names[:2]
    new = kit.contents[-1]
    streams = await begin_all(kit, [name, other, BASE])
    status, detail = await kit.load(name, new, inplace=True)
    caught = not streams[0][0].done()
    if status in (400, 404, 405, 409, 422, 501):
        found.inapplicable = f"the server does not load in place ({status}): {detail}"
    elif not ok(status):
        found.faults.append(f"the load in place failed ({status}): {detail}")
    elif not caught:
        found.inapplicable = "the answer was over before the adapter was loaded: raise --stream-tokens"
    if ok(status):
        found.answers += [await kit.ask(name, question) for question in (FIRST, SECOND)]
    await end_all(kit, streams, found)
    if ok(status):
        await kit.unload(name)  # `restore` loads it anew


async def while_streaming(kit: Kit, found: Findings) -> None:
    name, other = kit.names[:2]
    streams = await begin_all(kit, [name, other, BASE])
    status, detail = await kit.unload(name)
    if not ok(status):
        found.faults.append(f"the unload was refused ({status}): {detail}")
    if streams[0][0].done():
        found.inapplicable = "the answer was over before the adapter was unloaded: raise --stream-tokens"
    if await must_load(kit, name, kit.contents[-1], found):
        found.answers += [await kit.ask(name, question) for question in (FIRST, SECOND)]
    await end_all(kit, streams, found)
    if name in kit.loaded:
        found.answers.append(await kit.ask(name, FIRST))


async def begin_all(kit: Kit, names: list[str]) -> list[tuple["asyncio.Task[Record]", str]]:
    """Streams that have begun, each with the content that it belongs to."""
    contents = [BASE if name == BASE else kit.loaded[name] for name in names]
    return list(zip(await asyncio.gather(*map(kit.begin, names)), contents, strict=True))


async def end_all(kit: Kit, streams: list[tuple["asyncio.Task[Record]", str]], found: Findings) -> None:
    """The first stream's adapter was changed: an honest end of it is no wrong answer. The others' was not."""
    for number, (task, content) in enumerate(streams):
        record = await task
        answer = kit.oracle.judge(record, content)
        if number == 0 and answer.outcome == "failed":
            found.notes.append(f"the stream that was running was ended ({record.cause})")
        else:
            found.answers.append(answer)


async def cancelled(kit: Kit, found: Findings) -> None:
    name, *others = kit.names
    count = 0
    for question in (FIRST, SECOND):
        begun = await asyncio.gather(*(kit.begin(name) for _ in range(CANCELLED)))
        beside = asyncio.create_task(kit.ask_at_once([*others, BASE], question))
        for task in begun:
            count += not task.done()
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)
        found.answers += await beside
        found.answers += await kit.ask_at_once([*kit.names, BASE], question)
    found.notes.append(f"{count} of {2 * CANCELLED} streams were cancelled")
    if not count:
        found.inapplicable = "every answer was over before it could be cancelled: raise --stream-tokens"
    await kit.unload(name)
    await kit.gone(name, found)
    if await must_load(kit, name, kit.contents[-1], found):
        found.answers += [await kit.ask(name, question) for question in (FIRST, SECOND)]


async def slots(kit: Kit, found: Findings) -> None:
    """A server may refuse what it has no room for; what it took it must serve."""
    if not kit.slots:
        found.inapplicable = "say with --slots how many adapters the server serves at once"
    elif len(kit.contents) <= kit.slots:
        found.inapplicable = f"{len(kit.contents)} adapters are no more than the {kit.slots} slots: give more"
    else:
        await fill(kit, found)


async def fill(kit: Kit, found: Findings) -> None:
    refused = []
    for number, content in enumerate(kit.contents):
        if name_of(number) not in kit.loaded:
            status, detail = await kit.load(name_of(number), content)
            if not ok(status):
                found.notes.append(f"{name_of(number)} was refused ({status}): {detail}")
                refused.append(name_of(number))
    for turn in range(ROUNDS):
        found.answers += await kit.ask_at_once([*kit.loaded, BASE], turn % 2)
    found.answers += [await kit.ask(name, FIRST) for name in [*kit.loaded, BASE, *kit.loaded]]
    for name in refused:
        await kit.gone(name, found)


ROWS = (
    Row(
        "applied",
        "every adapter changes what the base answers, each in its own way",
        "both prompts to the base before any load, and to each adapter while it is the only one loaded",
        applied,
    ),
    Row("own", "an adapter's answer is its own", "all loaded; both prompts to each, one after the other", own),
    Row("base", "adapters do not touch the base", "the base before and after each adapter's answer", base),
    Row(
        "alternation",
        "nothing of a request's adapter stays for the next one",
        f"{TURNS} times base and adapters in turn, without a pause",
        alternation,
    ),
    Row(
        "batch",
        "adapters and base in one batch answer as alone",
        f"{ROUNDS} times every adapter and the base at once",
        batch,
    ),
    Row(
        "unload",
        "what was unloaded is not served, and no other adapter notices",
        "unload one; ask it, the list, the others and the base; load it again and ask",
        unload,
    ),
    Row(
        "new-content",
        "after a reload nothing of the old content is used, cached keys and values included",
        "one name: the same prompts twice each to content 1, then 2, then 1, unloaded and loaded between",
        new_content,
    ),
    Row(
        "cancelled",
        "a client that goes away leaves nothing behind",
        f"twice {CANCELLED} streams of one adapter cancelled once begun, the others at the same time and after; "
        "then the adapter unloaded, asked, and its name loaded with another content",
        cancelled,
    ),
    Row(
        "slots",
        "more adapters than slots are served right, or refused",
        "every adapter loaded and asked at once, then one after the other",
        slots,
    ),
    Row(
        "in-place",
        "a stream keeps the content that it began with while its name gets another in place; what follows has the new",
        "streams of two adapters and the base; `load_inplace` of the first meanwhile; the new content asked",
        in_place,
    ),
    Row(
        "while-streaming",
        "a stream keeps its content, or is ended, when its adapter is unloaded and the name loaded with another",
        "streams of two adapters and the base; unload and load of the first meanwhile; the new content asked",
        while_streaming,
    ),
)
