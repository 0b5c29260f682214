"""Which adapters are in the engine's slots, which in its host cache, and who waits for one.

A request holds its adapter's slot from when it has one until the request's end. Where no slot is free, the adapter that
was used least recently and that nobody holds goes into the host cache; what the host cache cannot hold is on the disk
alone. The engine does as it is told: all that is decided is decided here, in the event loop's one thread.
"""

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict, deque
from itertools import islice

from tucka_runtime.engine.client import EngineClient
from tucka_runtime.errors import AdapterCapacityError, EngineDeadError, TuckaError
from tucka_runtime.messages import AdapterInfo, AdapterKey
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service.coming import Coming, Hold, Load, Tier
from tucka_runtime.server.service.host_tier import HostTier

TURN_SECONDS = 1.0
"""While all slots are held, the adapter that has had one longest gives way to those that wait, one in so many seconds:
its new requests wait behind them. Without it, two adapters that are never idle would keep a third out for ever."""


class Residency:
    """The slots and the host cache of an engine. Sizes are bytes of folded adapters, to the byte."""

    def __init__(self, engine: EngineClient, metrics: Metrics):
        config = engine.config
        self._engine, self._metrics = engine, metrics
        self._slots, self._timeout = config.adapter_slots, config.adapter_wait_timeout
        self.host = HostTier(config.adapter_host_bytes)
        self._resident: OrderedDict[AdapterKey, AdapterInfo] = OrderedDict()  # least recently used first
        self._since: dict[AdapterKey, None] = {}  # the same in the order in which they came
        self._loading: set[AdapterKey] = set()  # these have slots already
        self._forgotten: set[AdapterKey] = set()  # of those that are loading
        self._kept: set[AdapterKey] = set()
        self._giving_way: set[AdapterKey] = set()
        self._held: Counter[AdapterKey] = Counter()
        self._coming: dict[AdapterKey, Coming] = {}
        self._queue: deque[AdapterKey] = deque()  # of those coming, the ones without a slot
        self._turn: asyncio.TimerHandle | None = None

    def tier(self, key: AdapterKey) -> Tier:
        if key in self._resident:
            return Tier.RESIDENT
        return Tier.HOST if key in self.host else Tier.REGISTERED

    def kept(self, key: AdapterKey) -> bool:
        return key in self._kept

    def residents(self) -> list[tuple[AdapterKey, AdapterInfo]]:
        return list(self._resident.items())

    @property
    def awaited(self) -> int:
        """How many requests wait for their adapter."""
        return sum(len(coming.holds) for coming in self._coming.values())

    @property
    def awaited_names(self) -> frozenset[str]:
        """The names of the adapters that are waited for."""
        return frozenset([key.name for key in self._coming])

    def want(self, key: AdapterKey, load: Load) -> Hold:
        """Holds the adapter's slot, or sends for it at once: `ready` waits."""
        hold = Hold(key)
        self._metrics.adapter_looked_up(self.tier(key))
        if key in self._resident and key not in self._giving_way:
            self._take(hold)
            return hold
        coming = self._coming.get(key)
        if coming is None:
            coming = self._coming[key] = Coming(load)
            self._queue.append(key)
        hold.coming = coming
        coming.holds.add(hold)
        self._assign()
        return hold

    async def ready(self, hold: Hold) -> None:
        """Waits until the adapter has its slot. Raises AdapterCapacityError if that takes too long, or what loading it
        raised."""
        if (coming := hold.coming) is None:
            return
        begin = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                await coming.done.wait()
        except TimeoutError:
            where = "all adapter slots are in use" if hold.key in self._queue else "it is still being loaded"
            error = AdapterCapacityError(
                f"The adapter got no slot within {self._timeout} s (--adapter-wait-timeout): {where}. Try again later.",
                "model",
            )
            error.retry_after = self._timeout
            raise error from None
        finally:
            self._metrics.adapter_waited(time.monotonic() - begin)
        if coming.error is not None:
            raise coming.error

    def leave(self, hold: Hold) -> None:
        """Ends a hold, once."""
        if (coming := hold.coming) is not None:
            coming.holds.discard(hold)
            # Nobody waits for it any more; where it has failed, another of its key may be waited for since.
            if not coming.holds and self._coming.get(hold.key) is coming and hold.key in self._queue:
                self._queue.remove(hold.key)
                del self._coming[hold.key]
        else:
            self._held[hold.key] -= 1
            if not self._held[hold.key]:
                del self._held[hold.key]
        self._assign()

    async def admit(
        self, key: AdapterKey, load: Load, keep: bool = False, replaces: AdapterKey | None = None
    ) -> AdapterInfo:
        """Loads a new generation: into a slot if one is free, else into the host cache, as the first to leave it. What
        `replaces` a resident one takes the slot of any that nobody holds; so does what is to be kept, and keeps it.

        Raises AdapterCapacityError if no slot can be had for one that is to be kept, and what `load` raises."""
        if keep:
            self._check_kept(replaces)
        pushes = keep or replaces in self._resident
        seated = (self._free > 0 and not self._queue) or (pushes and self._make_room())
        if keep and not seated:
            raise AdapterCapacityError("All adapter slots are in use, so that none can be kept. Try again later.")
        if seated:
            self._loading.add(key)
        if keep:  # before anything is waited for: another that is to be kept counts it
            self._kept.add(key)
        try:
            info = await self._load(load, seated)
        except BaseException:
            self._loading.discard(key)
            self._kept.discard(key)
            self._assign()
            raise
        if key in self._loading:
            self._arrive(key, info)
        elif not seated:
            self.host.put(key, info.bytes, used=False)
            self._trim()
        self._assign()
        return info

    def keep(self, key: AdapterKey, keep: bool) -> None:
        """Whether the adapter is evicted never, or like any other. Raises AdapterCapacityError."""
        if keep and key not in self._kept:
            self._check_kept(None)
            self._kept.add(key)
        elif not keep:
            self._kept.discard(key)
        self._assign()

    def forget(self, key: AdapterKey) -> None:
        """Unloads a generation that no name stands for and no request uses."""
        self._kept.discard(key)
        if key in self._loading:
            self._forgotten.add(key)
            return
        self._leave_slot(key)
        self.host.pop(key)
        self._unload(key)
        self._assign()

    def reset(self) -> None:
        """The engine is a new one, and holds nothing."""
        for key in list(self._resident):
            self._leave_slot(key)
        self.host.clear()
        self._loading.clear()

    @property
    def _free(self) -> int:
        return self._slots - len(self._resident) - len(self._loading)

    def _take(self, hold: Hold) -> None:
        hold.coming = None
        self._held[hold.key] += 1
        self._resident.move_to_end(hold.key)

    def _check_kept(self, replaced: AdapterKey | None) -> None:
        if len(self._kept - {replaced}) >= self._slots - 1:
            raise AdapterCapacityError(
                f"{len(self._kept)} adapters are kept resident, and one of the {self._slots} slots has to be left for "
                "all others. Unload one of them, or raise --adapter-slots."
            )

    def _assign(self) -> None:
        """Gives slots to those that wait, the first first."""
        while self._queue:
            key = self._queue[0]
            if key in self._resident:  # it was to give way, and need not any more
                self._giving_way.discard(key)
                self._queue.popleft()
                self._finish(key, self._coming.pop(key))
            elif self._free or self._make_room():
                self._queue.popleft()
                self._loading.add(key)
                coming = self._coming[key]
                coming.task = asyncio.get_running_loop().create_task(self._bring(key, coming))
            else:
                if self._turn is None:
                    self._turn = asyncio.get_running_loop().call_later(TURN_SECONDS, self._next_turn)
                return

    def _next_turn(self) -> None:
        """One more adapter gives way: as soon as its requests end, its slot is another's."""
        self._turn = None
        if self._queue:
            eldest = (key for key in self._since if key not in self._kept and key not in self._giving_way)
            self._giving_way.update(islice(eldest, 1))
            self._assign()

    def _make_room(self) -> bool:
        """Evicts the adapter that was used least recently, of those that nobody holds; whether there is one."""
        idle = (key for key in self._resident if not self._held[key] and key not in self._kept)
        if (victim := next(idle, None)) is None:
            return False
        self._evict(victim)
        return True

    def _evict(self, key: AdapterKey) -> None:
        self.host.put(key, self._resident[key].bytes)
        self._leave_slot(key)
        with contextlib.suppress(EngineDeadError):
            self._engine.evict_adapter(key)
        self._metrics.adapter_evicted(Tier.RESIDENT)
        self._trim()

    def _trim(self) -> None:
        while (key := self.host.surplus()) is not None:
            self._drop_cached(key)

    def _drop_cached(self, key: AdapterKey) -> None:
        self.host.pop(key)
        self._unload(key)
        self._metrics.adapter_evicted(Tier.HOST)

    def _unload(self, key: AdapterKey) -> None:
        """An engine that is down has nothing to unload."""
        with contextlib.suppress(EngineDeadError):
            self._engine.unload_adapter(key)

    def _leave_slot(self, key: AdapterKey) -> None:
        if self._resident.pop(key, None) is not None:
            del self._since[key]
            self._giving_way.discard(key)
            self._metrics.adapter_left(key)

    def _arrive(self, key: AdapterKey, info: AdapterInfo) -> None:
        """The engine has it in its slot."""
        self._loading.discard(key)
        if key in self._forgotten:
            self._forgotten.discard(key)
            self._unload(key)
            return
        self._resident[key] = info
        self._since[key] = None
        self._metrics.adapter_arrived(info)

    async def _bring(self, key: AdapterKey, coming: Coming) -> None:
        """Loads an adapter that has its slot, and lets those in who wait for it."""
        begin = time.monotonic()
        cached = self.host.pop(key)
        try:
            info = await self._load(coming.load, True)
        except TuckaError as error:
            coming.error = error
            if key in self._loading and cached is not None:
                if key in self._forgotten:
                    self._unload(key)
                else:
                    self.host.put(key, cached)
        else:
            if key in self._loading:  # else the engine has died since
                self._metrics.adapter_brought("load" if cached is None else "activate", time.monotonic() - begin)
                self._arrive(key, info)
            else:
                coming.error = EngineDeadError("The engine is restarting. Try again later.")
        self._loading.discard(key)
        self._forgotten.discard(key)
        self._finish(key, self._coming.pop(key))
        self._assign()

    def _finish(self, key: AdapterKey, coming: Coming) -> None:
        for hold in coming.holds if coming.error is None and key in self._resident else ():
            self._take(hold)
        coming.done.set()

    async def _load(self, load: Load, seated: bool) -> AdapterInfo:
        """Loads, and pushes out others where it is their memory that is missing."""
        while True:
            try:
                return await load(seated)
            except AdapterCapacityError as error:
                if not self._free_memory(error.missing):
                    raise

    def _free_memory(self, missing: int) -> bool:
        """Pushes out as many adapters that nobody holds as have so many bytes. False if all of them together have less:
        then they stay. On a CPU the host cache lies in the same memory, which only those leave that leave both."""
        shared = self._engine.info is not None and self._engine.info.device == "cpu"
        idle = [key for key in self._resident if not self._held[key] and key not in self._kept]
        room = sum(self._resident[key].bytes for key in idle) + (self.host.bytes if shared else 0)
        if not 0 < missing <= room:
            return False
        goal = room - missing
        while shared and room > goal and (key := self.host.first()) is not None:
            room -= self.host.size(key)
            self._drop_cached(key)
        for key in idle:
            if room > goal:
                room -= self._resident[key].bytes
                self._evict(key)
                if shared and key in self.host:
                    self._drop_cached(key)
        return True
