"""What every server is asked, over the load tester's own client and clock."""

import asyncio
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tucka_runtime.loadtest.peers.processes import PeerError
from tucka_runtime.loadtest.report import report
from tucka_runtime.loadtest.session import Session
from tucka_runtime.loadtest.settings import Settings

ADAPTERS = 8
LONG = 1800
"""Tokens of a long prompt: with an answer they fit the random models' context of 2,048."""
IDS = range(100, 30_000)
"""What prompts are drawn from: plain tokens of every model here."""
ALONE = 4  # requests one after the other, whose median first token is taken
WAVES = 2  # answers in turn of each place of a case with several at once


@dataclass(frozen=True)
class PeerCase:
    """Greedy streamed answers of exactly `new` tokens, `at_once` in flight, to the base or eight adapters by turns.

    `figure` names one of the load tester's. `again` names a case whose prompts it has, and whose KV a server may still
    have: what is timed then is decoding alone.
    """

    name: str
    adapters: str | None
    prompt: int
    new: int
    at_once: int
    requests: int
    figure: str = "output_throughput"
    again: str = ""

    @property
    def models(self) -> list[str]:
        return [f"{self.adapters}-{i}" for i in range(ADAPTERS)] if self.adapters else ["base"]

    def warming(self) -> "PeerCase":
        """No more than it takes to have run everything once."""
        return replace(self, new=min(self.new, 8), requests=1 if self.again else self.at_once)


def cases(at_once: int, prompt: int, new: int, long: bool) -> list[PeerCase]:
    """In the order in which they are asked. Where `long`, twice as many at once are asked too, and long prompts. `new`
    bounds the answers at a long context too, where the context does."""
    waves = at_once * WAVES
    first = f"first token, prompt {LONG:,}"
    short = [
        PeerCase("base", None, prompt, new, at_once, waves),
        PeerCase("8 adapters on q, v", "qv", prompt, new, at_once, waves),
        PeerCase("8 adapters on all seven", "all", prompt, new, at_once, waves),
        PeerCase(f"first token, prompt {prompt}", None, prompt, 1, 1, ALONE, "median_ttft_ms"),
    ]
    if not long:
        return short
    twice = 2 * at_once
    return [
        *short,
        PeerCase(f"base, {twice} at once", None, prompt, new, twice, 2 * waves),
        PeerCase(f"8 adapters on q, v, {twice} at once", "qv", prompt, new, twice, 2 * waves),
        PeerCase(first, None, LONG, 1, 1, at_once, "median_ttft_ms"),
        PeerCase(f"base, context {LONG:,}", None, LONG, min(new, 128), at_once, at_once, again=first),
    ]


def ask(url: str, case: PeerCase, seed: int, folder: Path) -> float:
    """Runs a case once and gives its figure. Prompts are token ids, those of the seed. Raises PeerError where an answer
    is missing or too short, and ServerError."""
    rng = random.Random(f"{seed}/{case.again or case.name}")
    models = case.models
    lines = [
        {
            "at": 0,
            "model": models[i % len(models)],
            "prompt": [rng.choice(IDS) for _ in range(case.prompt)],
            "max_tokens": case.new,
        }
        for i in range(case.requests)
    ]
    trace = folder / "trace.jsonl"
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = Settings(
        url=url, models=",".join(models), trace=str(trace), concurrency=case.at_once, seed=seed, ignore_eos=True,
        canary_rate=0.0, warmup=0, count_empty=True, timeout=600.0, quiet=True, no_raw=True,
    )  # fmt: skip
    return read(report.build(asyncio.run(Session(settings).execute())), case)


def read(result: dict[str, Any], case: PeerCase) -> float:
    """The figure of a load test's result, if it is of what was asked."""
    if result["failed"] or result["completed"] != case.requests:
        raise PeerError(
            f"{case.name}: {result['failed']} of {case.requests} requests failed: {result['failure_details']}"
        )
    for what, side, wanted in (("prompts", "input", case.prompt), ("answers", "output", case.new)):
        tokens = result[f"total_{side}_tokens"]
        if tokens != case.requests * wanted:
            raise PeerError(f"{case.name}: {what} of {tokens} tokens where {case.requests * wanted} were asked for")
    return float(result[case.figure])
