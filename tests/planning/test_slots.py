"""The slots on paper are held to the server's own `Residency`: the same calls, the same adapters in the same places."""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from tests.support.figures import adapter
from tucka_runtime.config import EngineConfig
from tucka_runtime.messages import AdapterInfo, AdapterKey
from tucka_runtime.planning.slots import Slots
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service import residency as module
from tucka_runtime.server.service.coming import Hold
from tucka_runtime.server.service.residency import Residency


class Engine:
    """Loads adapters one after the other, each when it is told that it is done."""

    def __init__(self, slots: int, host: int) -> None:
        size = adapter("0").bytes * host
        self.config = EngineConfig(adapter_slots=slots, adapter_host_bytes=size, adapter_wait_timeout=1000)
        self.info = None
        self.under_way: deque[asyncio.Future[None]] = deque()

    def load(self, name: str) -> Callable[[bool], Coroutine[Any, Any, AdapterInfo]]:
        async def load(resident: bool) -> AdapterInfo:
            self.under_way.append(asyncio.get_running_loop().create_future())
            await self.under_way[-1]
            return adapter(name)

        return load

    def evict_adapter(self, key: AdapterKey) -> None: ...

    def unload_adapter(self, key: AdapterKey) -> None: ...


async def follow(slots: int, host: int, calls: list[tuple[str, int]]) -> None:
    engine = Engine(slots, host)
    real = Residency(engine, Metrics())  # type: ignore[arg-type]
    paper = Slots(slots, host, lambda cached: 0.5, lambda when, event: None)
    holds: dict[int, Hold] = {}
    ready: list[int] = []
    for request, (call, number) in enumerate(calls):
        if call == "want":
            holds[request] = real.want(AdapterKey(str(number), 1), engine.load(str(number)))
            ready += paper.want(number, request, 0.0)
        elif call == "leave" and ready:
            ended = ready.pop(number % len(ready))
            hold = holds.pop(ended)
            real.leave(hold)
            ready += paper.leave(int(hold.key.name), 0.0)
        elif call == "loaded" and engine.under_way:
            engine.under_way.popleft().set_result(None)
            await settled()
            paper.done(0.0)
            ready += paper.loaded(0.0)
        elif call == "turn" and real._turn is not None:
            real._turn.cancel()
            real._next_turn()
            ready += paper.turn(0.0)
        await settled()
        assert set(ready) == {request for request, hold in holds.items() if hold.coming is None}
        assert list(paper._resident) == [int(key.name) for key, _ in real.residents()]
        assert list(paper._host) == [int(key.name) for key in real.host]
        assert paper._turn_due == (real._turn is not None)
    wanted = [call for call, _ in calls].count("want")
    assert paper.lookups == wanted
    if real._turn is not None:
        real._turn.cancel()
    for future in engine.under_way:
        future.cancel()


async def settled() -> None:
    """All that can go on has."""
    for _ in range(6):
        await asyncio.sleep(0)


CALLS = st.lists(
    st.tuples(st.sampled_from(["want", "want", "leave", "loaded", "loaded", "turn"]), st.integers(0, 5)), max_size=60
)


@example_settings(max_examples=60, deadline=None)
@given(slots=st.integers(1, 3), host=st.integers(0, 2), calls=CALLS)
def test_paper_and_server_agree(slots: int, host: int, calls: list[tuple[str, int]]) -> None:
    assert module.TURN_SECONDS == 1.0  # what the paper has
    asyncio.run(follow(slots, host, calls))
