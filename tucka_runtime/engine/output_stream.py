"""What comes of one request, as its reader in the API process sees it."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from tucka_runtime.errors import TuckaError
from tucka_runtime.messages import Request, SequenceOutput

if TYPE_CHECKING:
    from tucka_runtime.engine.client import EngineClient


class OutputStream(AsyncIterator[SequenceOutput]):
    """The outputs of one request, sequences interleaved; ends when each has had its finish reason.

    Raises EngineDeadError if the engine dies, and the engine's error if it refused the request.
    """

    def __init__(self, client: "EngineClient", request: Request):
        self._client = client
        self._queue: asyncio.Queue[SequenceOutput | TuckaError] = asyncio.Queue()
        self.request_id = request.id
        self.unfinished = request.num_sequences

    async def __anext__(self) -> SequenceOutput:
        if not self.unfinished and self._queue.empty():
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, TuckaError):
            raise item
        return item

    def put(self, item: SequenceOutput | TuckaError) -> None:
        if isinstance(item, TuckaError):
            self.unfinished = 0
        elif item.finish is not None:
            self.unfinished -= 1
        self._queue.put_nowait(item)

    def end(self, index: int) -> None:
        """Ends one sequence in the engine, whose last output then says "abort"; the others go on."""
        self._client.end(self, index)

    def abort(self) -> None:
        """Ends what is left of the request in the engine. Is for the stream's one reader, when it reads no more;
        harmless when the stream is over."""
        self._client.forget(self)
        self.unfinished = 0
