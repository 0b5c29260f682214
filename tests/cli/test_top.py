"""`tucka top`: the picture that two scrapes make, and the command against a live server."""

import re
import subprocess
import sys

import pytest

from tests.support.file_host import file_host
from tests.support.servers import Server
from tucka_runtime.cli.main import main
from tucka_runtime.cli.top import Change, Scrape, clip, draw
from tucka_runtime.errors import TuckaError
from tucka_runtime.messages import AdapterInfo, AdapterKey, EngineLoad, FinishReason, Route, StepStats
from tucka_runtime.server.metrics.metrics import AdapterTiers, Metrics
from tucka_runtime.server.metrics.vllm import Residence


def plain(lines: list[str]) -> str:
    return re.sub(r"\x1b\[\d+m", "", "\n".join(lines))


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("base", max_adapters=8, block_size=16)
    for name in ("fin", "law"):
        info = AdapterInfo(AdapterKey(name, 1), "0" * 64, "tucka", 8, 4, 3, 2, 16.0, ("q",), 4, "q", None, 9, None)
        metrics.adapter_arrived(info)
    return metrics


def scrape(metrics: Metrics, at: float) -> Scrape:
    tiers = AdapterTiers(loaded=3, resident=(Residence("fin", 8), Residence("law", 8)))
    return Scrape.of(metrics.render(tiers=tiers).decode(), at)


def work(metrics: Metrics, name: str, tokens: int, group: int) -> None:
    metrics.admitted(name, 10, 1)
    routes = ((AdapterKey(name, 1), Route(group, (0.5, 0.5, 0.5))),)
    stats = StepStats(0.0, 0.0, 0.01, 0.09, 0.0, 0.0, 10, 0, 1, (), routes)
    load = EngineLoad(running=1, waiting=0, blocks_used=50, blocks_total=100, preemptions=0, displacements=0)
    metrics.on_step(stats, load)
    metrics.first_token(name, 0.25, 5, None)
    metrics.tokens(tokens)
    metrics.waited(0.01, tokens)
    metrics.finished(name, FinishReason.STOP)
    metrics.closed(name, 0.5, tokens, failed=False)


def test_the_picture(metrics: Metrics) -> None:
    before = scrape(metrics, 100.0)
    for group in (0, 1, 2, 3):
        work(metrics, "law", 40, group)
    for _ in range(2):
        work(metrics, "fin", 10, 2)
    metrics.admitted("fin", 10, 1)
    text = plain(draw(Change(before, scrape(metrics, 102.0)), 100, None))
    assert "engine up, restarts 0" in text and "adapters 3, slots 2/8" in text
    assert "tokens/s 90.0 out, 35.0 in" in text and "requests/s 3.0" in text
    assert "TTFT 250.0 ms" in text and "KV" in text and "50%" in text and "prefix hits 43%" in text
    assert "step 100.0 ms" in text and "route 10%" in text and "forward 90%" in text
    law, fin, base = text.splitlines()[-3:]
    assert law.split() == ["law", "2.0", "80.0", "250.0", "ms", "500.0", "ms", "0", "1.00", "████", "top", "25%"]
    assert fin.split()[:3] == ["fin", "1.0", "10.0"] and "0.00    █  top 100%" in fin
    assert base.split() == ["base", "0.0", "0.0", "-", "-", "0"]


def test_nothing_yet_and_a_dead_engine(metrics: Metrics) -> None:
    now = Scrape.of(metrics.render(up=False).decode(), 101.0)
    text = plain(draw(Change(scrape(metrics, 100.0), now), 80, None))
    assert "engine down" in text and "TTFT -" in text and "idle" in text and "····" in text


def test_a_server_that_began_again_counts_from_zero(metrics: Metrics) -> None:
    work(metrics, "fin", 10, 0)
    before = scrape(metrics, 100.0)
    again = Metrics("base")
    work(again, "base", 6, 0)
    assert Change(before, scrape(again, 102.0)).rate("generation_tokens_total") == 3


def test_it_fits_the_terminal(metrics: Metrics) -> None:
    change = Change(scrape(metrics, 100.0), scrape(metrics, 101.0))
    lines = draw(change, 40, 9)
    assert len(lines) == 9 and "2 more" in lines[-1]
    assert all(len(plain([clip(line, 40)])) <= 40 for line in lines)
    assert clip("\x1b[1mabc\x1b[0mdef", 4) == "\x1b[1mabc\x1b[0md\x1b[0m"


def test_the_command(live: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", live.url, "--once", "--interval", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "engine up" in out and "\x1b" not in out and "one " in out
    assert main(["top", "http://127.0.0.1:9", "--once"]) == 1
    for wrong in ("0", "nan", "x"):
        with pytest.raises(SystemExit):
            main(["top", live.url, "--interval", wrong])
    assert "between 0.1 and 3600" in capsys.readouterr().err


def test_it_waits_for_a_server_that_is_away_for_a_while(metrics: Metrics) -> None:
    """One that ends within an answer, that has none, and that is back; at first there has to be one."""
    with file_host(None) as host:
        host.files = {"/metrics": metrics.render()}
        command = [sys.executable, "-m", "tucka_runtime.cli.main", "top", host.address, "--interval", "0.1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert "engine" in process.stdout.readline()
            host.cut = 100
            assert any("IncompleteRead" in line for line in process.stdout)
            assert any("engine" in line for line in process.stdout)
            host.files = {}
            assert any("404" in line for line in process.stdout)
            host.files = {"/metrics": metrics.render()}
            assert any("engine" in line for line in process.stdout)
            process.terminate()


def test_a_reader_that_goes_away_is_no_error(live: Server) -> None:
    command = [sys.executable, "-m", "tucka_runtime.cli.main", "top", live.url, "--interval", "0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert "engine" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 0 and process.stderr.read() == ""
    process.stderr.close()


def test_a_page_that_is_none_of_prometheus_is_said() -> None:
    with pytest.raises(TuckaError, match="none of Prometheus"):
        Scrape.of("<!doctype html>\n<title>Welcome to nginx!</title>\n", 0.0)
