"""The audit log: who changed what, over a socket; and a disk that is full."""

import asyncio
import json
import os
import stat
from pathlib import Path

import pytest

from tests.support import GOLDEN
from tests.support.api_keys import bearer, write_keys
from tests.support.servers import Server
from tucka_runtime.errors import ConfigError
from tucka_runtime.server.service.audit import AuditLog

ONE, TWO = (str(GOLDEN / name / "adapter") for name in ("llama-qv-r8k3t3", "llama-all7-r4k2t2"))


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """By name, in tmp_path / "keys"."""
    admin = {"roles": ("admin", "infer")}
    return write_keys(tmp_path / "keys", ops=admin, law=admin | {"adapters": ("law-*",)}, user={})


def start(start_fake, folder: Path, audit: Path) -> Server:
    return start_fake(api_key_file=str(folder / "keys"), admin_key=("root-key",), audit_log=str(audit))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_change_has_its_line(start_fake, tmp_path: Path, keys: dict[str, str]) -> None:
    audit = tmp_path / "audit"
    server = start(start_fake, tmp_path, audit)
    assert stat.S_IMODE(audit.stat().st_mode) == 0o600
    ops, law = bearer(keys["ops"]), bearer(keys["law"])

    def load(name: str, path: str, headers: dict[str, str], **more: object) -> int:
        return server.post("/v1/adapters", {"name": name, "path": path} | more, headers=headers).status_code

    assert load("tax", ONE, ops | {"x-request-id": "first"}) == 201
    assert load("tax", ONE, bearer("root-key")) == 200
    assert load("tax", TWO, ops) == 409
    assert load("tax", TWO, ops, load_inplace=True) == 201
    assert load("tax", "/nowhere", ops) == 400
    assert load("tax", ONE, law) == 403
    assert load("bad\nname", ONE, ops) == 400
    assert server.client.delete(server.url + "/v1/adapters/tax", headers=law).status_code == 404
    assert server.client.delete(server.url + "/v1/adapters/tax", headers=ops).status_code == 200
    assert server.post("/v1/unload_lora_adapter", {}, headers=ops).status_code == 400
    assert server.post("/v1/adapters", {"name": "tax", "path": ONE}, headers=bearer(keys["user"])).status_code == 403
    server.get("/v1/adapters", headers=ops).raise_for_status()

    found = lines(audit)
    one, two = found[0]["digest_after"], found[3]["digest_after"]
    assert one and two and one != two
    told = [tuple(line[field] for field in ("key", "action", "adapter", "digest_before", "digest_after", "result"))
            for line in found]  # fmt: skip
    assert told == [
        ("ops", "load", "tax", None, one, "ok"),
        ("admin-key-1", "load", "tax", one, one, "ok"),
        ("ops", "load", "tax", None, None, "adapter_exists"),
        ("ops", "load", "tax", one, two, "ok"),
        ("ops", "load", "tax", None, None, "invalid_adapter"),
        ("law", "load", "tax", None, None, "name_not_allowed"),
        ("ops", "load", "?", None, None, "invalid_request_error"),
        ("law", "unload", "tax", None, None, "model_not_found"),
        ("ops", "unload", "tax", two, None, "ok"),
        ("ops", "POST /v1/unload_lora_adapter", None, None, None, "invalid_request_error"),
    ]
    assert found[0]["request_id"] == "first" and all(line["time"] and line["request_id"] for line in found)
    assert not [key for key in (*keys.values(), "root-key") if key in audit.read_text()]


def test_while_it_cannot_be_written_nothing_is_changed(
    start_fake, tmp_path: Path, keys: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """/dev/full is a full disk. The change that met it is done: its line is in the server's log, and first in the
    file."""
    audit = tmp_path / "audit"
    audit.symlink_to("/dev/full")
    server = start(start_fake, tmp_path, audit)
    ops = bearer(keys["ops"])
    body = {"name": "tax", "path": ONE}
    assert server.post("/v1/adapters", body, headers=ops | {"x-request-id": "lost-line"}).status_code == 201
    assert "lost-line" in caplog.text and "cannot be written" in caplog.text
    for _ in range(2):
        refused = server.client.delete(server.url + "/v1/adapters/tax", headers=ops)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "storage_unavailable"
    ask = {"model": "tax", "prompt": "a", "max_tokens": 1}
    assert server.post("/v1/completions", ask, headers=ops).status_code == 200, "answers do not depend on it"

    audit.unlink()
    audit.write_bytes(b'{"torn')  # as a full disk leaves it
    asyncio.run_coroutine_threadsafe(server.service.audit.reopen(), server.loop).result(10)
    assert server.client.delete(server.url + "/v1/adapters/tax", headers=ops).status_code == 200
    torn, *whole = audit.read_text().splitlines()
    assert torn == '{"torn'
    assert [(line["action"], line["request_id"] == "lost-line") for line in map(json.loads, whole)] == [
        ("load", True),
        ("unload", False),
    ]


def test_one_that_cannot_be_opened_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match="--audit-log /nowhere/audit cannot be opened: No such file"):
        AuditLog("/nowhere/audit")


def test_it_goes_on_where_it_ended(start_fake, tmp_path: Path, keys: dict[str, str]) -> None:
    audit = tmp_path / "audit"
    audit.write_text('{"from": "before"}\n')
    os.chmod(audit, 0o640)
    server = start(start_fake, tmp_path, audit)
    server.post("/v1/adapters", {"name": "tax", "path": ONE}, headers=bearer(keys["ops"])).raise_for_status()
    before, after = lines(audit)
    assert before == {"from": "before"} and after["adapter"] == "tax"
    assert stat.S_IMODE(audit.stat().st_mode) == 0o640
