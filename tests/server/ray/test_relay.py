"""A request's way through Serve's actors, without Serve: what a client sees of an answer that ends, and of one that
cannot."""

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from tucka_runtime.errors import EngineDeadError
from tucka_runtime.server.http.stream import EventStream
from tucka_runtime.server.ray.relay import MOST_UNTAKEN, Forwarded, Relayed, answered

REQUEST = Forwarded("POST", "/v1/completions", b"/v1/completions", b"", ((b"a", b"b"),), ("h", 1), b"body")
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
FIRST = {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True}


async def frames(count: int) -> AsyncGenerator[bytes, None]:
    for i in range(count):
        await asyncio.sleep(0)
        yield b"%d" % i


def test_a_stream_comes_whole() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["path"] == "/v1/completions" and (await receive())["body"] == b"body"
        await EventStream(b"first", frames(1000))(scope, receive, send)

    async def run() -> list[list[Message]]:
        return [messages async for messages in answered(app, REQUEST)]

    batches = asyncio.run(run())
    start, *rest = [message for batch in batches for message in batch]
    assert start["status"] == 200 and max(map(len, batches)) <= MOST_UNTAKEN + 2
    assert b"".join(part["body"] for part in rest) == b"first" + b"".join(b"%d" % i for i in range(1000))
    assert [part["more_body"] for part in rest] == [True] * 1001 + [False]


def test_an_application_waits_for_who_takes_nothing_and_sees_who_leaves() -> None:
    sent = 0
    seen: list[type[BaseException]] = []

    async def endless() -> AsyncGenerator[bytes, None]:
        nonlocal sent
        while True:
            sent += 1
            yield b"x"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await EventStream(b"first", endless())(scope, receive, send)
        except ClientDisconnect as error:
            seen.append(type(error))

    async def run() -> None:
        answer = answered(app, REQUEST)
        await anext(answer)
        for _ in range(100):
            await asyncio.sleep(0)
        await answer.aclose()

    asyncio.run(run())
    assert seen == [ClientDisconnect] and sent <= 2 * MOST_UNTAKEN + 2


def relayed(path: str, *batches: list[Message], error: Exception | None = None) -> list[Message]:
    """What the client is sent of an answer that ends with the error, if any."""
    sent: list[Message] = []

    async def answer() -> AsyncGenerator[list[Message], None]:
        for batch in batches:
            yield batch
        if error is not None:
            raise error

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError

    scope = {"type": "http", "path": path, "state": {"request_id": "r"}}
    asyncio.run(Relayed(answer())(scope, receive, send))
    return sent


def test_an_answer_goes_through_as_it_is() -> None:
    last = {"type": "http.response.body", "body": b"", "more_body": False}
    assert relayed("/v1/completions", [START], [FIRST, last]) == [START, FIRST, last]
    assert relayed("/v1/completions", [START, last], error=EngineDeadError("late")) == [START, last]


@pytest.mark.parametrize("begun", [[], [[START]]])
def test_what_has_not_begun_is_an_error_that_can_be_tried_again(begun: list[list[Message]]) -> None:
    start, body = relayed("/v1/completions", *begun, error=EngineDeadError("gone"))
    assert start["status"] == 503 and dict(start["headers"])[b"retry-after"]
    assert json.loads(body["body"])["error"]["code"] == "engine_unavailable"


def test_a_stream_that_has_begun_ends_with_an_error_of_its_door() -> None:
    def last(path: str) -> tuple[str, dict[str, object]]:
        *_, end = relayed(path, [START, FIRST], error=EngineDeadError("gone"))
        assert end["more_body"] is False
        *event, data = end["body"].decode().strip().splitlines()
        return "".join(event), json.loads(data.removeprefix("data: "))

    name, openai = last("/v1/chat/completions")
    assert name == "" and openai["error"]["code"] == "engine_unavailable"  # type: ignore[index]
    name, anthropic = last("/v1/messages")
    assert name == "event: error" and anthropic["error"]["type"] == "overloaded_error"  # type: ignore[index]
    name, responses = last("/v1/responses")
    assert name == "event: error" and responses["type"] == "error" and responses["code"] == "engine_unavailable"


def test_what_is_no_stream_breaks_off() -> None:
    whole = START | {"headers": [(b"content-type", b"application/json"), (b"content-length", b"20")]}
    with pytest.raises(EngineDeadError):
        relayed("/v1/completions", [whole, FIRST], error=EngineDeadError("gone"))
