"""The tester against the real server: churn, canaries, and counters that agree."""

import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

START_SECONDS = 90


@pytest.fixture(scope="module")
def served(golden: Path) -> Iterator[tuple[str, Path]]:
    """A tiny random model with three adapters; (URL, folder of the adapters)."""
    adapters = {"qv": "llama-qv-r8k3t3", "all7": "llama-all7-r4k2t2", "odown": "llama-odown-r8k1t1"}
    command = [sys.executable, "-c", "import sys; from tucka_runtime.cli.main import main; sys.exit(main())", "serve"]
    command += ["--model", str(golden / "bases" / "llama-tiny"), "--served-model-name", "tiny", "--port", "0"]
    for name, folder in adapters.items():
        command += ["--adapter", f"{name}={golden / folder / 'adapter'}"]
    command += ["--adapter-root", str(golden), "--device", "cpu", "--num-threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url, seen = None, []
    for line in process.stderr:
        seen.append(line)
        if found := re.search(r"ready at (http://\S+?)\.? ", line):
            url = found[1]
            break
    assert url, "the server did not come up:\n" + "".join(seen[-20:])
    with open("/dev/null", "w") as nowhere:
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=nowhere)
        wait_until_ready(url)
        yield url, golden
        process.terminate()
        process.wait(30)
        drain.wait(5)
        process.stderr.close()


def wait_until_ready(url: str) -> None:
    for _ in range(START_SECONDS * 10):
        try:
            urllib.request.urlopen(url + "/ready").close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server is not ready")


def counters(url: str) -> dict[str, float]:
    """Sums over all labels."""
    totals: dict[str, float] = {}
    for line in urllib.request.urlopen(url + "/metrics").read().decode().splitlines():
        if not line.startswith("#"):
            name, value = line.split("{")[0].split(" ")[0], line.rsplit(" ", 1)[1]
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals


@pytest.mark.timeout(START_SECONDS + 60)
def test_churn_under_load_leaves_every_answer_right_and_the_counts_equal(served, load_test):
    url, golden = served
    before = counters(url)
    paths = {name: str(golden / name / "adapter") for name in ("llama-qv-r8k3t3", "llama-qv-r16k4t2-a512")}
    result = load_test(
        url,
        rate="8",
        duration=3.0,
        max_tokens="16",
        churn_rate=1.5,
        churn_adapter=(f"qv={','.join(paths.values())}", f"all7={golden / 'llama-all7-r4k2t2' / 'adapter'}"),
        canary_rate=5.0,
        base_share=0.2,
    )
    after = counters(url)
    assert result["correct"], result["canaries"]["wrong"]
    assert result["canaries"]["route_request"] and result["canaries"]["outcomes"]["own"] > 5
    assert result["canaries"]["twins"] == []
    assert set(result["failures"]) <= {"unloaded"}
    assert all(e["ok"] for e in result["runs"][0]["churn_events"]) and result["cold"]["cold_requests"] > 0
    ours = result["all_traffic"]
    assert after["tucka_prompt_tokens_total"] - before.get("tucka_prompt_tokens_total", 0) == ours["input_tokens"]
    assert (
        after["tucka_generation_tokens_total"] - before.get("tucka_generation_tokens_total", 0) == ours["output_tokens"]
    )
    assert after["tucka_requests_total"] - before.get("tucka_requests_total", 0) == ours["answered"]
