"""A fake faulty server: a proxy before a real one that puts exactly one fault into what it passes on.

The faults are those that users of multi-adapter servers have reported. `FAULTS` has them by name.
"""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
from aiohttp import web

FAULTS = {
    "ignored": "every adapter answers as the base",
    "wrong": "beside others, the adapter that was loaded last answers as another",
    "touched": "the base answers as the adapter that was asked before it",
    "sticky": "every fifth time that the model changes, the one before answers",
    "batched": "the base answers as an adapter while three requests or more run",
    "zombie": "an unload changes nothing but the list of models",
    "remembered": "an answer that was given once under a name is given again whatever is loaded there",
    "leftover": "after a client went away, the next three requests are answered by its adapter",
    "evicted": "of more than four adapters the last answers for the first",
    "mixed": "a stream goes on with the new content when its name gets one",
    "kept": "a load in place is answered with 200 and not done",
    "dies": "after an unload under a running stream nothing is answered any more",
}


class FaultyProxy:
    """Counts and names are of what has passed; `path` of a name is what the client thinks is loaded there."""

    def __init__(self, upstream: str, fault: str | None) -> None:
        self.upstream, self.fault = upstream, fault
        self.paths: dict[str, str] = {}
        self.base = ""
        self.last = ""  # model of the last request
        self.changes = self.running = self.loads = self.left = 0
        self.leaver = ""
        self.zombies: set[str] = set()
        self.memory: dict[str, list[bytes]] = {}
        self.dead = False
        self.loaded = asyncio.Condition()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else {}
        if self.dead:
            return web.json_response({"error": {"message": "engine dead"}}, status=500)
        if request.path == "/v1/models":
            cards = (await self.call("GET", request.path, None))[1]
            self.base = next(card["id"] for card in cards["data"] if card["parent"] is None)
            return web.json_response({"data": [card for card in cards["data"] if card["id"] not in self.zombies]})
        if request.path == "/v1/load_lora_adapter":
            return await self.load(request.path, body)
        if request.path == "/v1/unload_lora_adapter":
            return await self.unload(request.path, body)
        return await self.generate(request, body)

    async def call(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        async with self.session.request(method, self.upstream + path, json=body) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if answer.content_type == "application/json" else text

    async def load(self, path: str, body: dict[str, Any]) -> web.Response:
        name = body["lora_name"]
        status, answer = 200, "kept"
        if not (self.fault == "kept" and body.get("load_inplace")):
            if name in self.zombies:
                await self.call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
                self.zombies.discard(name)
            status, answer = await self.call("POST", path, body)
        if status == 200:
            self.paths[name] = body["lora_path"]
            async with self.loaded:
                self.loads += 1
                self.loaded.notify_all()
        return web.json_response(answer, status=status)

    async def unload(self, path: str, body: dict[str, Any]) -> web.Response:
        self.paths.pop(body["lora_name"], None)
        if self.fault == "dies" and self.running:
            self.dead = True
        if self.fault == "zombie":
            self.zombies.add(body["lora_name"])
            return web.json_response({})
        status, answer = await self.call("POST", path, body)
        return web.json_response(answer, status=status)

    def answers_for(self, model: str) -> str:
        """Which model the fault has answer in the place of the one that was asked."""
        names = list(self.paths)
        before, self.last = self.last, model
        self.changes += model != before
        if self.left and model != self.leaver:
            self.left -= 1
            return self.leaver if self.leaver in self.paths else model
        other = {
            "ignored": self.base if model in self.paths else model,
            "wrong": names[0] if names and model == names[-1] else model,
            "touched": before if model == self.base and before in self.paths else model,
            "sticky": before if before in {*names, self.base} and self.changes % 5 == 0 else model,
            "batched": names[-1] if names and model == self.base and self.running >= 3 else model,
            "evicted": names[-1] if len(names) > 4 and model == names[0] else model,
        }
        return other.get(self.fault or "", model)

    async def generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        model = body["model"]
        key = json.dumps(body)
        self.running += 1
        try:
            sent = body | {"model": self.answers_for(model)}
            status, events = (200, self.memory.get(key)) if self.fault == "remembered" else (200, None)
            if events is None:
                status, events = await self.events(request.path, sent)
                if status == 200 and model in self.paths:
                    self.memory[key] = events
            if status != 200:
                return web.Response(body=b"".join(events), status=status, content_type="application/json")
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await self.pass_on(request, response, model, sent, events)
            return response
        finally:
            self.running -= 1

    async def events(self, path: str, body: dict[str, Any]) -> tuple[int, list[bytes]]:
        async with self.session.post(self.upstream + path, json=body) as answer:
            parts = (await answer.read()).split(b"\n\n")
            return answer.status, [part + b"\n\n" for part in parts[:-1]] if answer.status == 200 else parts

    async def pass_on(
        self, request: web.Request, response: web.StreamResponse, model: str, body: dict[str, Any], events: list[bytes]
    ) -> None:
        """Half of the answer, then the rest: of a long one beside other adapters when something was loaded, or the
        client has gone, so that it is running whatever the machine does meanwhile."""
        half, loads, content = len(events) // 2, self.loads, self.paths.get(model)
        await response.write(b"".join(events[:half]))
        if body["max_tokens"] > 32 and len(self.paths) > 1:
            while self.loads == loads and not self.dead:
                if request.transport is None or request.transport.is_closing():
                    if self.fault == "leftover":
                        self.leaver, self.left = model, 3
                    return
                await asyncio.sleep(0.005)
            if self.fault == "mixed" and self.paths.get(model) != content:
                events = (await self.events(request.path, body))[1]
        if not self.dead:
            await response.write(b"".join(events[half:]))


@contextmanager
def proxy(upstream: str, fault: str | None) -> Iterator[str]:
    """Runs one in a thread; gives its address."""
    assert fault is None or fault in FAULTS
    loop, started = asyncio.new_event_loop(), threading.Event()
    stop = asyncio.Event()
    address: list[str] = []

    async def serve() -> None:
        faulty = FaultyProxy(upstream, fault)
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", faulty.handle)
        runner = web.AppRunner(application, shutdown_timeout=0)
        async with aiohttp.ClientSession() as faulty.session:
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            address.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
            started.set()
            await stop.wait()
            await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert started.wait(10)
    yield address[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()
