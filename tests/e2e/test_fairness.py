"""One adapter's flood and another's request, over a socket."""

import re
import signal
from collections.abc import Iterator

import httpx
import pytest

from tests.support import GOLDEN
from tests.support.servers import start_command

FLOOD = {"model": "loud", "prompt": "Hello", "max_tokens": 200, "ignore_eos": True, "temperature": 0, "stream": True}
QUIET = {"model": "quiet", "prompt": "Hello", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Two seats, and a queue in which nobody waits for more than a second: the flood of 126 answers takes four of them
    where a step takes 0.3 ms."""
    log = tmp_path_factory.mktemp("fairness") / "log"
    adapters = {"loud": "llama-qv-r8k3t3", "quiet": "llama-all7-r4k2t2"}
    names = [f"--adapter={name}={GOLDEN / case / 'adapter'}" for name, case in adapters.items()]
    base = str(GOLDEN / "bases" / "llama-tiny")
    settings = ("--max-num-seqs", "2", "--max-n", "128", "--max-queue-seconds", "1", "--shutdown-timeout", "1")
    process, url = start_command("--model", base, *names, *settings, log=log)
    with httpx.Client(timeout=60, base_url=url) as client:
        yield client
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def value(server: httpx.Client, series: str) -> float:
    found = re.search(rf"^{re.escape(series)} (\S+)$", server.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_a_flood_of_one_adapter_is_its_own_affair(server: httpx.Client) -> None:
    alone = server.post("/v1/completions", json=QUIET).json()["choices"]
    with server.stream("POST", "/v1/completions", json=FLOOD | {"n": 128}) as flood:
        lines = flood.iter_lines()
        for _ in range(40):
            next(lines)
        answer = server.post("/v1/completions", json=QUIET)
        assert answer.status_code == 200 and answer.json()["choices"] == alone
        assert value(server, "tucka_displacements_total") >= 1
        assert value(server, "tucka_requests_waiting") >= 100, "the flood has hardly begun"
        assert value(server, 'tucka_adapter_oldest_waiting_seconds{model="loud"}') > 0
        assert value(server, 'tucka_adapter_oldest_waiting_seconds{model="quiet"}') == 0
        refused = server.post("/v1/completions", json=FLOOD)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        assert server.post("/v1/completions", json=QUIET).status_code == 200
