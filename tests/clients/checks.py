"""What the clients' scripts share: they run as `python SCRIPT URL BASE`, in an environment that has the client alone.

A script says what it found on stdout, one line of JSON for each of its checks: `{"check": ..., "failed": null or why}`.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

URL, BASE = sys.argv[1:3]
"""Where the server is, without /v1, and the folder of its base model, which has its tokenizer."""

ASKS = json.loads(Path(__file__).with_name("asks.json").read_text())
ANSWERED = [ASKS[name] for name in ("base", "formats", "words")]
"""A model's name, a prompt, and the answer that it alone gives."""

SCHEMA, TOOL = ASKS["schema"], ASKS["tool"]
CITIES = set(TOOL["parameters"]["properties"]["city"]["enum"])


def check(what: str) -> Callable[[Callable[[], None]], None]:
    """Runs the function that it decorates, and says whether it returned."""

    def run(function: Callable[[], None]) -> None:
        why = None
        try:
            function()
        except Exception as error:
            traceback.print_exc()
            why = f"{type(error).__name__}: {error}"
        print(json.dumps({"check": what, "failed": why}), flush=True)

    return run


def same(found: object, expected: object) -> None:
    if found != expected:
        raise AssertionError(f"{found!r} in place of {expected!r}")


def fits(value: dict[str, object]) -> None:
    """Whether this is a value of `SCHEMA`."""
    same(set(value), {"kind", "urgent"})
    if value["kind"] not in ("bug", "wish") or not isinstance(value["urgent"], bool):
        raise AssertionError(f"{value!r} is no value of the schema")


def answers(ask: Callable[[str, str], str | None]) -> None:
    """Whether `ask(model, prompt)` returns what base and adapters say, which tells which of them answered."""
    for one in ANSWERED:
        same(ask(one["model"], one["prompt"]), one["answer"])


def command(*words: str, folder: Path | None = None, timeout: int = 600, **environment: str) -> str:
    """What a command of this environment prints. Raises AssertionError with its last lines if it fails."""
    ended = subprocess.run(
        words, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=timeout
    )
    if ended.returncode:
        raise AssertionError(f"{words[0]} ended with {ended.returncode}: {last((ended.stdout, ended.stderr))}")
    return ended.stdout + ended.stderr


def last(texts: Iterable[str]) -> str:
    """The ends of a command's outputs, in one line."""
    return " / ".join(" ".join(text.split())[-200:] for text in texts if text.strip())
