"""The HTTP side: one streamed request to one record, and the few other calls a test needs.

aiohttp and not httpx: at 32 streams of one event per 5 ms httpx took 3 times the CPU per event (114 against 34 µs on
2 cores) and its own queueing put 140 ms on the 99th percentile of TTFT. docs/loadtest.md has the measurement.
"""

import asyncio
import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from tucka_runtime.client import client_key, server_address
from tucka_runtime.errors import TuckaError
from tucka_runtime.loadtest.record import Record, StreamedToken
from tucka_runtime.loadtest.settings import Settings


class ServerError(TuckaError):
    """The server under test cannot be reached or does not speak the protocol."""


@dataclass(frozen=True)
class ModelCard:
    """A line of /v1/models. Adapters and aliases have a parent; `root` is an adapter's path where the server tells
    it."""

    name: str
    parent: str | None
    root: str | None
    max_model_len: int | None = None
    alias: bool = False


def read_cards(listed: list[dict[str, Any]]) -> list[ModelCard]:
    """The data of /v1/models. TuckA's adapters have a field `tucka`, and its aliases, which point at one now and at
    another later, have a parent without it. Where no card has the field, all with a parent are adapters."""
    marked = any("tucka" in c for c in listed)
    return [
        ModelCard(
            c["id"], c.get("parent"), c.get("root"), c.get("max_model_len"),
            alias=marked and c.get("parent") is not None and "tucka" not in c,
        )
        for c in listed
    ]  # fmt: skip


class EventReader:
    """Cuts bytes into the data of server-sent events (WHATWG HTML, section 9.2: data, comments, all line endings)."""

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        # a CR at the very end may be half of a CRLF: it waits for the next bytes
        raw = self.rest + chunk
        held = b"\r" if raw.endswith(b"\r") else b""
        if b"\r" in raw:
            raw = raw[: len(raw) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *events, rest = raw.split(b"\n\n")
        self.rest = rest + held
        found = []
        for event in events:
            lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                found.append(b"\n".join(lines))
        return found


def read_logprobs(logprobs: dict[str, Any]) -> list[StreamedToken]:
    """Reads choices out of either endpoint's form. A token whose runner-up is not told has none, infinitely far
    away."""
    if "content" in logprobs:
        chosen = [(t["token"], t["logprob"]) for t in logprobs["content"] or ()]
        ranked = [{top["token"]: top["logprob"] for top in t["top_logprobs"]} for t in logprobs["content"] or ()]
    else:
        chosen = list(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))
        ranked = logprobs["top_logprobs"]
    found = []
    for (text, value), tops in zip(chosen, ranked, strict=True):
        others = {other: p for other, p in tops.items() if other != text}
        second = max(others, key=others.__getitem__, default=None)
        found.append(StreamedToken(text, second, math.inf if second is None else value - others[second]))
    return found


def error_message(body: str) -> str:
    """What an error's body says: its message if it is OpenAI's or vLLM's JSON, else its beginning. Printable."""
    try:
        value = json.loads(body)
        text = str(value.get("error", value)["message"])
    except (ValueError, TypeError, KeyError, AttributeError):
        text = body
    return "".join(c if c.isprintable() else " " for c in text[:300])


class LoadClient:
    """Use it as an async context manager. `clock` gives seconds since the run began; set it anew for each run."""

    def __init__(self, settings: Settings) -> None:
        self.url = server_address(settings.url)
        self.chat = settings.endpoint == "chat"
        self.path = "/v1/chat/completions" if self.chat else "/v1/completions"
        key = client_key(settings.api_key)
        admin = settings.admin_key or key
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.admin_headers = {"Authorization": f"Bearer {admin}"} if admin else {}
        self.timeout = settings.timeout
        self.extra = dict(settings.extra)
        if settings.ignore_eos:
            self.extra["ignore_eos"] = True
        self.clock: Callable[[], float] = time.perf_counter
        self.running: Counter[str] = Counter()  # requests on their way, by model
        self.session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "LoadClient":
        # no limit of connections here: whoever caps concurrency does it visibly, in the runner
        # idle connections are dropped before uvicorn drops them (after 5 s): a request must not meet a closing one
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)
        self.session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self.session is not None
        await self.session.close()

    async def models(self) -> list[ModelCard]:
        assert self.session is not None
        try:
            async with asyncio.timeout(self.timeout):
                async with self.session.get(f"{self.url}/v1/models", headers=self.headers) as response:
                    if response.status != 200:
                        raise ServerError(f"/v1/models answered {response.status}: is the URL right, is a key needed?")
                    return read_cards((await response.json())["data"])
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ServerError(f"no answer from {self.url}: {type(error).__name__}. Is the server up?") from None
        except (KeyError, TypeError, ValueError):
            raise ServerError("/v1/models did not answer with a list of models: is this an OpenAI API?") from None

    async def adapter(self, action: str, name: str, path: str | None = None, inplace: bool = False) -> tuple[int, str]:
        """`load` or `unload` in vLLM's form; (status, start of the answer), status 0 where none came."""
        assert self.session is not None
        body: dict[str, Any] = {"lora_name": name} | ({"lora_path": path} if path else {})
        if inplace:
            body["load_inplace"] = True
        try:
            async with asyncio.timeout(self.timeout):
                url = f"{self.url}/v1/{action}_lora_adapter"
                async with self.session.post(url, json=body, headers=self.admin_headers) as response:
                    return response.status, error_message(await response.text())
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return 0, type(error).__name__

    def body(
        self, model: str, prompt: str | list[int] | list[dict[str, Any]], max_tokens: int, temperature: float
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"prompt": prompt}
        if self.chat:
            content = {"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
        limits = {"max_tokens": max_tokens, "temperature": temperature}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": model, **content, **limits, **stream, **self.extra}

    async def generate(self, record: Record, body: dict[str, Any]) -> Record:
        """Sends `body`, fills `record`, never raises for what the server does."""
        assert self.session is not None
        data = json.dumps(body).encode()
        headers = self.headers | {"Content-Type": "application/json"}
        self.running[record.model] += 1
        record.start = self.clock()
        try:
            async with asyncio.timeout(self.timeout):
                async with self.session.post(f"{self.url}{self.path}", data=data, headers=headers) as response:
                    record.status = response.status
                    if response.status == 200:
                        await self._read(response, record)
                    else:
                        record.cause = f"http_{response.status}"
                        record.detail = error_message(await response.text())
        except TimeoutError:
            record.cause = "timeout"
        except aiohttp.ClientConnectorError as error:
            record.cause, record.detail = "connect", type(error.os_error).__name__
        except (aiohttp.ClientError, OSError) as error:
            record.cause, record.detail = "disconnect", type(error).__name__
        finally:
            record.end = self.clock()
            self.running[record.model] -= 1
        return record

    async def _read(self, response: aiohttp.ClientResponse, record: Record) -> None:
        stream, parts, done = EventReader(), [], False
        async for chunk in response.content.iter_any():
            arrived = self.clock()
            for data in stream.feed(chunk):
                if data == b"[DONE]":
                    done = True
                    continue
                try:
                    event = json.loads(data)
                    parts.append(self._take(event, arrived, record))
                except (ValueError, TypeError, KeyError, AttributeError, IndexError):
                    record.cause = "garbage"
        record.text = "".join(parts)
        if record.cause is None and not (done or record.finish_reason):
            record.cause = "truncated"
        if record.cause is None and not record.events:
            record.cause = "empty"

    def _take(self, event: dict[str, Any], arrived: float, record: Record) -> str:
        """One event's text; notes its time, usage and end."""
        if "error" in event:
            record.cause, record.detail = "error_event", error_message(json.dumps(event))
        if usage := event.get("usage"):
            record.prompt_tokens = usage.get("prompt_tokens")
            record.output_tokens = usage.get("completion_tokens")
        if not event.get("choices"):
            return ""
        choice = event["choices"][0]
        text, thought = choice.get("text") or "", ""
        if self.chat:
            delta = choice["delta"]
            text = delta.get("content") or ""
            thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
        record.events.append((arrived, len(text) + len(thought)))
        if choice.get("logprobs"):
            with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # explains, must not fail
                record.tokens = [*(record.tokens or ()), *read_logprobs(choice["logprobs"])]
        record.finish_reason = choice.get("finish_reason") or record.finish_reason
        return text
