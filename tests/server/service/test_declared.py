"""Adapters that a folder and a file declare, on a server whose engine is a fake one. Every look is the test's own: no
test waits for a poll."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import GOLDEN
from tests.support.servers import Server
from tucka_runtime.errors import AdapterCapacityError, ConfigError, EngineDeadError
from tucka_runtime.server.service.declared import Declared, Tries, read_declaration

ONE = GOLDEN / "llama-qv-r8k3t3" / "adapter"
TWO = GOLDEN / "llama-all7-r4k2t2" / "adapter"


class Kept:
    """A server, and what keeps it."""

    def __init__(self, server: Server, folder: Path | None, file: Path | None):
        assert server.service is not None
        self.server = server
        self.adapters = server.service.adapters
        self.declared = Declared(self.adapters, folder, file, server.service.audit)

    def look(self, times: int = 1, first: bool = False) -> list[str]:
        assert self.server.loop is not None
        for _ in range(times):
            asyncio.run_coroutine_threadsafe(self.declared.look(first), self.server.loop).result(30)
        return sorted(adapter.key.name for adapter in self.adapters.all())

    def digest(self, name: str) -> str:
        return self.adapters.get(name).digest


@pytest.fixture
def watched(start_fake: Callable[..., Server], tmp_path: Path) -> Kept:
    (tmp_path / "watched").mkdir()
    return Kept(start_fake(adapter_root=()), tmp_path / "watched", None)


@pytest.fixture
def told(start_fake: Callable[..., Server], tmp_path: Path) -> Kept:
    return Kept(start_fake(adapter_root=(str(GOLDEN),)), None, tmp_path / "adapters.yaml")


def appear(folder: Path, name: str, source: Path) -> None:
    """As a trainer does it: beside, then by one rename."""
    shutil.copytree(source, folder / f".{name}")
    if (folder / name).exists():
        (folder / name).rename(folder / ".old")
    (folder / f".{name}").rename(folder / name)
    shutil.rmtree(folder / ".old", ignore_errors=True)


def test_what_appears_is_loaded_and_what_leaves_is_unloaded(watched: Kept, tmp_path: Path) -> None:
    folder = tmp_path / "watched"
    appear(folder, "law", ONE)
    shutil.copytree(ONE, folder / ".half")
    (folder / "notes").mkdir()
    (folder / "file").touch()
    assert watched.look(first=True) == ["law"]
    old = watched.digest("law")
    appear(folder, "law", TWO)
    appear(folder, "tax", ONE)
    assert watched.look() == ["law"] and watched.digest("law") == old  # it may still be arriving
    assert watched.look() == ["law", "tax"] and watched.digest("law") != old
    shutil.rmtree(folder / "law")
    assert watched.look() == ["tax"]


def test_what_is_changed_has_its_line_in_the_audit_log(start_fake: Callable[..., Server], tmp_path: Path) -> None:
    folder, file, audit = tmp_path / "watched", tmp_path / "adapters.yaml", tmp_path / "audit"
    folder.mkdir()
    server = start_fake(adapter_root=(str(GOLDEN),), audit_log=str(audit))
    kept = Kept(server, folder, file)
    appear(folder, "law", ONE)
    shutil.copytree(ONE, folder / "broken")
    (folder / "broken" / "adapter_model.safetensors").unlink()
    file.write_text(CONFIG.format(law=TWO).replace("id: law", "id: tone"))
    kept.look(first=True)
    shutil.rmtree(folder / "law")
    file.write_text("vLLMLoRAConfig: {ensureNotExist: {models: [{id: tone, source: x}]}}")
    assert kept.look() == ["team/tax"]
    told = [json.loads(line) for line in audit.read_text().splitlines()]
    one, two = told[0]["digest_after"], told[1]["digest_after"]
    found = {(t["by"], t["action"], t["adapter"], t["digest_before"], t["digest_after"], t["result"]) for t in told}
    assert found == {
        ("--adapter-watch", "load", "law", None, one, "ok"),
        ("--adapters-file", "load", "tone", None, two, "ok"),
        ("--adapters-file", "load", "team/tax", None, two, "ok"),
        ("--adapter-watch", "unload", "law", one, None, "ok"),
        ("--adapters-file", "unload", "tone", two, None, "ok"),
    }
    assert len(told) == 5 and not any(line["key"] or line["request_id"] for line in told)


def test_others_names_are_left_alone(watched: Kept, tmp_path: Path) -> None:
    answer = watched.server.client.put(
        f"{watched.server.url}/v1/adapters/mine",
        files=[
            ("f", (name, (ONE / name).read_bytes())) for name in ("adapter_config.json", "adapter_model.safetensors")
        ],
    )
    assert answer.status_code == 201 and watched.look(2) == ["mine"]


def test_a_mount_that_is_gone_retires_nothing(watched: Kept, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    appear(tmp_path / "watched", "law", ONE)
    watched.look(first=True)
    (tmp_path / "watched").rename(tmp_path / "away")
    assert watched.look(3) == ["law"]
    assert caplog.text.count("adapters stay as they are") == 1


def test_what_fails_is_not_tried_at_every_look(watched: Kept, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert watched.server.engine is not None
    watched.server.engine.load_error = AdapterCapacityError("Every slot is taken.")
    appear(tmp_path / "watched", "law", ONE)
    assert watched.look(5) == [] and caplog.text.count("Every slot is taken") == 1
    watched.server.engine.load_error = None
    assert watched.look(2) == []
    watched.declared._tries = Tries()  # as after RETRY_SECONDS
    assert watched.look() == ["law"]


CONFIG = """
vLLMLoRAConfig:
  name: ours
  host: localhost
  port: 8000
  defaultBaseModel: llama
  ensureExist:
    models:
    - {{id: law, source: {law}}}
    - {{id: team/tax, source: llama-all7-r4k2t2/adapter, base-model: llama}}
    - {{id: both, source: x}}
  ensureNotExist:
    models:
    - {{id: old, source: anything}}
    - {{id: both, source: x}}
"""


def test_a_declared_state_is_kept(told: Kept, tmp_path: Path) -> None:
    file = tmp_path / "adapters.yaml"
    file.write_text(CONFIG.format(law=ONE))
    told.server.post("/v1/adapters", {"name": "old", "path": str(ONE)})
    told.server.post("/v1/adapters", {"name": "other", "path": str(ONE)})
    assert told.look(first=True) == ["law", "other", "team/tax"]
    generation = told.adapters.get("law").key.generation
    told.server.client.delete(f"{told.server.url}/v1/adapters/team/tax")
    assert told.look() == ["law", "other", "team/tax"]
    assert told.adapters.get("law").key.generation == generation
    file.write_text(CONFIG.format(law=TWO))
    old = told.digest("law")
    told.look()
    assert told.digest("law") != old
    file.write_text("vLLMLoRAConfig: {}")
    assert told.look() == ["law", "other", "team/tax"]  # as with the syncer: what is not named is left


def test_a_broken_file_changes_nothing(told: Kept, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "adapters.yaml"
    file.write_text(CONFIG.format(law=ONE))
    told.look(first=True)
    for text in ("{", "[]", "a: b", "vLLMLoRAConfig: {ensureExist: {models: [{id: 1}]}}", "vLLMLoRAConfig: 7"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="no vLLMLoRAConfig"):
            read_declaration(file)
    file.write_text("vLLMLoRAConfig: {ensureExist: {models: [{id: a b, source: x}]}}")
    with pytest.raises(ConfigError, match="cannot be a name"):
        read_declaration(file)
    assert told.look(3) == ["law", "team/tax"]
    file.unlink()
    assert told.look() == ["law", "team/tax"]
    assert caplog.text.count("goes on to hold") == 2


def test_what_could_not_be_unloaded_is_tried_again(
    watched: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    appear(tmp_path / "watched", "law", ONE)
    assert watched.look(first=True) == ["law"]
    shutil.rmtree(tmp_path / "watched" / "law")

    async def down(name: str) -> None:
        raise EngineDeadError("The engine is restarting.")

    with monkeypatch.context() as patch:
        patch.setattr(watched.adapters, "unload", down)
        assert watched.look(2) == ["law"]
    assert watched.look() == []
