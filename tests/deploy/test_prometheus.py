"""The shipped monitoring against a live server and a real Prometheus. The last test stops the load."""

import re
import subprocess
from pathlib import Path

import httpx

from tests.support.monitoring import DEPLOY, Load, Prometheus, wait_until

VARIABLES = {"$__rate_interval": "15s", "$instance": ".*", "$model": ".*"}
RULES = DEPLOY / "prometheus" / "rules.yml"


def run(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def queries(dashboard: dict) -> list[tuple[str, str]]:
    """(panel, expression) of every target."""
    return [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", ())]


def test_rules(promtool: str) -> None:
    assert (done := run(promtool, "check", "rules", str(RULES))).returncode == 0, done.stderr
    tests = RULES.with_name("rules_test.yml")
    assert (done := run(promtool, "test", "rules", str(tests))).returncode == 0, done.stdout + done.stderr
    alerts = set(re.findall(r"- alert: (\w+)", RULES.read_text()))
    tested = set(re.findall(r"alertname: (\w+)", tests.read_text()))
    assert alerts == tested, "every alert has a unit test"


def test_config(promtool: str, tmp_path: Path) -> None:
    config = RULES.with_name("prometheus.yml")
    assert (done := run(promtool, "check", "config", str(config))).returncode == 0, done.stdout + done.stderr


def test_a_scrape_has_no_lint(promtool: str, server: str) -> None:
    """All names are as Prometheus wants them, but for vLLM's with their colons."""
    done = run(promtool, "check", "metrics", text=httpx.get(server + "/metrics").text)
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert not [line for line in complaints if not line.startswith("vllm:") or "':'" not in line], complaints


def test_every_panel_shows_something(prometheus: Prometheus, load: Load, dashboard: dict) -> None:
    missing = {expression: title for title, expression in queries(dashboard)}
    assert len(missing) > 50

    def all_there() -> bool:
        for expression in list(missing):
            filled = expression
            for name, value in VARIABLES.items():
                filled = filled.replace(name, value)
            assert "$" not in filled, filled
            result = prometheus.query(filled)
            if result and any(sample["value"][1] not in ("NaN", "+Inf") for sample in result):
                del missing[expression]
        return not missing

    wait_until(all_there, 60, lambda: f"no data for {missing}")


def test_the_dashboards_variables_find_values(prometheus: Prometheus, load: Load, dashboard: dict) -> None:
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
            assert prometheus.query(f"count by ({label}) ({metric})")


def test_nothing_fires_while_all_is_well(prometheus: Prometheus, load: Load) -> None:
    assert prometheus.alerts() == {}


def test_an_alert_fires_for_real(prometheus: Prometheus, server: str, load: Load) -> None:
    """An adapter that cannot be loaded, with the shipped rule as it is."""
    answer = httpx.post(server + "/v1/adapters", json={"name": "broken", "path": "broken"}, timeout=30)
    assert answer.status_code == 400
    wait_until(lambda: prometheus.alerts().get("TuckaLoadFailures") == "firing", 30, lambda: str(prometheus.alerts()))
    code = answer.json()["error"]["code"]
    assert prometheus.query(f'ALERTS{{alertname="TuckaLoadFailures", code="{code}", alertstate="firing"}}')


def test_prometheus_and_the_clients_agree(prometheus: Prometheus, load: Load) -> None:
    load.stopping = True
    wait_until(lambda: prometheus.value("tucka_requests_running") == 0, 30, lambda: "requests still run")
    wait_until(
        lambda: prometheus.value("sum(tucka_requests_total)") == len(load.seconds), 10, lambda: "requests differ"
    )
    assert prometheus.value("tucka_generation_tokens_total") == load.generated
    assert prometheus.value("tucka_prompt_tokens_total") == load.prompt_tokens
    assert prometheus.value("sum(tucka_adapter_generation_tokens_total)") == load.generated
    counted = prometheus.value("tucka_request_latency_seconds_sum / tucka_request_latency_seconds_count")
    # The client's share of a busy machine is in its own figure only.
    assert 0 < counted <= sum(load.seconds) / len(load.seconds)
