"""A stand-in for an OpenAI-compatible server whose every delay is known: what the tester reports can be held to it.

    python fake_server.py '{"ttft": 0.05, "itl": 0.01}'      prints the port it listens on (127.0.0.1 only)

It has real sockets and real time, and runs in its own process so that its work is not the tester's lag. The answer
to a prompt is a function of (model, its adapter path, prompt) alone, unless it is told to misbehave.
"""

import asyncio
import hashlib
import json
import sys
from dataclasses import dataclass, field
from typing import Any

WORDS = "amber birch cedar delta ember fjord grove heath inlet jetty knoll larch marsh nadir oasis plume".split()


@dataclass
class Behaviour:
    """Delays in seconds, counts in requests. `every` = 3 means the 3rd, 6th, ... generation request misbehaves."""

    ttft: float = 0.0  # from the request's arrival (or its slot) to the first text
    itl: float = 0.0  # between events
    slots: int = 0  # requests served at once; the others wait (0: no limit)
    bundle: int = 1  # tokens in one event
    cold: float = 0.0  # added to the first TTFT of an adapter after a load
    load: float = 0.0  # a load takes this long
    role_event_at: float = -1.0  # an event without text, this long after arrival (as chat servers send)
    reasoning: int = 0  # events of reasoning before the text, `itl` apart
    final_event: bool = False  # finish_reason comes in an event of its own, without text
    usage: bool = True
    done: bool = True  # send [DONE]
    stamps: bool = False  # the answer's words are the times (CLOCK_MONOTONIC) at which they were sent
    every: int = 0
    after: int = 0  # behave for this many requests first
    misbehave: str = ""  # status:429 | cut | error_event | stall | garbage | leak | random | flip (one word)
    margin: float = 9.0  # nats between a word and its runner-up, where log-probabilities are asked for
    route: str = "known"  # the field `route`: known | refused | ignored (as vLLM does with fields it does not know)
    refuse: str = ""  # answer 400 to this field
    adapters: dict[str, str] = field(default_factory=dict)  # name -> path
    aliases: dict[str, str] = field(default_factory=dict)  # name -> adapter; with any, adapters' cards are TuckA's


def answer(identity: str, prompt: str, tokens: int) -> list[str]:
    """`tokens` words that depend on every character of who answers and what is asked."""
    words = []
    for i in range(tokens):
        digest = hashlib.sha256(f"{identity}\0{prompt}\0{i}".encode()).digest()
        words.append(" " + WORDS[digest[0] % len(WORDS)])
    return words


class FakeServer:
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.adapters = dict(behaviour.adapters)
        self.fresh: set[str] = set()
        self.inplace: set[str] = set()  # loaded in place last: vLLM reads those from disk at every step
        self.count = 0
        self.slots = asyncio.Semaphore(behaviour.slots or 10**6)

    async def serve(self) -> None:
        server = await asyncio.start_server(self.connection, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                request_line, *lines = head.decode().split("\r\n")
                headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self.respond(writer, request_line.split()[1], json.loads(body) if body else {})
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def respond(self, writer: asyncio.StreamWriter, path: str, body: dict[str, Any]) -> None:
        if path == "/v1/models":
            cards = [{"id": "base", "object": "model", "root": "base", "parent": None}]
            cards += [
                {"id": n, "object": "model", "root": p, "parent": "base", "inplace": n in self.inplace}
                for n, p in self.adapters.items()
            ]
            if self.behaviour.aliases:
                cards = [card | ({"tucka": {}} if card["parent"] else {}) for card in cards]
                cards += [cards[0] | {"id": n, "parent": "base"} for n in self.behaviour.aliases]
            self.plain(writer, 200, {"object": "list", "data": cards})
        elif path == "/v1/load_lora_adapter":
            await asyncio.sleep(self.behaviour.load)
            if "missing" in body["lora_path"]:
                return self.plain(writer, 400, {"error": {"message": "no such folder"}})
            if body["lora_name"] in self.adapters and not body.get("load_inplace"):
                return self.plain(writer, 400, {"error": {"message": "already loaded"}})
            self.adapters[body["lora_name"]] = body["lora_path"]
            self.fresh.add(body["lora_name"])
            (self.inplace.add if body.get("load_inplace") else self.inplace.discard)(body["lora_name"])
            self.plain(writer, 200, {})
        elif path == "/v1/unload_lora_adapter":
            known = self.adapters.pop(body["lora_name"], None)
            self.plain(writer, 200 if known else 404, {})
        elif path in ("/v1/completions", "/v1/chat/completions"):
            await self.generate(writer, body, chat="chat" in path)
        else:
            self.plain(writer, 404, {"error": {"message": "no such page"}})

    def plain(self, writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\n" % status)
        writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(data), data))

    async def generate(self, writer: asyncio.StreamWriter, body: dict[str, Any], chat: bool) -> None:
        b, loop = self.behaviour, asyncio.get_running_loop()
        self.count += 1
        mischief = b.misbehave if b.every and self.count > b.after and self.count % b.every == 0 else ""
        model = b.aliases.get(body["model"], body["model"])
        if model != "base" and model not in self.adapters:
            return self.plain(writer, 404, {"error": {"message": "no such model", "code": "model_not_found"}})
        refused = {"known": body.get("route") not in (None, "batch", "request"), "refused": "route" in body}
        if refused.get(b.route) or b.refuse in body:
            return self.plain(writer, 400, {"error": {"message": "not supported"}})
        if mischief.startswith("status:"):
            return self.plain(writer, int(mischief[7:]), {"error": {"message": "as told"}})
        path = self.adapters.get(model, "base")
        if mischief == "leak":
            path = next(p for p in ("base", *self.adapters.values()) if p != path)
        prompt = json.dumps(body.get("messages")) if chat else body["prompt"]
        if isinstance(prompt, list):  # token ids
            prompt = " ".join(map(str, prompt))
        if mischief == "random":
            prompt += str(self.count)
        arrived = loop.time()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        if b.role_event_at >= 0:
            await asyncio.sleep(b.role_event_at)
            self.event(writer, self.choice("", None, chat))
        async with self.slots:
            begun = arrived if not b.slots else loop.time()
            begun += b.ttft + (b.cold if model in self.fresh else 0.0)
            self.fresh.discard(model)
            words = answer(path, prompt, body.get("max_tokens", 16))
            ranked = [(word, " " + WORDS[WORDS.index(word[1:]) - 1]) for word in words]
            if mischief == "flip":
                ranked[len(words) // 2] = ranked[len(words) // 2][::-1]
                words = [word for word, _ in ranked]
            for thought in range(b.reasoning):
                await asyncio.sleep(begun + thought * b.itl - loop.time())
                self.event(writer, {"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]})
            for i, start in enumerate(range(0, len(words), b.bundle), b.reasoning):
                await asyncio.sleep(begun + i * b.itl - loop.time())
                last = start + b.bundle >= len(words)
                if mischief and start >= len(words) // 2:
                    if mischief == "cut":
                        return writer.transport.abort()
                    if mischief == "stall":
                        await asyncio.sleep(3600)
                    if mischief == "garbage":
                        self.chunk(writer, b"data: {not json\n\n")
                    if mischief == "error_event":
                        self.event(writer, {"error": {"message": "engine died", "code": "engine_unavailable"}})
                        return self.chunk(writer, b"")
                finish = "length" if last and not b.final_event else None
                text = f" {loop.time():.6f}" if b.stamps else "".join(words[start : start + b.bundle])
                event = self.choice(text, finish, chat)
                if body.get("logprobs"):
                    event["choices"][0]["logprobs"] = self.logprobs(ranked[start : start + b.bundle], chat)
                self.event(writer, event)
        if b.final_event:
            self.event(writer, self.choice("", "length", chat))
        if b.usage:
            usage = {"prompt_tokens": len(str(prompt).split()), "completion_tokens": len(words)}
            self.event(writer, {"choices": [], "usage": usage})
        if b.done:
            self.chunk(writer, b"data: [DONE]\n\n")
        self.chunk(writer, b"")

    def choice(self, text: str, finish: str | None, chat: bool) -> dict[str, Any]:
        inner: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
        return {"choices": [{"index": 0, "finish_reason": finish, **inner}]}

    def logprobs(self, ranked: list[tuple[str, str]], chat: bool) -> dict[str, Any]:
        first, second = -0.1, -0.1 - self.behaviour.margin
        if chat:
            tops = [[{"token": a, "logprob": first}, {"token": b, "logprob": second}] for a, b in ranked]
            return {"content": [{"token": top[0]["token"], "logprob": first, "top_logprobs": top} for top in tops]}
        tokens = [word for word, _ in ranked]
        tops = [{a: first, b: second} for a, b in ranked]
        return {"tokens": tokens, "token_logprobs": [first] * len(tokens), "top_logprobs": tops}

    def event(self, writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
        self.chunk(writer, b"data: " + json.dumps(data).encode() + b"\n\n")

    def chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))


if __name__ == "__main__":
    asyncio.run(FakeServer(Behaviour(**json.loads(sys.argv[1]))).serve())
