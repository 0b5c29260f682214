"""What a request's reader gets of it, and when."""

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.driving import ask, prompt
from tucka_runtime.engine.output_stream import OutputStream
from tucka_runtime.errors import EngineDeadError
from tucka_runtime.messages import Finish, FinishReason, SequenceOutput


def stream(n: int = 1) -> OutputStream:
    client: Any = SimpleNamespace(forget=lambda stream: None)
    return OutputStream(client, ask(prompt(3), n=n))


def output(index: int, *token_ids: int, ends: bool = False) -> SequenceOutput:
    return SequenceOutput("r", index, list(token_ids), finish=Finish(FinishReason.LENGTH) if ends else None)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


def test_a_step_comes_at_once() -> None:
    """What one message brought a request's sequences is one answer's write."""

    async def main() -> None:
        three = stream(3)
        reading = asyncio.ensure_future(anext(three))
        await asyncio.sleep(0)
        step = [output(index, 5) for index in range(3)]
        for each in step:
            three.put(each)
        assert await reading == step

    run(main())


def test_what_came_before_an_error_is_read_first() -> None:
    async def main() -> None:
        one = stream()
        one.put(output(0, 5))
        one.put(EngineDeadError("gone"))
        assert await anext(one) == [output(0, 5)]
        with pytest.raises(EngineDeadError):
            await anext(one)

    run(main())


def test_it_ends_with_the_last_sequence_or_when_nobody_reads() -> None:
    async def main() -> None:
        two, left = stream(2), stream()
        two.put(output(1, ends=True))
        two.put(output(0, 5))
        two.put(output(0, ends=True))
        assert [len(outputs) async for outputs in two] == [3]
        left.abort()
        assert [outputs async for outputs in left] == []

    run(main())


def test_a_reader_that_gives_up_waiting_loses_nothing() -> None:
    async def main() -> None:
        one = stream()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(one), 0.01)
        one.put(output(0, 5, ends=True))
        assert [outputs async for outputs in one] == [[output(0, 5, ends=True)]]

    run(main())
