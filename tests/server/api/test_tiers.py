"""More adapters than slots, on the real engine: each answers as itself whatever comes and goes."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support import GOLDEN
from tests.support.servers import Server, engine_of, make_base, series, start_command
from tucka_runtime import LLM, RouteScope, SamplingParams

FOLDERS = (
    "llama-qv-r8k3t3", "llama-all7-r4k2t2", "llama-layers13-r8k3t2", "llama-modules-to-save", "llama-odown-r6k3t2p3",
    "llama-odown-r8k1t1", "llama-qv-r16k4t2-a512", "train-llama-qv-r8k3t3",
)  # fmt: skip
NAMES = {f"n{i}": GOLDEN / folder / "adapter" for i, folder in enumerate(FOLDERS)}
SLOTS = 3
HOST_BYTES = 240_000
"""Less than the five smallest that may be left without a slot take (242,912): one at least is on the disk alone."""
PROMPT = "A prompt that is longer than two blocks of the KV cache, so that they can be used again"
ASK = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "route": "request"}


@contextmanager
def started(folder: Path, log: Path) -> Iterator[Server]:
    process, url = start_command(
        "--model", str(folder / "llama-tiny"),
        "--adapter-root", str(GOLDEN),
        "--state-dir", str(folder / "state"),
        "--adapter-slots", str(SLOTS),
        "--adapter-host-bytes", str(HOST_BYTES),
        "--adapter-wait-timeout", "2",
        "--shutdown-timeout", "5",
        log=log,
    )  # fmt: skip
    yield Server(url, process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiers")
    make_base(folder / "llama-tiny")
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, str]:
    """What each adapter answers where nothing comes and goes."""
    llm = LLM(folder / "llama-tiny", adapters={name: str(path) for name, path in NAMES.items()})
    sampling = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    answers = {name: llm.generate([PROMPT], sampling, name, RouteScope.REQUEST)[0].outputs[0].text for name in NAMES}
    assert len(set(answers.values())) > 4
    return answers


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with started(folder, folder / "log") as server:
        for name, path in NAMES.items():
            keep = {"keep_resident": True} if name == "n0" else {}
            server.post("/v1/adapters", {"name": name, "path": str(path), **keep}).raise_for_status()
        yield server


def ask(server: Server, name: str, **fields: object) -> httpx.Response:
    return server.post("/v1/completions", {**ASK, "model": name, **fields})


def tiers(server: Server) -> dict[str, str]:
    return {card["id"]: card["tucka"]["tier"] for card in server.get("/v1/adapters").json()["data"]}


def test_every_adapter_answers_as_itself_under_churn(server: Server, expected: dict[str, str]) -> None:
    begun = tiers(server)
    assert list(begun.values())[:SLOTS] == ["resident"] * SLOTS
    assert set(list(begun.values())[SLOTS:]) <= {"host", "registered"}, "a load pushes nobody out"
    order = [name for seed in range(3) for name in random.Random(seed).sample(sorted(NAMES), len(NAMES))]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda name: ask(server, name).raise_for_status().json(), order))
    assert [answer["choices"][0]["text"] for answer in answers] == [expected[name] for name in order]
    found = series(server)
    where = tiers(server)
    for tier in ("resident", "host", "registered"):
        assert found[f'tucka_adapters{{tier="{tier}"}}'] == list(where.values()).count(tier) > 0
    assert where["n0"] == "resident"
    assert found["tucka_adapters_loaded"] == len(NAMES) and found["tucka_adapter_slots"] == SLOTS
    assert found['tucka_adapter_evictions_total{tier="resident"}'] >= len(NAMES) - SLOTS
    assert found["tucka_adapter_host_bytes"] <= HOST_BYTES
    levels = [name for name in found if name.startswith("vllm:lora_adapter_loaded")]
    assert len(levels) == list(where.values()).count("resident") + list(where.values()).count("host")
    assert 'adapter_name="n0",level="gpu",pinned="true",rank="8"' in "".join(levels)


def test_what_was_evicted_finds_its_kv_again(server: Server, expected: dict[str, str]) -> None:
    ask(server, "n1").raise_for_status()
    for name in ("n2", "n3", "n4", "n5", "n6"):
        ask(server, name).raise_for_status()
    assert tiers(server)["n1"] != "resident"
    answer = ask(server, "n1").json()
    assert answer["choices"][0]["text"] == expected["n1"]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64


def test_a_combination_is_evicted_and_made_again(server: Server) -> None:
    """As any adapter is, and with its KV: one that is on the disk alone is made of its adapters' copies."""
    mix = {"model": "llama-tiny", "adapters": [{"name": "n1", "weight": 0.5}]}
    first = server.post("/v1/completions", ASK | mix).raise_for_status().json()
    assert first["choices"][0]["text"] != ask(server, "n1").json()["choices"][0]["text"]
    for name in ("n2", "n3", "n4", "n5", "n6", "n7"):
        ask(server, name).raise_for_status()
    assert series(server)["tucka_adapters_combined"] == 0
    again = server.post("/v1/completions", ASK | mix).raise_for_status().json()
    assert again["choices"] == first["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64


@contextmanager
def streaming(server: Server, name: str) -> Iterator[None]:
    """A request to the adapter goes on."""
    body = {**ASK, "model": name, "max_tokens": 150, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
        assert stream.status_code == 200
        lines = stream.iter_lines()  # kept: without it the stream is closed
        next(lines)
        yield


def test_a_cold_request_waits_while_all_slots_are_leased(server: Server, expected: dict[str, str]) -> None:
    """And others go on: a second request to a leased one, and the base. Then it is answered."""
    found = []
    with streaming(server, "n1"), streaming(server, "n2"):
        waiting = threading.Thread(target=lambda: found.append(ask(Server(server.url, 0), "n5")))
        waiting.start()
        assert ask(server, "n0").json()["choices"][0]["text"] == expected["n0"]
        assert ask(server, "llama-tiny", route=None).status_code == 200
    waiting.join()
    assert found[0].status_code == 200 and found[0].json()["choices"][0]["text"] == expected["n5"]


def test_kept_adapters_leave_a_slot_for_the_others(server: Server) -> None:
    body = {"lora_name": "n1", "lora_path": str(NAMES["n1"]), "pinned": True}
    assert server.post("/v1/load_lora_adapter", body).status_code == 200
    assert tiers(server)["n1"] == "resident"
    assert server.get("/v1/adapters/n1").json()["tucka"]["keep_resident"] is True
    refused = server.post("/v1/adapters", {"name": "n2", "path": str(NAMES["n2"]), "keep_resident": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "adapter_capacity")
    for name in ("n2", "n3", "n4"):
        ask(server, name).raise_for_status()
    assert (tiers(server)["n0"], tiers(server)["n1"]) == ("resident", "resident")
    assert server.post("/v1/load_lora_adapter", body | {"pinned": False}).status_code == 200
    assert server.get("/v1/adapters/n1").json()["tucka"]["keep_resident"] is False


def test_a_cold_request_is_refused_when_no_slot_gets_free(start_fake) -> None:
    server: Server = start_fake()
    residency = server.engine.on_restart.__self__.residency
    residency._slots, residency._timeout = 1, 1
    for name in ("n1", "n2"):
        server.post("/v1/adapters", {"name": name, "path": str(NAMES[name])}).raise_for_status()
    server.engine.seconds_per_token = 0.05
    with streaming(server, "n1"):
        for path in ("/v1/completions", "/v1/embeddings"):
            body = {"model": "n2", "prompt": "x"} if path == "/v1/completions" else {"model": "n2", "input": "x"}
            answer = server.post(path, body)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (503, "adapter_capacity", "model")
            assert answer.headers["retry-after"] == "1" and "--adapter-wait-timeout" in error["message"]
        assert ask(server, "n1").status_code == 200, "it need not give way any more: nobody waits"
    assert not residency.awaited
    server.engine.seconds_per_token = 0
    assert ask(server, "n2").status_code == 200


def test_a_stream_that_waits_for_a_slot_says_so(start_fake) -> None:
    """A proxy in front would take the silence for a dead server. A refusal after the first comment is an event."""
    server: Server = start_fake(sse_heartbeat=0.1)
    residency = server.engine.on_restart.__self__.residency
    residency._slots, residency._timeout = 1, 1
    for name in ("n1", "n2"):
        server.post("/v1/adapters", {"name": name, "path": str(NAMES[name])}).raise_for_status()
    server.engine.seconds_per_token = 0.05
    with streaming(server, "n1"):
        answer = server.post("/v1/completions", {"model": "n2", "prompt": "x", "stream": True})
    comments, _, event = answer.text.rpartition("data: ")
    assert answer.status_code == 200 and comments.count(": still here\n\n") >= 3
    assert json.loads(event)["error"]["code"] == "adapter_capacity"
    assert [request.adapter.name for request in server.engine.requests] == ["n1"] and not residency.awaited


def test_a_restart_loads_what_is_kept_and_the_rest_when_it_is_asked_for(
    folder: Path, server: Server, expected: dict[str, str]
) -> None:
    cards = server.get("/v1/adapters").json()["data"]
    other = folder / "other"
    shutil.copytree(folder / "state", other / "state")
    (other / "llama-tiny").symlink_to(folder / "llama-tiny")
    with started(other, folder / "log2") as again:
        assert again.get("/ready").status_code == 200
        found = again.get("/v1/adapters").json()["data"]
        assert [card["tucka"]["tier"] for card in found] == ["resident", *["registered"] * (len(NAMES) - 1)]
        for before, after in zip(cards, found, strict=True):
            same = {"created": before["created"], "tucka": before["tucka"] | {"tier": after["tucka"]["tier"]}}
            assert before | same == after | {"created": before["created"]}
        for name in NAMES:
            assert ask(again, name).json()["choices"][0]["text"] == expected[name]
        os.kill(engine_of(again.pid), signal.SIGKILL)
        while not (series(again)["tucka_engine_restarts_total"] and again.get("/ready").status_code == 200):
            time.sleep(0.1)
        assert [tier for tier in tiers(again).values() if tier != "registered"] == ["resident"]
        for name in reversed(NAMES):
            assert ask(again, name).json()["choices"][0]["text"] == expected[name]
