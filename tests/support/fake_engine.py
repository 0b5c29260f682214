"""A fake of `tucka_runtime.engine.client.EngineClient`, for faults that a real engine does not have on demand.

Answers are letters, determined by the prompt's ids alone. Token ids are those of the byte tokenizers of tests/golden:
3 + the byte.
"""

import asyncio
import contextlib
import time
import zlib
from array import array
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from tucka_runtime.channel_messages import AdapterPart
from tucka_runtime.config import EngineConfig
from tucka_runtime.errors import EngineDeadError, InvalidAdapterError, TuckaError
from tucka_runtime.messages import (
    AdapterInfo,
    AdapterKey,
    EngineInfo,
    Finish,
    FinishReason,
    Request,
    Route,
    SequenceOutput,
    Timing,
)

VOCAB = 320


class FakeEngine:
    """`seconds_per_token`, what is said instead of letters (`script`), how many outputs a stream brings at once, as to
    a reader that is slow (`at_once`), and one fault: `fail_after` tokens every stream raises `failure`."""

    def __init__(self) -> None:
        self.config = EngineConfig()
        self.info = EngineInfo(
            "llama", VOCAB, 2048, (2,), "float32", "cpu", 4096, "fake", 2048, "reference", 2, 64, "float32"
        )
        self.members: tuple[str, ...] = ()
        self.ready = True
        self.restarts = 0
        self.silence = 0.0
        self.waiting: dict[str | None, float] = {}
        self.on_step = self.on_idle = None
        self.on_restart = None
        self.seconds_per_token = 0.0
        self.script: str | None = None
        self.at_once = 1
        self.fail_after: int | None = None
        self.failure: Exception = EngineDeadError("the fake engine died")
        self.submit_error: Exception | None = None
        self.requests: list[Request] = []
        self.aborted: set[str] = set()
        self.ended: set[tuple[str, int]] = set()
        self.loaded: dict[AdapterKey, Path] = {}
        self.load_error: TuckaError | None = None

    async def start(self) -> EngineInfo:
        return self.info

    async def stop(self, timeout: float) -> None:
        self.ready = False

    def submit(self, request: Request) -> "FakeStream":
        if self.submit_error is not None:
            raise self.submit_error
        self.requests.append(request)
        return FakeStream(self, request)

    async def load_adapter(
        self,
        key: AdapterKey,
        folder: Path,
        pinned: Route | None = None,
        blob: str | None = None,
        resident: bool = True,
    ) -> AdapterInfo:
        if self.load_error is not None:
            raise self.load_error
        if not (folder / "adapter_model.safetensors").is_file():
            raise InvalidAdapterError("no weights")
        await asyncio.sleep(0.01)
        if resident:
            self.loaded[key] = folder
        return AdapterInfo(
            key, folder.name, "tucka", 8, 3, 3, 2, 16.0, ("q_proj",), 4, "layers.0.q_proj",
            "pinned" if pinned else None, 1, None, members=self.members,
        )  # fmt: skip

    async def combine_adapters(
        self, key: AdapterKey, parts: tuple[AdapterPart, ...], resident: bool = True
    ) -> AdapterInfo:
        for part in parts:
            info = await self.load_adapter(key, part.folder, part.pinned, part.blob, resident)
        return replace(info, kind="combination")

    def evict_adapter(self, key: AdapterKey) -> None:
        self.loaded.pop(key, None)

    def unload_adapter(self, key: AdapterKey) -> None:
        self.loaded.pop(key, None)


class FakeStream(AsyncIterator[list[SequenceOutput]]):
    def __init__(self, engine: FakeEngine, request: Request):
        self._engine = engine
        self.request_id = request.id
        self._outputs = self._run(request)

    async def __anext__(self) -> list[SequenceOutput]:
        found = [await anext(self._outputs)]
        with contextlib.suppress(StopAsyncIteration):
            while len(found) < self._engine.at_once:
                found.append(await anext(self._outputs))
        return found

    def end(self, index: int) -> None:
        self._engine.ended.add((self.request_id, index))

    def abort(self) -> None:
        self._engine.aborted.add(self.request_id)

    async def _run(self, request: Request):
        script = None if self._engine.script is None else self._engine.script.encode()
        count = request.sampling.max_tokens if script is None else len(script)
        begin = time.monotonic()
        for step in range(max(count, 1)):
            if self._engine.fail_after == step:
                raise self._engine.failure
            await asyncio.sleep(self._engine.seconds_per_token)
            for index in range(request.num_sequences):
                prompt = request.prompts[index // request.n]
                letter = 97 + zlib.crc32(repr((prompt, step)).encode()) % 26 if script is None else script[step]
                last = step >= count - 1
                yield SequenceOutput(
                    request.id,
                    index,
                    [3 + letter] if count else [],
                    embedding=array("f", [1.0, *[0.0] * 63]) if request.pooling else None,
                    timing=Timing(begin, begin, time.monotonic(), 0.0) if step == 0 else None,
                    finish=Finish(FinishReason.LENGTH if script is None else FinishReason.STOP) if last else None,
                )
