"""What comes of one request, as its reader in the API process sees it."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from tucka_runtime.errors import TuckaError
from tucka_runtime.messages import Request, SequenceOutput

if TYPE_CHECKING:
    from tucka_runtime.engine.client import EngineClient


class OutputStream(AsyncIterator[list[SequenceOutput]]):
    """The outputs of one request, sequences interleaved, as many at once as have come: those of one step, unless its
    one reader was slower. Ends when each sequence has had its finish reason.

    Raises EngineDeadError if the engine dies, and the engine's error if it refused the request.
    """

    def __init__(self, client: "EngineClient", request: Request):
        self._client = client
        self._came: list[SequenceOutput] = []
        self._error: TuckaError | None = None
        self._waiting: asyncio.Future[None] | None = None
        self.request_id = request.id
        self.flow = request.flow
        self.submitted = time.monotonic()
        self.unfinished = request.num_sequences
        self._begun: set[int] = set()
        self._num_sequences = request.num_sequences

    @property
    def waiting(self) -> int:
        """Sequences of which nothing has come yet."""
        return self._num_sequences - len(self._begun) if self.unfinished else 0

    async def __anext__(self) -> list[SequenceOutput]:
        if not self._came and self._error is None:
            if not self.unfinished:
                raise StopAsyncIteration
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        if self._came:
            came, self._came = self._came, []
            return came
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def put(self, item: SequenceOutput | TuckaError) -> None:
        if isinstance(item, TuckaError):
            self._error = item
            self.unfinished = 0
        else:
            self._came.append(item)
            self._begun.add(item.index)
            if item.finish is not None:
                self.unfinished -= 1
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def end(self, index: int) -> None:
        """Ends one sequence in the engine, whose last output then says "abort"; the others go on."""
        self._client.end(self, index)

    def abort(self) -> None:
        """Ends what is left of the request in the engine. Is for the stream's one reader, when it reads no more;
        harmless when the stream is over."""
        self._client.forget(self)
        self.unfinished = 0
