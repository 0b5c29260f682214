"""The key file: whole whenever it is read, whoever writes it, and refused with one clear sentence where it is wrong."""

import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.api_keys import write_keys
from tucka_runtime.config import ServerConfig
from tucka_runtime.errors import ConfigError
from tucka_runtime.server.http import key_file
from tucka_runtime.server.http.access import Keys
from tucka_runtime.server.metrics.keys import KeyMetrics

RECORD = {"name": "a", "id": "0" * 12, "sha256": "0" * 64}


def test_a_key_is_in_the_file_as_its_hash_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys = write_keys(file, one={}, two={"roles": ("admin",)})
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text()
    for key in keys.values():
        assert re.fullmatch(r"tucka_[0-9a-f]{12}_[0-9a-f]{48}", key)
        assert key not in text and key.split("_")[2] not in text and key_file.digest_of(key.encode()) in text
    assert len(set(keys.values())) == 2


def test_changes_at_the_same_time_are_all_made(tmp_path: Path) -> None:
    """And who reads meanwhile finds a whole file every time."""
    file = tmp_path / "keys.json"
    write_keys(file, first={})
    with ThreadPoolExecutor(8) as pool:
        writing = [pool.submit(write_keys, file, **{f"key{i}": {}}) for i in range(24)]
        while not all(job.done() for job in writing):
            assert key_file.read_key_file(file)[0].name == "first"
        for job in writing:
            job.result()
    assert {key.name for key in key_file.read_key_file(file)} == {"first", *(f"key{i}" for i in range(24))}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys.json", "keys.json.lock"]


def test_a_change_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.json"
    write_keys(file, one={})
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        write_keys(file, two={})
    assert file.read_bytes() == before and not list(tmp_path.glob(".keys*"))


def test_a_replaced_file_keeps_its_mode_and_its_place(tmp_path: Path) -> None:
    """But for what everybody might do with it; and what links to it links to it still."""
    file, link = tmp_path / "keys.json", tmp_path / "link"
    write_keys(file, one={})
    file.chmod(0o644)
    link.symlink_to(file)
    write_keys(link, two={})
    assert link.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o640
    assert len(key_file.read_key_file(file)) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not as `tucka keys` writes it"), (b"\xff", "not as"), (b"[]", "Expected `object`"), (b"{}", "`keys`"),
        (json.dumps({"keys": [RECORD | {"rolls": ["infer"]}]}), "unknown field `rolls`"),
        (json.dumps({"keys": [RECORD | {"roles": ["root"]}]}), r"\$\.keys\[0\]\.roles\[0\]"),
        (json.dumps({"keys": [RECORD | {"requests_per_minute": 0}]}), "requests_per_minute"),
        (json.dumps({"keys": [RECORD | {"tokens_per_minute": True}]}), "tokens_per_minute"),
        (json.dumps({"keys": [RECORD | {"name": "a\n"}]}), r"\$\.keys\[0\]\.name"),
        (json.dumps({"keys": [RECORD | {"adapters": [""]}]}), "adapters"),
        (json.dumps({"keys": [RECORD, RECORD | {"id": "1" * 12}]}), "two keys of the name a"),
        (json.dumps({"keys": [RECORD, RECORD | {"name": "b"}]}), "two keys of the id 0"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, content: bytes | str, said: str) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=said) as error:
        key_file.read_key_file(file)
    assert RECORD["sha256"] not in error.value.message
    with pytest.raises(ConfigError, match=said):
        write_keys(file, other={})
    with pytest.raises(ConfigError, match="is not there"):
        key_file.read_key_file(tmp_path / "none")


def test_keys_are_found_by_the_whole_of_them(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys = write_keys(file, one={}, two={})
    found = Keys(ServerConfig(api_key_file=str(file), api_key=("plain",), admin_key=("root",)), KeyMetrics())
    for name, key in keys.items():
        access = found.find(key.encode())
        assert access is not None and access.name == name
        last = "0" if key[-1] != "0" else "1"
        for wrong in (key[:-1] + last, key[:-1], key + "0", key.upper(), key[:19], keys["one"][:19] + keys["two"][19:]):
            assert found.find(wrong.encode()) is None
    plain, root = found.find(b"plain"), found.find(b"root")
    assert plain is not None and plain.name == "api-key-1" and plain.roles == {"infer", "metrics"}
    assert root is not None and root.name == "admin-key-1" and "admin" in root.roles
    assert found.find(b"") is None


def test_what_was_used_up_survives_a_new_reading(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = write_keys(file, one={"requests_per_minute": 10}, two={})["one"].encode()
    keys = Keys(ServerConfig(api_key_file=str(file)), KeyMetrics())
    before = keys.find(key)
    assert before is not None
    for _ in range(5):
        before.admit().close()
    write_keys(file, three={})
    key_file.change_key_file(file, lambda records: tuple(r for r in records if r.name != "two"))
    changes = keys.replace(key_file.read_key_file(file))
    assert (changes.added, changes.changed, changes.removed) == (["three"], [], ["two"])
    after = keys.find(key)
    assert after is not None and after.limits is before.limits
    assert dict(after.limits.headers())[b"x-ratelimit-remaining-requests"] == b"5"  # type: ignore[union-attr]
