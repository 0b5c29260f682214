"""Whole tests against the fake server: loops, churn, canaries, saturation, sweep, and the files they leave."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.request
from html.parser import HTMLParser

import pytest

from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest import cli, saturation, sweep
from tucka_runtime.loadtest.churn import Churn, ChurnedAdapter, adapters
from tucka_runtime.loadtest.client import ModelCard, ServerError
from tucka_runtime.loadtest.record import Record
from tucka_runtime.loadtest.report import compare, page, report, sweep_page, table
from tucka_runtime.loadtest.runner import Run
from tucka_runtime.loadtest.session import choose_models
from tucka_runtime.loadtest.settings import Settings

ADAPTERS = {"a": "/adapters/a", "b": "/adapters/b", "c": "/adapters/c"}
REFERENCES = 2 + 1 + 4 * 3  # before the load: token counts, is `route` known, three canaries to each of four models


def test_closed_loop_keeps_its_concurrency_and_knows_its_throughput(fake, load_test):
    # 3 in flight, each 20 + 9 · 10 ms: 27.3 requests/s and 273 tokens/s if nothing is lost between
    result = load_test(fake(ttft=0.02, itl=0.01), concurrency=3, requests=45, max_tokens="10")
    assert (result["completed"], result["failed"], result["most_in_flight"]) == (45, 0, 3)
    assert result["request_throughput"] == pytest.approx(27.3, rel=0.12)
    assert result["output_throughput"] == pytest.approx(273, rel=0.12)
    assert result["per_adapter"].keys() == {"base"}


def test_open_loop_sends_when_planned_and_does_not_wait(fake, load_test):
    result = load_test(fake(ttft=0.1, slots=1), rate="50", requests=20, max_tokens="1", popularity="uniform")
    requests = result["runs"][0]["requests"]
    lags = [r["start"] - r["planned"] for r in requests]
    assert min(lags) >= 0 and sorted(lags)[10] < 0.02
    # the server does 10 a second: all were sent while the first ones waited, so the queue shows in TTFT
    assert result["most_in_flight"] > 10
    assert result["p99_ttft_ms"] > 1000


def test_conversations_carry_their_history(fake, load_test):
    for endpoint in ("completions", "chat"):
        result = load_test(fake(), endpoint=endpoint, requests=2, turns="3", prompt_tokens="10", concurrency=1)
        requests = result["runs"][0]["requests"]
        assert [r["turn"] for r in requests] == [0, 1, 2] * 2
        sizes = [r["prompt_tokens"] for r in requests[:3]]
        assert sizes[0] < sizes[1] < sizes[2]


def test_token_ids_are_sent_as_they_are_and_are_one_turn(fake, load_test, tmp_path):
    trace = tmp_path / "ids.jsonl"
    trace.write_text('{"at": 0, "prompt": [3, 1, 4, 1, 5], "max_tokens": 4}\n')
    result = load_test(fake(), trace=str(trace), turns="3", prefixes=2)
    (request,) = result["runs"][0]["requests"]
    assert (request["prompt_tokens"], request["output_tokens"]) == (5, 4)


def test_scores(fake, load_test, tmp_path):
    url = fake(adapters=ADAPTERS)
    truth = load_test(url, requests=1, models="a", concurrency=1, max_tokens="5")["runs"][0]["requests"][0]
    prompt = " ".join(["the"] * 5)
    right = tmp_path / "right.jsonl"
    lines = [{"prompt": prompt, "model": "a", "max_tokens": 3, "expected": "wrong"}]
    right.write_text("\n".join(json.dumps(line) for line in lines))
    result = load_test(url, dataset=str(right), models="a", requests=3)
    assert (result["score"], result["per_adapter"]["a"]["score"]) == (0.0, 0.0)
    expected = result["runs"][0]["requests"][0]["text"]
    right.write_text(json.dumps(lines[0] | {"expected": expected}))
    assert load_test(url, dataset=str(right), models="a", requests=3)["score"] == 1.0
    assert truth["text"]


def test_churn_changes_adapters_and_puts_them_back(fake, load_test):
    url = fake(adapters=ADAPTERS, cold=0.15, ttft=0.01, itl=0.002)
    result = load_test(url, rate="30", duration=2.5, churn_rate=6.0, canary_rate=10.0, turns="1")
    [run] = result["runs"]
    assert {e["action"] for e in run["churn_events"]} - {"restore"} == {"load", "reload", "unload"}
    assert all(e["ok"] for e in run["churn_events"])
    assert set(result["failures"]) <= {"unloaded"}
    assert result["correct"] and not result["unloaded_but_answered"]
    assert result["cold"]["cold_requests"] >= 3
    assert result["cold"]["median_cold_ttft_ms"] == pytest.approx(162, abs=25)
    assert result["cold"]["median_warm_ttft_ms"] < 60
    # everything is loaded again
    assert {c.name for c in asyncio.run(cards(url))} == {"base", "a", "b", "c"}


async def cards(url):
    from tucka_runtime.loadtest.client import LoadClient

    async with LoadClient(Settings(url=url)) as client:
        return await client.models()


def test_churn_with_two_paths_has_a_reference_for_each(fake, load_test):
    flags = ("a=/adapters/a,/adapters/a2",)
    url = fake(adapters=ADAPTERS)
    result = load_test(url, rate="20", duration=2.0, churn_rate=6.0, churn_adapter=flags, canary_rate=20.0)
    paths = {e["path"] for e in result["runs"][0]["churn_events"]}
    assert paths == {"/adapters/a", "/adapters/a2"}
    assert result["correct"] and result["canaries"]["outcomes"]["own"] > 10
    assert next(c.root for c in asyncio.run(cards(url)) if c.name == "a") == "/adapters/a"


def test_reloads_in_place_forgive_nothing(fake, load_test):
    flags = {"churn_rate": 8.0, "churn_adapter": ("a=/adapters/a,/adapters/a2",), "churn_inplace": True}
    result = load_test(fake(adapters=ADAPTERS, load=0.05), rate="20", duration=2.0, canary_rate=20.0, **flags)
    assert {(e["action"], e["call"]) for e in result["runs"][0]["churn_events"]} >= {("reload", "load")}
    assert result["failures"] == {} and result["correct"]
    assert result["runs"][0]["redirected"] == 0


@pytest.mark.parametrize("models", [None, "alias,a,b"])
def test_an_alias_is_no_adapter_and_gets_no_canaries(fake, load_test, models):
    """It answers as whatever version of its adapter is there, which is nobody's leak."""
    url = fake(adapters={"a": "/adapters/a", "b": "/adapters/b"}, aliases={"alias": "a"})
    flags = {"churn_rate": 8.0, "churn_adapter": ("a=/adapters/a,/adapters/a2",), "churn_inplace": True}
    result = load_test(url, models=models, rate="20", duration=1.5, canary_rate=20.0, canary_models=3, **flags)
    assert result["models"] == (models.split(",") if models else ["a", "b"])
    assert ("alias" in result["per_adapter"]) is bool(models)
    assert result["correct"] and result["canaries"]["models"] == ["a", "b", "base"]
    assert result["canaries"]["outcomes"].keys() <= {"own", "unjudged"} and not result["canaries"]["twins"]


@pytest.mark.parametrize("drain", [False, True])
def test_with_drain_no_adapter_is_unloaded_under_its_requests(fake, load_test, drain):
    url = fake(adapters=ADAPTERS, ttft=0.1, itl=0.005)
    result = load_test(url, rate="20", duration=2.0, churn_rate=6.0, canary_rate=10.0, churn_drain=drain)
    [run] = result["runs"]
    unloads = [(e["name"], e["at"]) for e in run["churn_events"] if e["call"] == "unload" and e["action"] != "restore"]
    met = [r for r in run["requests"] for name, at in unloads if r["model"] == name and r["start"] < at < r["end"]]
    assert len(unloads) > 2 and bool(met) is not drain
    assert result["correct"] and not result["failures"]


@pytest.mark.parametrize("inplace", [False, True])
def test_no_adapter_is_left_as_loaded_in_place(fake, load_test, inplace):
    """vLLM reads such an adapter from disk at every step."""
    url = fake(adapters=ADAPTERS)
    flags = {"churn_adapter": ("a=/other/a", "b=/adapters/b"), "churn_inplace": inplace}
    load_test(url, rate="20", duration=1.0, churn_rate=8.0, **flags)
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        loaded = {card["id"]: card for card in json.load(answer)["data"]}
    assert loaded["a"]["root"] == "/other/a"
    assert not any(loaded[name]["inplace"] for name in ADAPTERS)


def test_a_wrong_path_ends_the_test_before_anything_is_unloaded(fake, load_test):
    url = fake(adapters=ADAPTERS)
    with pytest.raises(ServerError, match=r"a could not be loaded .*no such folder"):
        load_test(url, churn_rate=1.0, churn_adapter=("a=/missing",))
    assert {c.name for c in asyncio.run(cards(url))} == {"base", "a", "b", "c"}


def test_paths_for_churn():
    served = [ModelCard("base", None, "base"), ModelCard("a", "base", "/p"), ModelCard("b", "base", None)]
    assert [(a.name, a.paths) for a in adapters((), served, ["a", "b"])] == [("a", ("/p",))]
    given = adapters(("x=/1,/2",), served, [])
    assert given == [ChurnedAdapter("x", ("/1", "/2"))]
    for wrong in ("x", "=/1", "x=", "x=/1,"):
        with pytest.raises(ConfigError, match="--churn-adapter"):
            adapters((wrong,), served, [])
    with pytest.raises(ConfigError, match="does not tell"):
        adapters((), served, ["b"])


def test_a_leak_is_seen_and_named(fake, load_test):
    result = load_test(
        fake(adapters=ADAPTERS, every=3, after=REFERENCES, misbehave="leak"), rate="20", duration=1, canary_rate=20
    )
    assert not result["correct"]
    leaks = [w for w in result["canaries"]["wrong"] if w["outcome"] == "leaked"]
    assert leaks and all(w["answered_as"] in {"base", "a"} for w in leaks)
    assert "WRONG ANSWERS" in table.render(result)


def test_where_fields_are_ignored_a_changed_answer_is_no_failure(fake, load_test):
    url = fake(adapters=ADAPTERS, route="ignored", every=3, after=REFERENCES, misbehave="random")
    result = load_test(url, rate="20", duration=1.5, canary_rate=20.0)
    assert result["canaries"]["outcomes"]["changed"] and result["correct"]


def test_what_is_not_deterministic_is_seen(fake, load_test):
    url = fake(adapters=ADAPTERS, every=3, after=REFERENCES, misbehave="random")
    result = load_test(url, rate="20", duration=1.5, canary_rate=20.0)
    assert result["canaries"]["outcomes"]["changed"] and result["canaries"]["route_request"]
    assert not result["correct"]


@pytest.mark.parametrize("route", ["refused", "ignored"])
def test_a_server_without_route_scope_gets_canaries_without(fake, load_test, route):
    result = load_test(fake(adapters=ADAPTERS, route=route), rate="10", duration=1.0, canary_rate=10.0)
    assert result["canaries"]["route_request"] is False
    assert result["canaries"]["outcomes"] == {"own": result["canaries"]["sent"]}
    assert result["canaries"]["twins"] == []


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize(("margin", "outcome"), [(0.2, "tied"), (2.0, "changed")])
def test_a_tie_that_falls_the_other_way_is_no_failure(fake, load_test, endpoint, margin, outcome):
    url = fake(adapters=ADAPTERS, every=3, after=REFERENCES, misbehave="flip", margin=margin, bundle=3)
    result = load_test(url, endpoint=endpoint, rate="20", duration=1.0, canary_rate=20.0)
    assert result["canaries"]["outcomes"].keys() == {"own", outcome}
    assert result["correct"] is (outcome == "tied")


def test_a_server_without_logprobs_gets_canaries_without(fake, load_test):
    result = load_test(fake(adapters=ADAPTERS, refuse="logprobs"), rate="10", duration=0.5, canary_rate=10.0)
    assert result["canaries"]["route_request"] is True
    assert result["canaries"]["outcomes"] == {"own": result["canaries"]["sent"]}


def test_adapters_that_answer_alike_are_named(fake, load_test):
    url = fake(adapters={"a": "/same", "b": "/same"})
    result = load_test(url, requests=4, canary_rate=5.0)
    assert result["canaries"]["twins"] == [["a", "b"]]


def test_repeats_give_intervals_and_pairs_give_ratios(fake, load_test):
    result = load_test(fake(adapters=ADAPTERS, ttft=0.02), requests=12, repeats=3, versus_base=True, max_tokens="2")
    assert (len(result["runs"]), len(result["base_runs"]), result["completed"]) == (3, 3, 36)
    interval = result["confidence"]["median_ttft_ms"]
    assert interval["from"] == "repeats"
    assert interval["low"] < result["median_ttft_ms"] < interval["high"]
    ratio = result["ratio_to_base"]["median_ttft_ms"]
    assert ratio["pairs"] == 3
    assert ratio["ratio"] == pytest.approx(1, abs=0.35)
    assert {r["model"] for run in result["base_runs"] for r in run["requests"]} == {"base"}
    assert [run["seed"] for run in result["runs"]] == [0, 1, 2]


def test_a_closed_loop_does_not_hammer_a_server_that_fails(fake, load_test):
    result = load_test(fake(every=1, after=2, misbehave="status:503"), duration=0.5, concurrency=2)
    assert 2 <= result["failed"] <= 12
    assert result["failures"] == {"http_503": result["failed"]}
    assert result["mean_ttft_ms"] is None
    json.dumps(result, allow_nan=False)
    check_page(page.render(result))
    assert "http_503" in table.render(result)


def test_a_run_that_sends_no_request_has_a_dash_for_its_good_share(fake, load_test):
    result = load_test(fake(), rate="0.01", duration=0.2, goodput=("ttft:500",))
    assert (result["num_prompts"], result["good_share"]) == (0, None)
    assert "0, -\n" in table.render(result)
    check_page(page.render(result))


def test_a_metronome_is_valid_json(fake, load_test):
    result = load_test(fake(), rate="40", burstiness=float("inf"), duration=0.5)
    assert json.loads(json.dumps(result, allow_nan=False))["burstiness"] == "inf"
    starts = sorted(r["planned"] for r in result["runs"][0]["requests"])
    assert starts == pytest.approx([0.025 * i for i in range(1, len(starts) + 1)], abs=1e-6)


def test_a_blocked_event_loop_is_called_the_limit(fake, load_test, monkeypatch):
    """A client made slow on purpose: every request holds the event loop for 60 ms."""
    from tucka_runtime.loadtest.client import LoadClient

    generate = LoadClient.generate

    async def slow(self, record, body):
        import time

        time.sleep(0.06)
        return await generate(self, record, body)

    monkeypatch.setattr(LoadClient, "generate", slow)
    result = load_test(fake(ttft=0.01), rate="30", duration=1.5, max_tokens="2")
    assert result["client_limited"]
    reasons = " ".join(result["runs"][0]["client"]["reasons"])
    assert "event loop" in reasons and "late" in reasons


def test_verdicts():
    good = {
        "loop_lags": [0.001] * 100,
        "core_waits": [0.0] * 100,
        "cpu_share": 0.2,
        "send_lags": [0.001] * 9,
        "mean_gap": 0.1,
        "ttfts": [0.1],
    }
    assert not saturation.verdict(**good, capped=False)["client_limited"]
    for wrong, word in (({"cpu_share": 0.95}, "core"), ({"loop_lags": [0.2] * 100}, "event loop"),
                        ({"send_lags": [0.5] * 9}, "late")):  # fmt: skip
        verdict = saturation.verdict(**(good | wrong), capped=False)
        assert verdict["client_limited"] and word in verdict["reasons"][0]
    held = saturation.verdict(**(good | {"send_lags": [0.5] * 9}), capped=True)
    assert "--concurrency" in held["reasons"][0]
    # a lag that is small beside what is measured does not matter
    assert not saturation.verdict(**(good | {"loop_lags": [0.05] * 100, "ttfts": [2.0]}), capped=False)[
        "client_limited"
    ]


def test_a_client_that_waits_for_a_core_is_not_the_limit():
    """The server took the cores: what the client measures is uncertain, and it is not what was slow."""
    busy = {"loop_lags": [0.2] * 100, "core_waits": [0.199] * 100, "cpu_share": 0.02, "send_lags": [0.5] * 9}
    found = saturation.verdict(**busy, mean_gap=0.1, ttfts=[0.1], capped=False)
    assert not found["client_limited"] and not found["reasons"]
    assert [" ".join(warning.split()[:3]) for warning in found["warnings"]] == [
        "the client waited", "the client waited", "requests left 500",
    ]  # fmt: skip


def test_waiting_for_a_core_is_measured():
    """More threads than cores that never rest: whoever wakes up waits."""
    command = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(command) for _ in range(2 * len(os.sched_getaffinity(0)))]
    try:
        before, until = saturation.waited_for_a_core(), time.monotonic() + 20
        while saturation.waited_for_a_core() - before < 0.01 and time.monotonic() < until:
            time.sleep(0.001)
        assert saturation.waited_for_a_core() - before >= 0.01
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_choosing_models():
    served = [ModelCard("base", None, None), ModelCard("a", "base", None), ModelCard("b", "base", None)]
    assert choose_models(Settings(), served) == (["a", "b"], "base")
    assert choose_models(Settings(models="b,base"), served) == (["b", "base"], "base")
    assert choose_models(Settings(), served[:1]) == (["base"], "base")
    assert choose_models(Settings(), [*served, ModelCard("alias", "base", None, alias=True)])[0] == ["a", "b"]
    with pytest.raises(ConfigError, match="x not served; there are base, a, b"):
        choose_models(Settings(models="x"), served)
    with pytest.raises(ConfigError, match="--versus-base"):
        choose_models(Settings(versus_base=True), served[:1])
    with pytest.raises(ServerError):
        choose_models(Settings(), [])


def test_the_first_request_failing_says_why(fake, load_test):
    with pytest.raises(ServerError, match="http_503"):
        load_test(fake(every=1, misbehave="status:503"))


# ---- files and commands


def test_the_command_writes_json_and_html(fake, tmp_path, capsys):
    out, html = tmp_path / "a.json", tmp_path / "a.html"
    url = fake(adapters={"<b>bold</b>": "/p", "two": "/q"}, ttft=0.01)
    flags = ["--url", url, "--requests", "12", "--goodput", "ttft:500", "--canary-rate", "5", "--api-key", "secret-key"]
    assert cli.main([*flags, "--json", str(out), "--html", str(html), "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "requests answered / failed" in shown and "goodput" in shown
    text = out.read_text()
    assert "secret-key" not in text
    result = json.loads(text)
    for name in ("request_throughput", "output_throughput", "total_token_throughput", "mean_ttft_ms", "median_tpot_ms",
                 "p99_itl_ms", "std_e2el_ms", "completed", "failed", "duration", "total_input_tokens", "num_prompts",
                 "request_goodput", "max_concurrency", "burstiness", "request_rate", "backend"):  # fmt: skip
        assert name in result, name
    raw = [Record.from_json(r) for r in result["runs"][0]["requests"] if r["kind"] == "load"]
    assert len(raw) == 12
    again = report.metrics.Figures(raw, result["duration"], {}).summary()
    assert again["mean_ttft_ms"] == pytest.approx(result["mean_ttft_ms"], abs=0.01)
    check_page(html.read_text())
    assert cli.main(["report", str(out), str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == html.read_text()


@pytest.mark.parametrize(
    ("url", "written"),
    [
        ("http://joe:s3cret@host:8000/v1", "http://host:8000/v1"),
        ("joe:s3@cret@host:8000", "host:8000"),
        ("https://joe@host", "https://host"),
        ("http://host:8000/a@b", "http://host:8000/a@b"),
    ],
)
def test_the_password_of_a_url_is_not_written(url, written):
    assert report.settings_json(Settings(url=url))["url"] == written


class Tags(HTMLParser):
    """Balanced tags, no reference to anything outside."""

    void = ("meta", "br")

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        assert not {"src", "href"} & {name for name, _ in attrs}
        self.seen.append(tag)
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(html):
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert "svg" in tags.seen and "b>bold" not in html
    assert "nan" not in html.lower().replace("<td>name", "")
    assert "url(" not in html and "script" not in tags.seen


def test_commands_that_fail_say_so(fake, tmp_path, capsys):
    assert cli.main(["--url", "http://127.0.0.1:9", "--quiet"]) == 1
    assert cli.main(["--rate", "-1"]) == 1
    assert cli.main(["compare", str(tmp_path / "x"), str(tmp_path / "y")]) == 1
    assert cli.main(["--json", str(tmp_path / "no" / "a.json")]) == 1
    assert "folder does not exist" in capsys.readouterr().err
    assert cli.main(["--url", "http://127.0.0.1:9", "sweep", "--share", "0.9"]) == 1
    assert "tucka loadtest:" in capsys.readouterr().err
    leaky = fake(adapters=ADAPTERS, every=3, after=REFERENCES, misbehave="leak")
    canaries = ["--canary-rate", "20", "--duration", "1", "--rate", "5", "--warmup", "0", "--quiet"]
    assert cli.main(["--url", leaky, *canaries]) == 2


def test_help_shows_defaults_and_every_flag(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    for name in Settings.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in shown
    assert "zipf:1" in shown and "examples" in shown


def test_compare_calls_noise_noise():
    def result(ttft, half, source="repeats"):
        interval = {"low": ttft - half, "high": ttft + half, "from": source}
        return {"request_throughput": 5.0, "mean_ttft_ms": ttft, "confidence": {"mean_ttft_ms": interval}}

    def verdict(a, b):
        return next(r["verdict"] for r in compare.compare(a, b) if r["name"] == "mean_ttft_ms")

    assert verdict(result(100, 1), result(110, 1)) == "worse"
    assert verdict(result(100, 1), result(90, 1)) == "better"
    assert verdict(result(100, 10), result(110, 10)) == "same"
    assert verdict(result(100, 1), result(110, 1, "order statistics")) == "worse?"
    cut = result(100, 190)
    cut["confidence"]["mean_ttft_ms"]["low"] = 0.0  # no figure is negative: report.confidence cuts there
    assert verdict(cut, result(280, 1)) == "same"
    vllm = {"request_throughput": 6.0, "mean_ttft_ms": 50.0, "median_itl_ms": 3.0}
    rows = compare.compare(result(100, 1), vllm)
    assert [(r["name"], r["verdict"]) for r in rows] == [("request_throughput", "better?"), ("mean_ttft_ms", "better?")]
    assert "B / A" in compare.render(result(100, 1), vllm, ("a.json", "b.json"))
    check = page.render(vllm | {"completed": 3, "failed": 0, "output_throughput": 1.0, "median_ttft_ms": 1.0,
                                "median_tpot_ms": 2.0})  # fmt: skip
    assert "Latency" in check


def measured(good_share, client_limited=False, interrupted=False):
    run = {"interrupted": interrupted}
    return {"good_share": good_share, "client_limited": client_limited, "runs": [run], "base_runs": []}


@pytest.mark.parametrize("capacity", [0.4, 3.0, 12.34, 100.0])
def test_the_sweep_finds_the_knee_of_a_known_server(capacity):
    async def measure(rate):
        return measured(1.0 if rate <= capacity else 0.5)

    search = sweep.Sweep(measure, 0.95, 1.0, 0.05, 40)
    outcome = asyncio.run(search.execute())
    assert outcome["ended"] == "found"
    assert outcome["knee"] <= capacity < outcome["fails_at"] <= outcome["knee"] * 1.05
    assert len(search.points) < 25


def test_a_file_that_cannot_be_written_costs_no_figures(fake, tmp_path, capsys):
    flags = ["--requests", "2", "--canary-rate", "0", "--warmup", "0", "--quiet", "--json", str(tmp_path)]
    assert cli.main(["--url", fake(adapters=ADAPTERS), *flags]) == 1
    printed = capsys.readouterr()
    assert "cannot be written" in printed.err and "request throughput" in printed.out


def test_a_test_without_an_answer_fails_and_says_why(fake, capsys):
    url = fake(every=1, after=2, misbehave="status:503")
    flags = ["--requests", "3", "--canary-rate", "0", "--warmup", "0", "--quiet"]
    assert cli.main(["--url", f"{url.removeprefix('http://')}/v1", *flags]) == 1
    shown = capsys.readouterr().out
    assert "NO REQUEST WAS ANSWERED" in shown and "http_503" in shown and "3, the first: as told" in shown


def test_the_report_shows_lists_and_failures_plainly(fake, load_test):
    url = fake(adapters=ADAPTERS, every=2, after=2, misbehave="error_event")
    result = load_test(url, requests=4, concurrency=1, goodput=("ttft:500", "tpot:50"))
    assert result["failure_details"] == {"error_event": "engine died"}
    html = page.render(result)
    assert "ttft:500, tpot:50" in html and "engine died" in html
    check_page(html)


def test_the_sweep_stops_when_the_client_is_the_limit():
    async def measure(rate):
        return measured(1.0, client_limited=rate > 4)

    outcome = asyncio.run(sweep.Sweep(measure, 0.95, 1.0, 0.05, 40).execute())
    assert outcome["ended"] == "client"
    assert outcome["knee"] == pytest.approx(3.375)
    assert math.isinf(outcome["fails_at"] or math.inf)


@pytest.mark.parametrize(
    ("last", "ended"), [(measured(0.2, interrupted=True), "interrupted"), (measured(None), "nothing")]
)
def test_a_run_that_measured_nothing_ends_the_sweep_and_makes_no_point(last, ended):
    results = iter([measured(1.0), last])

    async def measure(rate):
        return next(results)

    search = sweep.Sweep(measure, 0.95, 2.0, 0.05, 40)
    outcome = asyncio.run(search.execute())
    assert outcome == {"knee": 2.0, "fails_at": None, "ended": ended}
    assert [point["rate"] for point in search.points] == [2.0]
    whole = outcome | {"points": search.points, "share": 0.95, "goodput_slo_ms": {"ttft": 500.0}}
    for points in (search.points, []):
        said = sweep.render(whole | {"points": points})
        assert sweep.ENDINGS[ended] and sweep.ENDINGS[ended] in said
    assert sweep_page.BANNERS[ended] in page.render(whole | {"points": [], "format": "tucka-loadtest-sweep/1"})


def test_an_interrupt_ends_the_sweep(fake, tmp_path, capsys, monkeypatch):
    """The first Ctrl-C, in the second run: no further rate is tried, and what was found is written."""
    out, open_loop, runs = tmp_path / "s.json", Run.open_loop, []

    async def interrupted(self, plan):
        runs.append(plan)
        if len(runs) == 2:
            asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGINT)
        await open_loop(self, plan)

    monkeypatch.setattr(Run, "open_loop", interrupted)
    monkeypatch.setattr(saturation, "verdict", lambda *args: {"client_limited": False, "reasons": [], "warnings": []})
    flags = ["--url", fake(), "--canary-rate", "0", "--warmup", "0", "--duration", "0.5", "--goodput", "ttft:9000"]
    assert cli.main(["sweep", *flags, "--quiet", "--most-runs", "4", "--start-rate", "20", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (len(runs), result["ended"], result["knee"]) == (2, "interrupted", 20.0)
    assert [point["rate"] for point in result["points"]] == [20.0]
    assert "20 conversations/s" in (shown := capsys.readouterr().out) and "the sweep was interrupted" in shown


def test_an_interrupt_before_the_sweeps_limits_are_known_ends_it(fake, capsys, monkeypatch):
    closed_loop = Run.closed_loop

    async def interrupted(self):
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGINT)
        await closed_loop(self)

    monkeypatch.setattr(Run, "closed_loop", interrupted)
    assert cli.main(["sweep", "--url", fake(ttft=0.1), "--warmup", "0", "--quiet", "--most-runs", "1"]) == 130
    assert "aborted" in capsys.readouterr().err


def test_the_sweep_command(fake, tmp_path, capsys):
    # one slot of 50 ms: 20 requests a second at the very most
    url, html = fake(ttft=0.05, slots=1), tmp_path / "s.html"
    flags = ["--url", url, "--max-tokens", "1", "--duration", "0.7", "--canary-rate", "0", "--quiet", "--warmup", "0"]
    code = cli.main(["sweep", *flags, "--goodput", "ttft:200", "--start-rate", "8", "--tolerance", "0.5", "--most-runs",
                     "4", "--share", "0.8", "--html", str(html), "--json", str(tmp_path / "s.json")])  # fmt: skip
    assert code == 0
    shown = capsys.readouterr().out
    assert "knee:" in shown
    assert 5 < json.loads((tmp_path / "s.json").read_text())["knee"] < 40
    check_page(html.read_text())
    assert cli.main(["report", str(tmp_path / "s.json"), str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == html.read_text()
    assert cli.main(["compare", str(tmp_path / "s.json"), str(tmp_path / "s.json")]) == 1


@pytest.mark.parametrize("flags", [("--html", "page.html"), ("--json", "nowhere/f.json")])
def test_what_fairness_cannot_write_is_said_before_it_runs(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--url", "http://127.0.0.1:9", "fairness", *flags]) == 1
    assert ("makes no page" if flags[0] == "--html" else "folder does not exist") in capsys.readouterr().err


def test_a_load_that_fails_behind_an_unload_that_failed_is_not_counted():
    """The server has the path that it had: the next canary is held to that."""
    churn = Churn.__new__(Churn)
    adapter = ChurnedAdapter("a", ("/one", "/two"))

    async def refused(action, what, adapter, inplace=False):
        return False

    churn.tell = refused
    asyncio.run(churn.load(adapter, "reload"))
    assert (adapter.generation, adapter.path) == (0, "/one")
