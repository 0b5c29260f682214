"""`tucka plan`: figures, a page, and what is said of wrong flags."""

import json
from pathlib import Path

import pytest

from tests.support.plans import PROFILE
from tucka_runtime.cli.main import main

DRAWN = ["--zipf", "1", "--adapters", "50", "--rate", "20", "--requests", "400", "--slots", "8"]


@pytest.fixture
def profile(tmp_path: Path) -> str:
    PROFILE.write(tmp_path / "profile.json")
    return str(tmp_path / "profile.json")


def test_a_plan(profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table, the page and the JSON say the same; the same command says it again."""
    page = tmp_path / "page.html"
    command = ["plan", "--profile", profile, *DRAWN, "--replicas", "4,2", "--slo-first-token-ms", "2000"]
    assert main([*command, "--html", str(page)]) == 0
    table = capsys.readouterr().out
    assert table.startswith("400 requests in ") and "the first 40 not counted; 50 adapters, 8 slots" in table
    assert main([*command, "--json"]) == 0
    said = capsys.readouterr().out
    found = json.loads(said)
    assert main([*command, "--json"]) == 0 and capsys.readouterr().out == said
    assert [(f["replicas"], f["policy"]) for f in found["fleets"]] == [
        (n, p) for n in (2, 4) for p in ("round-robin", "least-loaded", "consistent-hash", "affinity")
    ]
    hits = {(f["policy"], f["replicas"]): f["hit_rate"] for f in found["fleets"]}
    assert hits["consistent-hash", 4] > hits["round-robin", 4] + 0.1
    html = page.read_text()
    for fleet in found["fleets"]:
        assert f"{fleet['hit_rate']:.1%}" in table and f"{fleet['hit_rate']:.1%}" in html
        assert fleet["requests"] == 360 and fleet["first_token"].keys() == {"p50", "p90", "p99"}
    assert "smallest fleet with 99% of first tokens within 2000 ms" in table and "polyline" in html
    assert found["slo"] == {"seconds": 2.0, "percentile": 99.0}
    for policy, number in found["smallest_fleet"].items():
        more = ["--policy", policy, "--percentiles", "99,99.2", "--json"]  # 4 of 360 are one too many
        for replicas, holds in ((number, True), (number - 1, False)):
            if replicas:
                assert main(["plan", "--profile", profile, *DRAWN, *more, "--replicas", str(replicas)]) == 0
                (fleet,) = json.loads(capsys.readouterr().out)["fleets"]
                waits = fleet["first_token"]
                assert (waits["p99"] <= 2.0) if holds else (waits["p99.2"] > 2.0), (policy, replicas)


def test_a_trace(profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival,adapter,prompt_tokens,output_tokens\n0,a,5,4\n4,a,5,4\n")
    flags = ["plan", "--profile", profile, "--trace", str(trace), "--warmup", "0", "--policy", "affinity", "--json"]
    assert main(flags) == 0
    (fleet,) = json.loads(capsys.readouterr().out)["fleets"]
    assert fleet["hit_rate"] == 0.5
    assert fleet["first_token"]["p50"] == pytest.approx((0.520 + 0.020) / 2)
    assert main([*flags, "--trace-speed", "8"]) == 0  # the second comes while the first one's adapter is loaded
    assert json.loads(capsys.readouterr().out)["fleets"][0]["hit_rate"] == 0.0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "Give --profile FILE, which `tucka plan --measure URL -o FILE` makes"),
        (["--profile", "P"], "Give --trace FILE, or --zipf A with --adapters K and --rate R"),
        (["--profile", "P", "--zipf", "1", "--rate", "5"], "needs --adapters K"),
        (["--profile", "P", *DRAWN, "--replicas", "0"], "--replicas must be between 1"),
        (["--profile", "P", *DRAWN, "--replicas", "many"], "numbers with commas between"),
        (["--profile", "P", *DRAWN, "--percentiles", "101"], "--percentiles between 0 and 100"),
        (["--profile", "P", *DRAWN, "--warmup", "1"], "--warmup must be a share below 1"),
        (["--profile", "P", *DRAWN, "--requests", "0"], "--requests must be at least 1"),
        (["--profile", "P", *DRAWN, "--duration", "inf"], "--duration must be at least 1"),
        (["--profile", "P", *DRAWN, "--slots", "0"], "--adapter-slots must be at least 1"),
        (["--profile", "P", *DRAWN, "--max-num-seqs", "4000"], "exceeds --max-num-batched-tokens"),
        (["--profile", "P", *DRAWN, "--slo-first-token-ms", "0"], "--slo-first-token-ms must be over 0"),
        (["--profile", "P", *DRAWN, "--rate", "ramp:1:9"], "--rate that changes needs --duration"),
        (["--profile", "P", *DRAWN, "--rate", "fast"], "--rate must be a positive number"),
        (["--profile", "P", *DRAWN, "--prompt-tokens", "none"], "--prompt-tokens must be a number"),
        (["--profile", "P", "--trace", "none.csv", "--rate", "5"], "A trace has its own arrivals"),
        (["--profile", "P", "--trace", "none.csv"], "cannot be read"),
        (["--profile", "none.json", *DRAWN], "cannot be read"),
        (["--profile", "P", *DRAWN, "--html", "none/page.html"], "cannot be written"),
        (["--measure", "http://127.0.0.1:1"], "give it -o FILE"),
        (["--measure", "http://127.0.0.1:1", "-o", "none/p.json"], "its folder does not exist"),
        (["--measure", "http://127.0.0.1:1", "-o", "p.json"], "no answer from http://127.0.0.1:1"),
    ],
)
def test_wrong_flags(flags: list[str], said: str, profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *[profile if flag == "P" else flag for flag in flags]]) == 1
    assert said in capsys.readouterr().err
