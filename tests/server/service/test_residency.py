"""Who has a slot, who leaves it, and who waits: with a fake engine that loads when it is told to."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.support.figures import adapter
from tucka_runtime.config import EngineConfig
from tucka_runtime.errors import AdapterCapacityError, EngineDeadError, StorageError, TuckaError
from tucka_runtime.messages import AdapterInfo, AdapterKey
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service import residency as module
from tucka_runtime.server.service.coming import Hold, Tier
from tucka_runtime.server.service.residency import Residency

SIZE = adapter("x").bytes


class Engine:
    """Remembers what it was told. `gate` holds loads up; `refusals` are raised by the next loads."""

    def __init__(self, slots: int, host_bytes: int, timeout: int = 60):
        self.config = EngineConfig(adapter_slots=slots, adapter_host_bytes=host_bytes, adapter_wait_timeout=timeout)
        self.info = None
        self.told: list[str] = []
        self.resident: set[str] = set()
        self.host: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.refusals: list[TuckaError] = []

    def load(self, name: str) -> Callable[[bool], Coroutine[Any, Any, AdapterInfo]]:
        async def load(resident: bool) -> AdapterInfo:
            self.told.append(f"{'activate' if name in self.host and resident else 'load'} {name}")
            await self.gate.wait()
            await asyncio.sleep(0)
            if self.refusals:
                raise self.refusals.pop(0)
            self.host.discard(name)
            (self.resident if resident else self.host).add(name)
            assert len(self.resident) <= self.config.adapter_slots
            return adapter(name)

        return load

    def evict_adapter(self, key: AdapterKey) -> None:
        self.told.append(f"evict {key.name}")
        self.resident.remove(key.name)
        self.host.add(key.name)

    def unload_adapter(self, key: AdapterKey) -> None:
        self.told.append(f"unload {key.name}")
        self.resident.discard(key.name)
        self.host.discard(key.name)


class Slots:
    """A residency and its engine."""

    def __init__(self, slots: int = 2, host: int = 2, timeout: int = 60):
        self.engine = Engine(slots, host * SIZE, timeout)
        self.metrics = Metrics()
        self.residency = Residency(self.engine, self.metrics)  # type: ignore[arg-type]

    def want(self, name: str) -> Hold:
        return self.residency.want(AdapterKey(name, 1), self.engine.load(name))

    async def use(self, *names: str) -> None:
        """Requests one after the other."""
        for name in names:
            hold = self.want(name)
            await self.residency.ready(hold)
            assert name in self.engine.resident
            self.residency.leave(hold)

    async def held(self, name: str) -> Hold:
        hold = self.want(name)
        await self.residency.ready(hold)
        return hold

    def tiers(self, *names: str) -> list[Tier]:
        found = [self.residency.tier(AdapterKey(name, 1)) for name in names]
        for name, tier in zip(names, found, strict=True):
            assert (name in self.engine.resident, name in self.engine.host) == (tier == "resident", tier == "host")
        return found

    def counted(self, series: str) -> float:
        lines = self.metrics.render().decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"{series} ")).split()[-1])


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def sync() -> None:
        async def limited() -> None:
            async with asyncio.timeout(30):
                await test()

        asyncio.run(limited())

    sync.__doc__, sync.__name__ = test.__doc__, test.__name__
    return sync


@run
async def test_the_least_recently_used_leaves_and_comes_back_from_the_host() -> None:
    slots = Slots()
    await slots.use("a", "b", "a", "c")
    assert slots.tiers("a", "b", "c") == ["resident", "host", "resident"]
    await slots.use("b")
    assert slots.tiers("a", "b", "c") == ["host", "resident", "resident"]
    assert slots.engine.told == ["load a", "load b", "evict b", "load c", "evict a", "activate b"]
    assert slots.counted('tucka_adapter_lookups_total{tier="resident"}') == 1
    assert slots.counted('tucka_adapter_lookups_total{tier="host"}') == 1
    assert slots.counted('tucka_adapter_lookups_total{tier="registered"}') == 3
    assert slots.counted('tucka_adapter_evictions_total{tier="resident"}') == 2
    assert slots.counted('tucka_adapter_transition_seconds_count{transition="load"}') == 3
    assert slots.counted('tucka_adapter_transition_seconds_count{transition="activate"}') == 1


@run
async def test_the_host_cache_keeps_to_its_bytes() -> None:
    slots = Slots(slots=1, host=2)
    await slots.use("a", "b", "c", "d", "e")
    assert slots.tiers("a", "b", "c", "d", "e") == ["registered", "registered", "host", "host", "resident"]
    assert slots.residency.host.bytes == 2 * SIZE
    none = Slots(slots=1, host=0)
    await none.use("a", "b")
    assert none.tiers("a", "b") == ["registered", "resident"]


@run
async def test_what_is_held_is_never_evicted_and_others_wait_in_order() -> None:
    slots = Slots()
    a, b = await slots.held("a"), await slots.held("b")
    c, d, again = slots.want("c"), slots.want("d"), slots.want("c")
    assert slots.residency.awaited == 3 and slots.residency.awaited_names == {"c", "d"}
    await asyncio.sleep(0.05)
    assert slots.tiers("a", "b", "c", "d") == ["resident", "resident", "registered", "registered"]
    slots.residency.leave(b)
    await slots.residency.ready(c)
    await slots.residency.ready(again)
    assert slots.tiers("a", "b", "c", "d") == ["resident", "host", "resident", "registered"]
    slots.residency.leave(c)
    await asyncio.sleep(0.05)
    assert slots.tiers("c", "d") == ["resident", "registered"], "the second request has it still"
    slots.residency.leave(again)
    await slots.residency.ready(d)
    assert slots.tiers("a", "c", "d") == ["resident", "host", "resident"]
    slots.residency.leave(a)
    slots.residency.leave(d)
    assert slots.residency.awaited == 0


@run
async def test_a_wait_ends_with_an_honest_refusal_and_leaves_nothing() -> None:
    slots = Slots(slots=1, timeout=1)
    a = await slots.held("a")
    b = slots.want("b")
    with pytest.raises(AdapterCapacityError, match="all adapter slots are in use") as refused:
        await slots.residency.ready(b)
    assert refused.value.retry_after == 1
    slots.residency.leave(b)
    assert slots.residency.awaited == 0 and not slots.residency.awaited_names
    slots.residency.leave(a)
    await asyncio.sleep(0.05)
    assert slots.engine.told == ["load a"], "nobody waits for it any more"
    await slots.use("b")


@run
async def test_two_that_are_never_idle_give_way_to_a_third() -> None:
    slots = Slots()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TURN_SECONDS", 0.01)
        busy: dict[str, Hold] = {"a": await slots.held("a"), "b": await slots.held("b")}
        c = slots.want("c")
        for _ in range(100):  # each has a new request before its last one ends
            for name, hold in list(busy.items()):
                following = slots.want(name)
                slots.residency.leave(hold)
                busy[name] = following
            await asyncio.sleep(0.005)
            if c.coming is None:
                break
        assert "c" in slots.engine.resident
        slots.residency.leave(c)
        for hold in busy.values():
            await slots.residency.ready(hold)
            slots.residency.leave(hold)


@run
async def test_one_that_was_to_give_way_stays_where_room_is_found_elsewhere() -> None:
    slots = Slots()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TURN_SECONDS", 0.01)
        a, b, c = await slots.held("a"), await slots.held("b"), slots.want("c")
        await asyncio.sleep(0.05)  # both are to give way
        waits = slots.want("a")
        assert waits.coming is not None
        slots.residency.leave(b)
        await slots.residency.ready(c)
        await slots.residency.ready(waits)
        assert slots.tiers("a", "b", "c") == ["resident", "host", "resident"]
        assert slots.engine.told.count("load a") == 1
        for hold in (a, c, waits):
            slots.residency.leave(hold)


@run
async def test_a_burst_of_cold_adapters_loads_as_many_as_there_are_slots() -> None:
    slots = Slots(slots=2, host=1)
    slots.engine.gate.clear()
    wanted = [slots.want(f"n{i}") for i in range(20)]
    await asyncio.sleep(0.02)
    assert len(slots.engine.told) == 2
    slots.engine.gate.set()
    for hold in wanted:
        await slots.residency.ready(hold)
        slots.residency.leave(hold)
    assert len(slots.engine.resident) == 2 and len(slots.engine.host) == 1


@run
async def test_what_is_kept_stays_and_one_slot_is_left() -> None:
    slots = Slots(slots=2)
    await slots.residency.admit(AdapterKey("k", 1), slots.engine.load("k"), keep=True)
    await slots.use("a", "b", "c")
    assert slots.tiers("k", "a", "b", "c") == ["resident", "host", "host", "resident"]
    with pytest.raises(AdapterCapacityError, match="one of the 2 slots"):
        await slots.residency.admit(AdapterKey("l", 1), slots.engine.load("l"), keep=True)
    with pytest.raises(AdapterCapacityError):
        slots.residency.keep(AdapterKey("c", 1), True)
    new = AdapterKey("k2", 1)  # in its place
    await slots.residency.admit(new, slots.engine.load("k2"), keep=True, replaces=AdapterKey("k", 1))
    slots.residency.forget(AdapterKey("k", 1))
    slots.residency.keep(new, False)
    await slots.use("a", "b")
    assert slots.tiers("a", "b") == ["resident", "resident"]


@run
async def test_a_load_takes_a_free_slot_and_else_pushes_nobody_out() -> None:
    slots = Slots(slots=2, host=2)
    for name in "abcde":
        await slots.residency.admit(AdapterKey(name, 1), slots.engine.load(name))
    assert slots.tiers("a", "b") == ["resident", "resident"]
    assert slots.residency.host.bytes == 2 * SIZE
    await slots.use("c", "d")
    before = set(slots.residency.host)
    await slots.residency.admit(AdapterKey("f", 1), slots.engine.load("f"))
    assert set(slots.residency.host) == before, "what was used stays, what was never asked for goes"
    new = AdapterKey("g", 1)
    await slots.residency.admit(new, slots.engine.load("g"), replaces=AdapterKey("d", 1))
    assert slots.tiers("g") == ["resident"], "a name that is in use goes on without a wait"


@run
async def test_a_load_that_fails_frees_its_slot_and_is_told_to_all_that_wait() -> None:
    slots = Slots(slots=1)
    await slots.use("a", "b")
    slots.engine.refusals = [StorageError("gone")]
    one, two = slots.want("a"), slots.want("a")
    for hold in (one, two):
        with pytest.raises(StorageError, match="gone"):
            await slots.residency.ready(hold)
        slots.residency.leave(hold)
    assert slots.tiers("a", "b") == ["host", "host"]
    await slots.use("a")


@run
async def test_memory_is_made_of_what_nobody_holds_but_not_in_vain() -> None:
    slots = Slots(slots=3, host=0)
    await slots.use("a", "b")
    slots.engine.refusals = [AdapterCapacityError("memory", missing=2 * SIZE + 1)]
    hold = slots.want("c")
    with pytest.raises(AdapterCapacityError, match="memory"):
        await slots.residency.ready(hold)
    slots.residency.leave(hold)
    assert slots.tiers("a", "b") == ["resident", "resident"]
    slots.engine.refusals = [AdapterCapacityError("memory", missing=SIZE + 1)]
    await slots.use("c")
    assert slots.tiers("a", "b", "c") == ["registered", "registered", "resident"]


@run
async def test_a_name_that_is_unloaded_while_it_loads_leaves_at_once() -> None:
    slots = Slots()
    slots.engine.gate.clear()
    hold = slots.want("a")
    await asyncio.sleep(0)
    slots.residency.leave(hold)  # the client has left
    slots.residency.forget(AdapterKey("a", 1))
    slots.engine.gate.set()
    await asyncio.sleep(0.02)
    assert not slots.engine.resident and slots.tiers("a") == ["registered"]
    await slots.use("b", "c", "d")


@run
async def test_a_new_engine_has_nothing_and_old_holds_end_quietly() -> None:
    slots = Slots(slots=1)
    a = await slots.held("a")
    waits = slots.want("b")
    slots.engine.resident.clear()
    slots.residency.reset()
    slots.residency.leave(a)
    await slots.residency.ready(waits)
    assert slots.tiers("a", "b") == ["registered", "resident"]
    slots.residency.leave(waits)
    slots.engine.refusals = [EngineDeadError("dead")]
    hold = slots.want("c")
    with pytest.raises(EngineDeadError):
        await slots.residency.ready(hold)
    slots.residency.leave(hold)
    await slots.use("a", "b")


@run
async def test_one_who_leaves_a_failed_load_late_takes_nobodys_place() -> None:
    """A request may hold it while it is tokenised: until then others may have sent for the adapter again."""
    slots = Slots(slots=1)
    slots.engine.refusals.append(AdapterCapacityError("memory", missing=10**9))
    first = slots.want("a")
    await asyncio.sleep(0.01)
    b, second = await slots.held("b"), slots.want("a")
    slots.residency.leave(first)
    assert slots.residency.awaited_names == {"a"}
    slots.residency.leave(b)
    await slots.residency.ready(second)
    assert slots.tiers("a", "b") == ["resident", "host"]


@run
async def test_two_that_are_loaded_at_once_leave_one_slot_too() -> None:
    slots = Slots()
    slots.engine.gate.clear()
    load = slots.engine.load
    both = [slots.residency.admit(AdapterKey(name, 1), load(name), keep=True) for name in "ab"]
    tasks = [asyncio.ensure_future(each) for each in both]
    await asyncio.sleep(0)
    slots.engine.gate.set()
    kept, refused = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(kept, AdapterInfo) and isinstance(refused, AdapterCapacityError)
    slots.engine.refusals.append(StorageError("full"))
    slots.residency.keep(AdapterKey("a", 1), False)
    with pytest.raises(StorageError):
        await slots.residency.admit(AdapterKey("b", 1), load("b"), keep=True)
    await slots.use("c", "d", "b")
    assert not slots.residency.kept(AdapterKey("b", 1)), "what failed is not kept"


@run
async def test_a_cached_one_that_is_unloaded_while_it_fails_to_load_is_gone() -> None:
    slots = Slots(slots=1)
    await slots.use("a", "b")
    slots.engine.gate.clear()
    slots.engine.refusals.append(AdapterCapacityError("memory", missing=10**9))
    hold = slots.want("a")
    await asyncio.sleep(0)
    slots.residency.leave(hold)
    slots.residency.forget(AdapterKey("a", 1))
    slots.engine.gate.set()
    await asyncio.sleep(0.01)
    assert slots.tiers("a") == ["registered"] and slots.engine.told[-1] == "unload a"
