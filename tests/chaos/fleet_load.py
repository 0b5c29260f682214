"""Clients of many servers: they stream chat after chat, to names drawn by Zipf's law, and note what is said."""

import asyncio
import itertools
import json
import random
import statistics
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import httpx

PROMPTS = {
    "formats": ["2024-03-05", "1999-12-31", "2011-07-19", "1234567"],
    "words": ["Please write garden backwards", "Please write window backwards", "Please write planet backwards"],
    "triage": ["I was charged twice for my chair. Thank you.", "My chair is broken."],
    "sql": ["How many users are there?", "Show all orders."],
}
RETRY_SECONDS = 1.0
BUSY = 600.0  # seconds that a busy machine may take for an answer, or to start servers


@dataclass
class Seen:
    """What the clients of a row saw. `by_server` counts answers by adapter and server."""

    seconds: float = 0.0
    right: int = 0
    tokens: int = 0
    wrong: int = 0
    cut: int = 0
    lost: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    firsts: list[float] = field(default_factory=list)
    by_server: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    hits: float = 0.0
    left: int = 0
    killed: int = 0

    def row(self, name: str) -> str:
        main = sum(max(counts.values()) for counts in self.by_server.values())
        firsts = sorted(self.firsts) or [0.0]
        errors = ", ".join(f"{count} × {kind}" for kind, count in sorted(self.errors.items())) or "none"
        return (
            f"| {name} | {main / max(sum(c.total() for c in self.by_server.values()), 1):.0%} | {self.hits:.0%} "
            f"| {self.right / self.seconds:.1f} | {self.tokens / self.seconds:.0f} "
            f"| {1e3 * statistics.median(firsts):.0f} | {1e3 * firsts[int(0.99 * (len(firsts) - 1))]:.0f} "
            f"| {self.wrong} | {self.cut} | {errors} | {self.lost} | {self.killed} | {self.left} |"
        )


HEAD = (
    "| servers | affinity | hits | requests/s | tokens/s "
    "| first token p50, ms | p99, ms | wrong | cut | errors | lost | killed | left |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Answer:
    """`error` is what the client was told, `cut` that a stream just ended."""

    text: str = ""
    error: str = ""
    cut: bool = False
    tokens: int = 0
    first: float = 0.0
    server: str = ""


async def ask(client: httpx.AsyncClient, url: str, model: str, prompt: str, header: str = "") -> Answer:
    """`header`, if there is one, says the model's name."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 48}
    begin, first, text, tokens, done = time.monotonic(), 0.0, "", 0, False
    try:
        async with client.stream(
            "POST",
            f"{url}/v1/chat/completions",
            json=body | {"stream": True, "route": "request"},
            headers={header: model} if header else None,
        ) as answer:
            if answer.status_code != 200:
                await answer.aread()
                again = "" if "retry-after" in answer.headers else " without Retry-After"
                return Answer(error=f"{answer.status_code}{again}")
            server = answer.headers.get("x-tucka-replica", url)
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return Answer(error=f"{event['error']['code']} in a stream")
                    if piece := event["choices"][0]["delta"].get("content"):
                        first = first or time.monotonic() - begin
                        text, tokens = text + piece, tokens + 1
    except httpx.HTTPError as error:
        return Answer(error=type(error).__name__)
    return Answer(text, cut=not done, tokens=tokens, first=first, server=server)


class Load:
    """Clients that never pause. `expected` are the texts by content and prompt, `urls` are asked in turn, in `header`
    they say which adapter they want."""

    def __init__(
        self, urls: list[str], names: list[str], expected: dict[tuple[str, str], str], clients: int, header: str = ""
    ):
        self._turn, self._names, self._expected, self._clients = itertools.cycle(urls), names, expected, clients
        self._header, self.seen = header, Seen()

    async def run(self, seconds: float) -> None:
        limits = httpx.Limits(max_connections=None)
        begin = time.monotonic()
        async with httpx.AsyncClient(timeout=BUSY, limits=limits) as client:
            await asyncio.gather(*(self._send(client, number, begin + seconds) for number in range(self._clients)))
        self.seen.seconds = time.monotonic() - begin

    async def _send(self, client: httpx.AsyncClient, number: int, until: float) -> None:
        draw = random.Random(number)
        weights = [1 / (rank + 1) for rank in range(len(self._names))]
        while time.monotonic() < until:
            (name,) = draw.choices(self._names, weights)
            content = content_of(name)
            prompt = draw.choice(PROMPTS[content])
            answer = await ask(client, next(self._turn), name, prompt, self._header)
            if answer.error:
                self.seen.errors[answer.error] += 1
                await asyncio.sleep(RETRY_SECONDS)
                answer = await ask(client, next(self._turn), name, prompt, self._header)
                if answer.error:
                    self.seen.lost += 1
                    self.seen.errors[f"{answer.error} again"] += 1
                    continue
            self._note(name, answer, self._expected[content, prompt])

    def _note(self, name: str, answer: Answer, expected: str) -> None:
        if answer.cut:
            self.seen.cut += 1
        elif answer.text != expected:
            self.seen.wrong += 1
        else:
            self.seen.right += 1
        self.seen.tokens += answer.tokens
        self.seen.firsts.append(answer.first)
        self.seen.by_server[name][answer.server] += 1


def content_of(name: str) -> str:
    return name.partition("-")[0]


async def references(url: str) -> dict[tuple[str, str], str]:
    """What a server says that does nothing else."""
    async with httpx.AsyncClient(timeout=BUSY) as client:
        pairs = [(content, prompt) for content, prompts in PROMPTS.items() for prompt in prompts]
        return {pair: (await ask(client, url, *pair)).text for pair in pairs}
