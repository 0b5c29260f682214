"""Kills and freezes the engine of a `tucka serve` under load, again and again, and says what clients and probes saw.

    .venv/bin/python -m tests.chaos.engine_faults --kills 20 --freezes 20

Right is: every request ends within its time, with an answer or with one error of 503; `/ready` says 503 and then 200
again; `/health` and `/metrics` answer all the while; the adapter answers as before; no process is left at the end.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from tests.support import GOLDEN
from tests.support.servers import engine_of, make_base, start_command

TIMEOUT = 10  # --engine-timeout: a busy machine makes its processes wait for seconds
PATIENCE = 300.0  # a busy machine takes minutes to start an engine
ASK = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "route": "request"}  # which nobody else changes


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="times that the engine is killed (SIGKILL)")
    parser.add_argument("--freezes", type=int, default=20, help="times that it is stopped (SIGSTOP)")
    parser.add_argument("--clients", type=int, default=8, help="clients that send one request after the other")
    return parser.parse_args(given)


class Load:
    """Clients that never pause. `outcomes` counts how requests ended."""

    def __init__(self, url: str, clients: int):
        self.url, self.clients = url, clients
        self.outcomes: Counter[str] = Counter()
        self.longest = 0.0
        self.stopping = False

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            await asyncio.gather(*(self._send(client, i) for i in range(self.clients)))

    async def _send(self, client: httpx.AsyncClient, number: int) -> None:
        body = ASK | {"model": ("one", "llama-tiny")[number % 2], "max_tokens": 64, "stream": number % 4 < 2}
        while not self.stopping:
            begin = time.monotonic()
            try:
                outcome = _outcome(await client.post(f"{self.url}/v1/completions", json=body))
            except httpx.HTTPError as error:
                outcome = f"no answer: {type(error).__name__}"
            self.outcomes[outcome] += 1
            self.longest = max(self.longest, time.monotonic() - begin)
            await asyncio.sleep(0.02 if outcome == "answer" else 0.5)


def _outcome(response: httpx.Response) -> str:
    """ "answer", or the error's status and code, wherever it came."""
    if response.status_code != 200:
        return f"error {response.json()['error']['code']} (HTTP {response.status_code})"
    if not response.headers["content-type"].startswith("text/event-stream"):
        return "answer"
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    errors = [json.loads(event)["error"]["code"] for event in events if event.startswith('{"error"')]
    if len(errors) == 1:
        return f"error {errors[0]} (in a stream)"
    return "answer" if not errors and events[-1] == "[DONE]" else "stream cut off"


class Probes:
    """Asks the server's probes ten times a second."""

    def __init__(self, url: str):
        self.url = url
        self.ready = True
        self.slowest: dict[str, float] = dict.fromkeys(("/health", "/ready", "/metrics"), 0.0)
        self.wrong: Counter[str] = Counter()

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            while True:
                for path in self.slowest:
                    begin = time.monotonic()
                    status = (await client.get(self.url + path)).status_code
                    self.slowest[path] = max(self.slowest[path], time.monotonic() - begin)
                    if path == "/ready":
                        self.ready = status == 200
                    elif status != 200:
                        self.wrong[f"{path} {status}"] += 1
                await asyncio.sleep(0.1)


async def until(condition: Any) -> float:
    """Waits for it; returns the seconds. Raises TimeoutError after PATIENCE."""
    begin = time.monotonic()
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.02)
    return time.monotonic() - begin


async def chaos(url: str, server: int, flags: argparse.Namespace) -> dict[str, Any]:
    """Returns what there is to print; `faults` are what was wrong."""
    answers = {model: _text(url, model) for model in ("one", "llama-tiny")}
    load, probes = Load(url, flags.clients), Probes(url)
    running = asyncio.create_task(load.run())
    probing = asyncio.create_task(probes.run())
    faults: list[str] = []
    noticed: dict[str, list[float]] = {"kill": [], "freeze": []}
    back: list[float] = []
    for kind in ["kill"] * flags.kills + ["freeze"] * flags.freezes:
        done = load.outcomes["answer"]
        await until(lambda done=done: load.outcomes["answer"] >= done + flags.clients)
        os.kill(engine_of(server), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        noticed[kind].append(await until(lambda: not probes.ready))
        back.append(await until(lambda: probes.ready))
        for model, text in answers.items():
            if await asyncio.to_thread(_text, url, model) != text:
                faults.append(f"{model} answers otherwise after a {kind}")
    load.stopping = True
    await running
    probing.cancel()
    wrong = {name: n for name, n in load.outcomes.items() if name != "answer" and "engine_unavailable" not in name}
    faults += [f"{n} x {name}" for name, n in (wrong | probes.wrong).items()]
    return {
        "requests": dict(load.outcomes),
        "longest request, s": load.longest,
        "slowest probe, s": probes.slowest,
        "until /ready said 503 after a kill, s": _spread(noticed["kill"]),
        "until /ready said 503 after a freeze, s": _spread(noticed["freeze"]),
        "until /ready said 200 again, s": _spread(back),
        "faults": faults,
    }


def _text(url: str, model: str) -> str:
    return str(httpx.post(f"{url}/v1/completions", json=ASK | {"model": model}, timeout=PATIENCE).json()["choices"])


def _spread(seconds: list[float]) -> str:
    return f"median {statistics.median(seconds):.2f}, most {max(seconds):.2f}" if seconds else "none"


def main(given: list[str] | None = None) -> int:
    """Prints the outcome. Returns 1 where something was wrong."""
    flags = arguments(given)
    with tempfile.TemporaryDirectory() as folder:
        process, url = start_command(
            "--model", str(make_base(Path(folder) / "llama-tiny")),
            "--adapter", f"one={GOLDEN / 'llama-qv-r8k3t3' / 'adapter'}",
            "--engine-timeout", str(TIMEOUT),
            log=Path(folder) / "log",
        )  # fmt: skip
        try:
            seen = asyncio.run(chaos(url, process.pid, flags))
            os.kill(engine := engine_of(process.pid), signal.SIGSTOP)  # the last one hangs while the server stops
            process.send_signal(signal.SIGTERM)
            if process.wait(PATIENCE):
                seen["faults"].append(f"the server ended with status {process.returncode}")
            if Path(f"/proc/{engine}").exists():
                seen["faults"].append("the engine is left")
            if "Traceback" in (Path(folder) / "log").read_text():
                seen["faults"].append("there is a traceback in the log")
        except BaseException:
            print((Path(folder) / "log").read_text())
            raise
        finally:
            process.kill()
    for name, value in seen.items():
        print(f"{name}: {value}")
    return bool(seen["faults"])


if __name__ == "__main__":
    sys.exit(main())
