"""The command itself: how it starts, stops, and comes back."""

import json
import os
import re
import shlex
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.support import GOLDEN
from tests.support.servers import start_command
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.errors import ConfigError
from tucka_runtime.server import parts, serve
from tucka_runtime.server.http.server import bind
from tucka_runtime.server.settings_check import check_settings

BASE = str(GOLDEN / "bases" / "llama-tiny")
ONE = str(GOLDEN / "llama-qv-r8k3t3" / "adapter")


def wait_until_draining(url: str) -> None:
    """Until the server has seen its signal, which /ready says."""
    deadline = time.monotonic() + 10
    while (answer := httpx.get(url + "/ready")).status_code != 503:
        assert time.monotonic() < deadline
    assert answer.json() == {"status": "stopping"} and answer.headers["retry-after"]


def held(client: httpx.Client) -> list[str]:
    """What the engine is said to hold."""
    gauges = ("tucka_requests_running ", "tucka_requests_waiting ", "tucka_kv_blocks_used ")
    return [line.split()[1] for line in client.get("/metrics").text.splitlines() if line.startswith(gauges)]


def test_signals_state_and_a_dead_engine(tmp_path: Path) -> None:
    """One server's life: an adapter over HTTP, its engine killed, a stream through Ctrl-C, and another life after."""
    arguments = ("--model", BASE, "--state-dir", str(tmp_path / "state"), "--adapter-root", str(GOLDEN))
    process, url = start_command(*arguments, "--shutdown-timeout", "20", log=tmp_path / "log")
    client = httpx.Client(timeout=30, base_url=url)
    ask = {"model": "kept", "prompt": "Hello", "max_tokens": 8, "temperature": 0, "route": "request"}
    client.post("/v1/adapters", json={"name": "kept", "path": ONE}).raise_for_status()
    expected = client.post("/v1/completions", json=ask).json()["choices"]

    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (engine,) = (int(c) for c in children if b"tucka_runtime.engine.process" in Path(f"/proc/{c}/cmdline").read_bytes())
    long = ask | {"max_tokens": 240, "ignore_eos": True, "stream": True, "n": 8}
    with client.stream("POST", "/v1/completions", json=long) as stream:
        lines = stream.iter_lines()
        for _ in range(20):
            next(lines)
        assert held(client)[0] == "8.0"
        os.kill(engine, signal.SIGKILL)
        seen = [line for line in lines if line]
    assert "engine_unavailable" in seen[-1] and "[DONE]" not in seen[-1]
    assert client.get("/health").status_code == 200
    answer = client.get("/ready")
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert held(client) == ["0.0"] * 3
    answer = client.post("/v1/completions", json=ask)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_unavailable"
    deadline = time.monotonic() + 60
    while client.get("/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert held(client) == ["0.0"] * 3, "the new engine has nothing of the old one's"
    assert client.post("/v1/completions", json=ask).json()["choices"] == expected

    with client.stream("POST", "/v1/completions", json=long) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        with pytest.raises(httpx.TransportError):
            httpx.get(url + "/health")
        seen = [line for line in lines if line]
    assert seen[-1] == "data: [DONE]", "a running request may finish"
    assert process.wait(20) == 0
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said and "leaked" not in said

    # One sequence at a time: the eight last until the second signal on any machine.
    process, url = start_command(*arguments, "--drain-delay", "60", "--max-num-seqs", "1", log=tmp_path / "log2")
    assert httpx.post(url + "/v1/completions", json=ask, timeout=30).json()["choices"] == expected
    whole = threading.Thread(
        target=lambda: answers.append(httpx.post(url + "/v1/completions", json=long | {"stream": False}, timeout=30))
    )
    answers: list[httpx.Response] = []
    with httpx.stream("POST", url + "/v1/completions", json=long, timeout=30) as stream:
        lines = stream.iter_lines()
        next(lines)
        whole.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        wait_until_draining(url)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        seen = [line for line in lines if line]
        assert process.wait(20) == 0
        assert time.monotonic() - began < 8
    whole.join()
    assert "engine_unavailable" in seen[-1], "a request that runs when it is to stop at once ends with an error"
    assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "engine_unavailable"
    assert "Traceback" not in (tmp_path / "log2").read_text()


def test_what_it_says_to_try_shows_an_adapter_and_its_root_says_where_to_go(embedded: tuple[str, Path]) -> None:
    url, log = embedded
    (command,) = re.findall(r"^  (curl .*)$", log.read_text(), re.MULTILINE)
    words = shlex.split(command)
    headers = {"Content-Type": "application/json"}
    assert words[0] == "curl" and words[2:5] == ["-H", "Content-Type: application/json", "-d"]
    answer = httpx.post(words[1], content=words[5], headers=headers, timeout=30).json()
    assert answer["choices"][0]["message"]["content"] == "5 March 2024"
    found = httpx.get(url + "/").json()
    assert httpx.get(url + found["models"]).status_code == 200 and "/v1/chat/completions" in found["message"]


def test_a_port_stays_open_for_the_drain_delay(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process, url = start_command("--drain-delay", "4", "--shutdown-timeout", "5", "--metrics-port", "0", log=log)
    (port,) = re.findall(r"metrics without a key on port (\d+)", log.read_text())
    with httpx.Client(timeout=30, base_url=url) as pooled:
        assert pooled.get("/ready").status_code == 200
        process.send_signal(signal.SIGTERM)
        wait_until_draining(url)
        ask = {"model": "base", "prompt": "Hello", "max_tokens": 4}
        answer = pooled.post("/v1/completions", json=ask)
        assert answer.status_code == 200, "what still comes is served, on a connection of before"
        assert answer.headers["connection"] == "close", "and goes elsewhere the next time"
        assert pooled.post("/v1/completions", json=ask).status_code == 200, "on a new connection too"
        assert "tucka_engine_up 1" in httpx.get(f"http://127.0.0.1:{port}/metrics").text, "and scraped to the end"
    assert process.wait(20) == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(url + "/ready")


def test_a_taken_port_is_said_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="Choose another"):
        bind("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        ("meta/llama", {}, "not in the Hugging Face cache"),
        (".", {}, "no config.json"),
        (BASE, {"served_model_name": ("my model",)}, "--served-model-name"),
        (BASE, {"adapter_root": ("/nowhere",)}, "--adapter-root /nowhere"),
        (BASE, {"adapter": ("one=/nowhere",)}, "--adapter one"),
        (BASE, {"adapter": (f"one={ONE}", f"one={ONE}")}, "given twice"),
        (BASE, {"adapter": (f"one={ONE}",), "adapter_resident": ("two",)}, "--adapter-resident two"),
        (BASE, {"api_key_file": "/nowhere/keys.json"}, "keys.json is not there"),
        (BASE, {"host": "0.0.0.0"}, "--insecure"),
        (BASE, {"host": "0.0.0.0", "state_dir": "state"}, "--api-key-file"),
    ],
)
def test_what_is_wrong_at_first_sight_starts_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, model: str, settings: dict, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(parts, "EngineClient")
    assert serve.serve(EngineConfig(model=model), ServerConfig(port=0, **settings)) == 1
    assert said in caplog.text


def test_weights_that_this_user_may_not_read_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda file, mode: not str(file).endswith(".safetensors"))  # root may read all
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read .* chmod"):
        check_settings(EngineConfig(model=BASE), ServerConfig())


def test_a_folder_that_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    assert serve.serve(EngineConfig(model=str(tmp_path)), ServerConfig(port=0)) == 1
    assert "nothing" in caplog.text and "Traceback" not in caplog.text
