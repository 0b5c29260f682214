"""A server that others can reach, with a key file: its keys come and go while it runs."""

import json
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest

from tests.support import GOLDEN
from tests.support.api_keys import bearer, write_keys
from tests.support.servers import start_command
from tucka_runtime.cli.main import main
from tucka_runtime.config import ServerConfig
from tucka_runtime.errors import ConfigError
from tucka_runtime.server.http.server import bind, check_open

BASE = str(GOLDEN / "bases" / "llama-tiny")


def until(file: Path, text: str) -> None:
    deadline = time.monotonic() + 30
    while text not in file.read_text():
        assert time.monotonic() < deadline, f"{text!r} is not in\n{file.read_text()}"
        time.sleep(0.05)


def test_keys_come_and_go_while_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, audit, log = tmp_path / "keys.json", tmp_path / "audit", tmp_path / "log"
    keys = write_keys(file, ops={"roles": ("admin", "infer")}, leaving={})
    process, url = start_command(
        "--model", BASE, "--host", "0.0.0.0", "--api-key-file", str(file), "--audit-log", str(audit),
        "--adapter-root", str(GOLDEN), log=log,
    )  # fmt: skip
    url = url.replace("0.0.0.0", "127.0.0.1")
    assert "Authorization: Bearer" in log.read_text() and "anybody" not in log.read_text()

    def status(key: str) -> int:
        body = {"model": "llama-tiny", "prompt": "Hi", "max_tokens": 2}
        return httpx.post(url + "/v1/completions", json=body, headers=bearer(key), timeout=30).status_code

    assert httpx.get(url + "/v1/models").status_code == 401
    assert status(keys["leaving"]) == status(keys["ops"]) == 200

    assert main(["keys", "revoke", "leaving", "--file", str(file)]) == 0
    assert main(["keys", "add", "coming", "--file", str(file)]) == 0
    coming = capsys.readouterr().out.splitlines()[-1]
    assert status(coming) == 401 and status(keys["leaving"]) == 200, "not before it is told"
    process.send_signal(signal.SIGHUP)
    until(log, "2 keys in")
    assert "added: coming; removed: leaving" in log.read_text()
    assert (status(coming), status(keys["leaving"]), status(keys["ops"])) == (200, 401, 200)

    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    process.send_signal(signal.SIGHUP)
    until(log, "The keys stay as they were")
    assert (status(coming), status(keys["leaving"]), status(keys["ops"])) == (200, 401, 200)
    file.write_bytes(whole)

    audit.rename(tmp_path / "audit.1")
    process.send_signal(signal.SIGHUP)
    until(audit.parent / "audit.1", "coming")
    deadline = time.monotonic() + 10
    while not audit.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    adapter = {"name": "one", "path": "llama-qv-r8k3t3/adapter"}
    loaded = httpx.post(url + "/v1/adapters", json=adapter, headers=bearer(keys["ops"]), timeout=30)
    assert loaded.status_code == 201
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0 and "Traceback" not in log.read_text()

    (first,) = [json.loads(line) for line in (tmp_path / "audit.1").read_text().splitlines()]
    assert (first["action"], first["key"], first["keys"]["removed"]) == ("keys", None, ["leaving"])
    last = json.loads(audit.read_text().splitlines()[-1])
    assert (last["key"], last["action"], last["adapter"], last["result"]) == ("ops", "load", "one", "ok")
    assert last["digest_after"] == loaded.json()["tucka"]["digest"]
    assert not [key for key in (*keys.values(), coming) if key in log.read_text() + audit.read_text()]


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_keys_others_are_kept_out(host: str, tmp_path: Path) -> None:
    """Unless it is said that somebody else does that."""
    write_keys(tmp_path / "keys.json")
    for settings in ({"insecure": True}, {"api_key": ("k",)}, {"api_key_file": str(tmp_path / "keys.json")}):
        with bind(host, 0) as listener:
            check_open(ServerConfig(host=host, **settings), listener)  # type: ignore[arg-type]
    with bind(host, 0) as listener, pytest.raises(ConfigError, match="--insecure"):
        check_open(ServerConfig(host=host), listener)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_this_machine_needs_no_keys(host: str) -> None:
    with bind(host, 0) as listener:
        assert isinstance(listener, socket.socket)
        check_open(ServerConfig(host=host), listener)
