import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import ROOT
from tucka_runtime.loadtest.report import report
from tucka_runtime.loadtest.session import Session
from tucka_runtime.loadtest.settings import Settings

FAKE = ROOT / "tests" / "support" / "fake_server.py"


@pytest.fixture
def fake() -> Iterator[Callable[..., str]]:
    """Starts fake servers of a given behaviour; gives their URLs."""
    running = []

    def start(**behaviour: Any) -> str:
        command = [sys.executable, str(FAKE), json.dumps(behaviour)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        return f"http://127.0.0.1:{int(process.stdout.readline())}"

    yield start
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def load_test() -> Callable[..., dict[str, Any]]:
    """Runs a whole test and gives its result. No canaries or warm-up unless asked for."""

    def execute(url: str, **changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {"canary_rate": 0.0, "warmup": 0, "quiet": True} | changes
        return report.build(asyncio.run(Session(Settings(url=url, **values)).execute()))

    return execute
