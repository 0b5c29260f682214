"""`tucka keys`."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tucka_runtime.cli.main import main
from tucka_runtime.server.http.key_file import digest_of, read_key_file


def test_a_key_is_made_listed_and_revoked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.json"
    monkeypatch.setenv("TUCKA_API_KEY_FILE", str(file))
    limits = ["--requests-per-minute", "60", "--tokens-per-minute", "9000", "--concurrent-requests", "4"]
    patterns = ["--adapters", "law-*", "--adapters", "base", "--tenant", "acme"]
    assert main(["keys", "add", "acme", "--role", "infer", "--role", "metrics", *patterns, *limits]) == 0
    said = capsys.readouterr()
    key = said.out.strip()
    assert said.out == key + "\n" and key not in said.err and "SIGHUP" in said.err
    (record,) = read_key_file(file)
    assert record.sha256 == digest_of(key.encode()) and record.roles == ("infer", "metrics")
    assert (record.adapters, record.tenant, record.requests_per_minute) == (("law-*", "base"), "acme", 60)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    assert main(["keys", "add", "ops", "--role", "admin", "--file", str(file)]) == 0
    capsys.readouterr()
    assert main(["keys", "list"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        f"acme  {key[:18]}_…  infer,metrics  law-* base  60 requests/min, 9000 tokens/min, 4 at once"
    )
    assert second.split("  ")[2:5] == ["admin", "*", "no limits"] and key not in first

    assert main(["keys", "revoke", "acme"]) == 0
    assert [record.name for record in read_key_file(file)] == ["ops"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["add", "ops"], "a key of the name ops"),
        (["add", "../ops"], "$.name"),
        (["add", "other", "--tokens-per-minute", "0"], "$.tokens_per_minute"),
        (["revoke", "other"], "no key of that name"),
        (["list", "--file", "/nowhere/keys.json"], "is not there"),
        (["add", "other", "--file", "/nowhere/keys.json"], "cannot be written: No such file"),
        (["revoke", "ops", "--file", "none.json"], "is not there"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setenv("TUCKA_API_KEY_FILE", str(tmp_path / "keys.json"))
    monkeypatch.chdir(tmp_path)
    assert main(["keys", "add", "ops"]) == 0
    before = (tmp_path / "keys.json").read_bytes()
    capsys.readouterr()
    assert main(["keys", *arguments]) == 1
    assert said in capsys.readouterr().err
    assert (tmp_path / "keys.json").read_bytes() == before and not (tmp_path / "none.json").exists()


def test_a_file_must_be_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUCKA_API_KEY_FILE", raising=False)
    assert main(["keys", "list"]) == 1
    assert "--file" in capsys.readouterr().err


@pytest.mark.parametrize("stdout", ["> /dev/full", ">&-"])
def test_a_key_that_nobody_can_read_is_not_kept(tmp_path: Path, stdout: str) -> None:
    file = tmp_path / "keys.json"
    command = f"exec {sys.executable} -m tucka_runtime.cli.main keys add ops --role admin --file {file} {stdout}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "was not kept" in done.stderr
    assert read_key_file(file) == ()
