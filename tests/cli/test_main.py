"""The command line around the server: what it says where something is missing or meant otherwise."""

import http.server
import subprocess
import sys
import threading

import pytest

from tests.support import GOLDEN
from tucka_runtime.cli import healthcheck
from tucka_runtime.cli.main import main
from tucka_runtime.client import Client, client_key, server_address
from tucka_runtime.errors import TuckaError

ONE, TWO = (str(GOLDEN / name / "adapter") for name in ("llama-qv-r8k3t3", "llama-all7-r4k2t2"))


@pytest.mark.parametrize(("command", "module"), [("train", "peft"), ("loadtest", "aiohttp")])
def test_a_missing_extra_is_one_line(command: str, module: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; from tucka_runtime.cli.main import main; main()"
    flags = {"train": ["--data", __file__, "--out", "nowhere"], "loadtest": ["--url", "127.0.0.1:9"]}[command]
    done = subprocess.run([sys.executable, "-c", code, command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{module} is not installed" in done.stderr and f"sh deploy/install.sh {command}" in done.stderr
    helped = subprocess.run([sys.executable, "-c", code, command, "--help"], capture_output=True, text=True, check=True)
    assert "usage: tucka " + command in helped.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--speculative-config", '{"method": "ngram"}'], "--speculate ngram"),
        (["--ssl-certfile", "tls.crt"], "put a proxy in front"),
        (["m/llama", "other"], "unrecognized arguments: other"),
        (["--enable-lora", "yes"], "unrecognized arguments: yes"),
        (["--tensor-parallel-size=2"], "on one device"),
        (["--enable-prefix-caching=true"], "--enable-prefix-caching takes no value. Leave it out: prompts' KV"),
        (["--lora-modules", "law"], "NAME=PATH"),
        (["--lora-modules", "law="], "NAME=PATH"),
        (["--lora-modules", "{'name': 'law'}"], '{"name": "law", "path": "/a/law"}'),
        (["--lora-modules", '{"name": "law"}'], '{"name": "law", "path": "/a/law"}'),
        (["--lora-modules", '{"name": "law", "path": 1}'], "as texts"),
        (["--lora-modules", '{"name": "law", "path": "/a", "rank": 8}'], "base_model_name may stand there"),
        (["--lora-modules"], "unrecognized arguments: --lora-modules"),
    ],
)
def test_what_vllm_takes_and_this_server_does_not(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "usage: tucka serve" in error and said in error


def test_the_command_line_speaks_of_its_own_flags(
    start_fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_fake(api_key=("right",))
    flags = ["--url", f"{server.url.removeprefix('http://')}/v1/"]
    monkeypatch.delenv("TUCKA_CLIENT_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(["adapters", "list", *flags]) == 1
    assert "wants an API key. Give one of its keys with --api-key or in TUCKA_CLIENT_KEY" in capsys.readouterr().err
    assert main(["adapters", "list", *flags, "--api-key", "wrong"]) == 1
    assert "does not know this API key" in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    assert main(["adapters", "load", "a", ONE, *flags]) == 0
    assert main(["adapters", "load", "a", TWO, *flags]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--replace" in error and "load_inplace" not in error
    assert main(["adapters", "load", "a", TWO, *flags, "--replace"]) == 0


@pytest.mark.parametrize("targets", [["a=1", "a=3"], ["a=x"], ["a=" + "1" * 5000]])
def test_an_aliass_targets_are_named_once_with_a_weight(targets: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "alias", "x", *targets, "--url", "127.0.0.1:9"]) == 1
    error = capsys.readouterr().err
    assert "twice" in error or "whole number from 1" in error


def test_where_clients_go_and_with_what(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("127.0.0.1:8123", "http://127.0.0.1:8123/", "http://127.0.0.1:8123/v1/"):
        assert server_address(url) == "http://127.0.0.1:8123"
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    monkeypatch.setenv("TUCKA_CLIENT_KEY", "")
    assert client_key(None) == "second"
    monkeypatch.setenv("TUCKA_CLIENT_KEY", "first")
    assert client_key(None) == "first" and client_key("given") == "given"


def test_this_machine_is_not_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's clients set one in every container, and to it 127.0.0.1 is itself."""
    answering = http.server.HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=answering.serve_forever, daemon=True).start()
    port = answering.server_port
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    try:
        for host in ("127.0.0.1", "localhost", "http://127.0.0.1"):
            assert Client(f"{host}:{port}", None).get("/ready") == b"here"
        with pytest.raises(TuckaError, match="No answer"):
            Client("there.invalid", None).get("/ready")
        monkeypatch.setattr(healthcheck, "url", lambda command: f"http://127.0.0.1:{port}/ready")
        assert healthcheck.main() == 0
    finally:
        answering.shutdown()
        answering.server_close()


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"here")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_scrape_benchs_help() -> None:
    command = [sys.executable, "-m", "tucka_runtime.server.bench_scrape", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "adapters in use" in done.stdout


def test_the_scrape_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tucka_runtime.server import bench_scrape

    monkeypatch.setattr(bench_scrape, "REPEATS", 2)
    monkeypatch.setattr(sys, "argv", ["bench_scrape", "3"])
    bench_scrape.main()
    assert capsys.readouterr().out.count("HTTP") == 4
