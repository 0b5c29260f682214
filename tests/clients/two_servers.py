"""Routers in front of two servers of the embedded default, and the table of docs/scale.md.

    python -m tests.clients.two_servers --cache DIR        where routers are installed, and found again

For each router and policy: answers by their content, whole and streamed; which server had each adapter's requests; what
clients see when one server is killed, and with one more try; and whether the router has figures of its own.
"""

import argparse
import collections
import contextlib
import json
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

from tests.clients.run import install
from tests.clients.table import CLIENTS
from tests.support import ROOT
from tests.support.servers import start_command

ASKS = json.loads((ROOT / "tests" / "clients" / "asks.json").read_text())
ANSWERED = [ASKS[name] for name in ("base", "formats", "words")]
ADAPTERS = ("formats", "words", "triage", "sql")
REQUESTS = 20
"""To each adapter, for its share, and after a server's death to all of them together."""


@dataclass(frozen=True)
class Router:
    """A start line: `{urls}` are the servers' addresses, and what else is in braces is made up for a run. `client` is
    its row in tests/clients/table.py. In `header` a client says its adapter's name."""

    policy: str
    client: str
    line: str
    header: str = ""

    @property
    def name(self) -> str:
        return f"{self.client}, {self.policy}" + (f", `{self.header}: ADAPTER`" if self.header else "")

    def installed(self, cache: Path) -> Path:
        """Where it is. Raises RuntimeError where it cannot be."""
        client = next(client for client in CLIENTS if client.name == self.client)
        folder = cache.absolute() / client.folder
        if reason := install(client, folder):
            raise RuntimeError(f"{self.client}: {reason}")
        return folder


VLLM = (
    "vllm-router --worker-urls {urls} --host 127.0.0.1 --port {port} --prometheus-port {figures} "
    "--health-check-interval-secs 2 --health-success-threshold 1 --cb-timeout-duration-secs 2 --policy "
)
SGLANG = (
    "python -m sglang_router.launch_router --worker-urls {urls} --host 127.0.0.1 --port {port} "
    "--prometheus-port {figures} --policy "
)
ROUTERS = [
    Router("cache_aware", "vllm-router", VLLM + "cache_aware"),
    Router("round_robin", "vllm-router", VLLM + "round_robin"),
    Router("consistent_hash", "vllm-router", VLLM + "consistent_hash", "X-Session-ID"),
    Router("cache_aware", "sglang-router", SGLANG + "cache_aware"),
    Router("round_robin", "sglang-router", SGLANG + "round_robin"),
    Router("manual", "sglang-router", SGLANG + "manual", "X-SMG-Routing-Key"),
    Router("simple-shuffle", "litellm, proxy", "litellm --config {config} --host 127.0.0.1 --port {port}"),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def litellm_config(urls: list[str], key: str) -> str:
    """Every model at all servers, among which the proxy shuffles; where one fails it tries again."""
    models = [
        f"  - model_name: {name}\n"
        f"    litellm_params: {{model: hosted_vllm/{name}, api_base: '{url}/v1', api_key: none}}\n"
        for name in ("base", *ADAPTERS)
        for url in urls
    ]
    rest = f"general_settings: {{master_key: {key}}}\nrouter_settings: {{num_retries: 2, cooldown_time: 5}}\n"
    return rest + "model_list:\n" + "".join(models)


@contextlib.contextmanager
def routing(router: Router, cache: Path, urls: list[str], key: str) -> Iterator[tuple[str, str]]:
    """The router's address and that of its figures, once it answers to a chat."""
    port, figures, installed = free_port(), free_port(), router.installed(cache)
    with tempfile.TemporaryDirectory() as folder, (installed / "two.log").open("w") as log:
        config = Path(folder) / "config.yaml"
        config.write_text(litellm_config(urls, key))
        line = router.line.format(urls=" ".join(urls), port=port, figures=figures, config=config)
        program, *rest = line.split()
        words = [str(installed / "bin" / program), *rest]
        environment = {"PATH": "/usr/bin:/bin", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
            while not answers(url, key):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{router.name} did not get ready: see {log.name}")
                time.sleep(0.5)
            yield url, f"http://127.0.0.1:{figures}/metrics"
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def answers(url: str, key: str) -> bool:
    return chat(url, key, ASKS["base"]) == ASKS["base"]["answer"]


def chat(url: str, key: str, ask: dict[str, str], stream: bool = False, header: str = "") -> str | None:
    """The text; None if it was refused, or broke off. An answer that ends without an error is taken as it is."""
    said = {header: ask["model"]} if header else {}
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60, default_headers=said)
    try:
        messages = [{"role": "user", "content": ask["prompt"]}]
        made = client.chat.completions.create(  # type: ignore[call-overload]
            model=ask["model"], messages=messages, temperature=0, max_tokens=24, stream=stream
        )
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in made if chunk.choices)
        return str(made.choices[0].message.content)
    except (openai.APIError, httpx.HTTPError):
        return None


def finished(url: str) -> dict[str, float]:
    """Sequences that the server finished, by model."""
    counts: dict[str, float] = collections.Counter()
    for name, value in re.findall(r'^tucka_adapter_requests_total{model="(.+?)".*} (\S+)$', scrape(url), re.MULTILINE):
        counts[name] += float(value)
    return counts


def scrape(url: str) -> str:
    return httpx.get(f"{url}/metrics", timeout=30).text


def share(url: str, key: str, urls: list[str], header: str) -> float:
    """Of each adapter's requests the part that its main server had, over all of them."""
    before = [finished(server) for server in urls]
    asks = [{"model": name, "prompt": f"{name} {i}: 2024-03-05"} for i in range(REQUESTS) for name in ADAPTERS]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda ask: chat(url, key, ask, header=header), asks))
    after = [finished(server) for server in urls]
    had = {name: [now[name] - then[name] for now, then in zip(after, before, strict=True)] for name in ADAPTERS}
    return sum(max(counts) for counts in had.values()) / sum(sum(counts) for counts in had.values())


def row(router: Router, cache: Path) -> str:
    """Its line of the table. Both servers are started for it alone: one of them is killed."""
    key = f"sk-{secrets.token_hex(24)}"
    with tempfile.TemporaryDirectory() as folder:
        servers = [start_command("--shutdown-timeout", "1", log=Path(folder) / f"log{i}") for i in range(2)]
        urls = [url for _, url in servers]
        try:
            with routing(router, cache, urls, key) as (url, figures):
                whole = all(chat(url, key, ask) == ask["answer"] for ask in ANSWERED * 4)
                streamed = all(chat(url, key, ask, stream=True) == ask["answer"] for ask in ANSWERED * 4)
                client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)
                listed = {model.id for model in client.models.list()}
                held = share(url, key, urls, router.header)
                servers[0][0].send_signal(signal.SIGKILL)
                asked = ANSWERED * (REQUESTS // 3)
                first = [chat(url, key, ask, header=router.header) for ask in asked]
                again = [ask for found, ask in zip(first, asked, strict=True) if found is None]
                second = [chat(url, key, ask, header=router.header) for ask in again]
                wrong = sum(
                    found not in (None, ask["answer"]) for found, ask in zip(first + second, asked + again, strict=True)
                )
                try:
                    own = len(re.findall(r"^# TYPE ", httpx.get(figures, timeout=10).text, re.MULTILINE))
                except httpx.HTTPError:
                    own = 0
        finally:
            for process, _ in servers:
                process.send_signal(signal.SIGTERM)
                process.wait(60)
    cells = (
        router.name,
        "right" if whole else "WRONG",
        "right" if streamed else "WRONG",
        "all" if {"base", *ADAPTERS} <= listed else ", ".join(sorted(listed))[:40],
        f"{held:.0%}",
        f"{first.count(None)} of {len(first)} refused, of these again {second.count(None)}; {wrong} wrong",
        str(own or "none"),
    )
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="where routers are installed, and found again")
    parser.add_argument("--only", metavar="WORD", default="", help="routers with this in their name")
    given = parser.parse_args()
    print("| router, policy | chat | streamed | models | its main server had | one server killed | own metrics |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for router in ROUTERS:
        if given.only in router.name:
            print(row(router, given.cache), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
