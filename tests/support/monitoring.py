"""Prometheus and a load, as tests use them."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import pytest

from tests.support import ROOT

DEPLOY = ROOT / "deploy"


def binary(name: str) -> str:
    """`prometheus` or `promtool`; installs Debian's package where that is possible."""
    if not shutil.which(name) and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["sh", str(DEPLOY / "prometheus" / "install.sh")], check=False, capture_output=True)
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing: run deploy/prometheus/install.sh as root (Debian), or put it on the PATH")
    return found


def wait_until(condition: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.25)


@dataclass
class Load:
    """Two clients in threads that ask until they are stopped, and what they saw."""

    url: str
    seconds: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    generated: int = 0
    models: tuple[str, ...] = ("fin", "law", "plain", "base")
    stopping: bool = False

    def run(self) -> None:
        with httpx.Client(timeout=60) as client:
            i = 0
            while not self.stopping:
                i += 1
                body = {"model": self.models[i % len(self.models)], "prompt": "Hello there, " * 3, "max_tokens": 12}
                begin = time.perf_counter()
                answer = client.post(self.url + "/v1/completions", json=body).json()
                self.seconds.append(time.perf_counter() - begin)
                self.prompt_tokens += answer["usage"]["prompt_tokens"]
                self.generated += answer["usage"]["completion_tokens"]


@dataclass
class Prometheus:
    url: str

    def query(self, expression: str) -> list[dict]:
        answer = httpx.get(self.url + "/api/v1/query", params={"query": expression}, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def value(self, expression: str) -> float:
        """Of the only series; NaN and absence are 0."""
        result = self.query(expression)
        return float(result[0]["value"][1]) if result else 0.0

    def alerts(self) -> dict[str, str]:
        """State by name."""
        found = httpx.get(self.url + "/api/v1/alerts", timeout=30).json()["data"]["alerts"]
        return {alert["labels"]["alertname"]: alert["state"] for alert in found}
