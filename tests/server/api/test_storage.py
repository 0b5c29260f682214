"""The disk under adapters: full, cleaned up, damaged. What was promised is kept, or said to be lost."""

import asyncio
import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import GOLDEN
from tests.support.fake_engine import FakeEngine
from tests.support.servers import Server
from tucka_runtime.adapters.registry import AdapterRegistry
from tucka_runtime.adapters.sources import resolve_source
from tucka_runtime.errors import StorageError
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service import sources as service_sources
from tucka_runtime.server.service.adapters import AdapterNames

ONE = str(GOLDEN / "llama-qv-r8k3t3" / "adapter")
TWO = str(GOLDEN / "llama-all7-r4k2t2" / "adapter")


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Nothing that is written reaches the disk."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


def names(root: Path) -> list[str]:
    """What a server that is started on this state folder brings up."""

    async def restored() -> list[str]:
        with AdapterRegistry(root) as registry:
            brought = AdapterNames(FakeEngine(), registry, "base", Metrics())  # type: ignore[arg-type]
            await brought.restore("fake")
            return [adapter.key.name for adapter in brought.all()]

    return asyncio.run(restored())


def copy_of(server: Server, name: str) -> Path:
    """The folder that the engine loaded the adapter from."""
    assert server.engine is not None
    return next(folder for key, folder in server.engine.loaded.items() if key.name == name)


def restart_engine(server: Server) -> None:
    assert server.engine is not None and server.loop is not None
    server.engine.loaded.clear()
    asyncio.run_coroutine_threadsafe(server.engine.on_restart(), server.loop).result(30)


@pytest.fixture
def server(start_fake) -> Server:
    server: Server = start_fake()
    server.post("/v1/adapters", {"name": "a", "path": ONE}).raise_for_status()
    return server


def test_row_49_a_full_disk_changes_nothing(server: Server, tmp_path: Path) -> None:
    with full_disk():
        for _ in range(2):
            answer = server.client.delete(f"{server.url}/v1/adapters/a")
            assert answer.status_code == 503 and answer.headers["retry-after"]
            error = answer.json()["error"]
            assert error["code"] == "storage_unavailable" and "No space left" in error["message"]
            assert str(tmp_path) not in answer.text
        assert server.post("/v1/adapters", {"name": "a", "path": ONE}).status_code == 200
        for body in ({"name": "b", "path": TWO}, {"name": "a", "path": TWO, "load_inplace": True}):
            assert server.post("/v1/adapters", body).json()["error"]["code"] == "storage_unavailable"
        ask = {"model": "a", "prompt": "hi"}
        assert server.post("/v1/completions", ask).status_code == 200 and server.get("/ready").status_code == 200
    assert server.client.delete(f"{server.url}/v1/adapters/a").status_code == 200
    assert server.client.delete(f"{server.url}/v1/adapters/a").status_code == 404
    shutil.copytree(tmp_path / "state0", tmp_path / "after")
    assert names(tmp_path / "after") == []


def test_row_49_a_server_starts_on_a_full_disk(server: Server, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "state0", tmp_path / "after")
    with full_disk():
        assert names(tmp_path / "after") == ["a"]


def test_a_restart_is_no_new_generation(server: Server, tmp_path: Path) -> None:
    server.post("/v1/adapters", {"name": "b", "path": TWO}).raise_for_status()
    shutil.copytree(tmp_path / "state0", tmp_path / "after")

    async def generations() -> list[int]:
        with AdapterRegistry(tmp_path / "after") as registry:
            brought = AdapterNames(FakeEngine(), registry, "base", Metrics())  # type: ignore[arg-type]
            brought._engine.ready = True
            await brought.restore("fake")
            await brought.load("c", Path(ONE))
            return [adapter.key.generation for adapter in brought.all()]

    assert asyncio.run(generations()) == [1, 2, 3]


@pytest.mark.parametrize("what", ["the root", "the copy", "a file of it"])
def test_row_49_what_a_cleaner_took_is_copied_again(server: Server, tmp_path: Path, what: str) -> None:
    folder = copy_of(server, "a")
    gone = {"the root": tmp_path / "state0", "the copy": folder, "a file of it": folder / "adapter_model.safetensors"}
    shutil.rmtree(gone[what]) if gone[what].is_dir() else gone[what].unlink()
    restart_engine(server)
    assert server.get("/ready").status_code == 200
    assert server.post("/v1/completions", {"model": "a", "prompt": "hi"}).status_code == 200
    assert copy_of(server, "a") == folder and (folder / "adapter_model.safetensors").is_file()
    shutil.copytree(tmp_path / "state0", tmp_path / "after")
    assert names(tmp_path / "after") == ["a"]


@pytest.mark.parametrize("way_out", ["load", "other content", "unload", "engine"])
def test_row_49_what_is_lost_is_said(start_fake, tmp_path: Path, way_out: str) -> None:
    (tmp_path / "root").mkdir()
    source = tmp_path / "root" / "source"
    shutil.copytree(ONE, source)
    server: Server = start_fake(adapter_root=(str(GOLDEN), str(tmp_path / "root")))
    server.post("/v1/adapters", {"name": "a", "path": str(source)}).raise_for_status()
    source.rename(tmp_path / "root" / "elsewhere")
    shutil.rmtree(copy_of(server, "a"))
    restart_engine(server)
    answer = server.get("/ready")
    assert (answer.status_code, answer.json()) == (503, {"status": "adapters lost", "lost": 1})
    assert "tucka_adapters_lost 1" in server.get("/metrics").text
    answer = server.post("/v1/completions", {"model": "a", "prompt": "hi"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
    assert server.post("/v1/completions", {"model": "base", "prompt": "hi"}).status_code == 200
    match way_out:
        case "load":
            body = {"name": "a", "path": str(tmp_path / "root" / "elsewhere")}
            assert server.post("/v1/adapters", body).status_code == 201
        case "other content":
            assert server.post("/v1/adapters", {"name": "a", "path": TWO}).status_code == 201
        case "unload":
            assert server.client.delete(f"{server.url}/v1/adapters/a").status_code == 200
            assert server.client.delete(f"{server.url}/v1/adapters/a").status_code == 404
        case "engine":  # the folder is mounted again
            (tmp_path / "root" / "elsewhere").rename(source)
            restart_engine(server)
    assert server.get("/ready").status_code == 200
    assert "tucka_adapters_lost 0" in server.get("/metrics").text
    kept = server.post("/v1/completions", {"model": "a", "prompt": "hi"}).status_code
    assert kept == (404 if way_out == "unload" else 200)


def test_what_a_flag_loaded_is_durable_once_it_is_asked_for(start_fake, tmp_path: Path) -> None:
    server: Server = start_fake()

    async def first() -> None:
        await server_names(server).load("flag", Path(ONE), durable=False)

    assert server.loop is not None
    asyncio.run_coroutine_threadsafe(first(), server.loop).result(30)
    shutil.copytree(tmp_path / "state0", tmp_path / "before")
    assert names(tmp_path / "before") == []
    assert server.post("/v1/adapters", {"name": "flag", "path": ONE}).status_code == 200
    shutil.copytree(tmp_path / "state0", tmp_path / "after")
    assert names(tmp_path / "after") == ["flag"]


def server_names(server: Server) -> AdapterNames:
    """The names of a fake server: whose `reload` its engine calls."""
    assert server.engine is not None
    return server.engine.on_restart.__self__  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("stuck", ["looking for the folder", "copying"])
def test_prompts_never_wait_for_adapters(start_fake, monkeypatch: pytest.MonkeyPatch, stuck: str) -> None:
    """A network mount that hangs holds the loads up, however many there are, and nobody else."""
    server: Server = start_fake()
    go_on = threading.Event()

    def hang(function):
        def call(*arguments):
            assert go_on.wait(30)
            return function(*arguments)

        return call

    if stuck == "copying":
        monkeypatch.setattr(AdapterRegistry, "ingest", hang(AdapterRegistry.ingest))
    else:
        monkeypatch.setattr(service_sources, "resolve_source", hang(resolve_source))
    answers = []

    def load_one(i: int) -> None:
        answers.append(Server(server.url, 0).post("/v1/adapters", {"name": f"n{i}", "path": ONE}))

    loads = [threading.Thread(target=load_one, args=(i,)) for i in range(40)]
    for load in loads:
        load.start()
    try:
        for _ in range(5):
            answer = server.post("/v1/completions", {"model": "base", "prompt": "hi"}, timeout=5)
            assert answer.status_code == 200
        assert not answers
    finally:
        go_on.set()
        for load in loads:
            load.join()
    assert [answer.status_code for answer in answers] == [201] * 40


def test_what_is_told_of_a_name_is_what_it_stands_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new content was in its slot when its entry could not be saved."""

    async def full(*_: object) -> None:
        raise StorageError("No space left on device.")

    def told() -> list[str]:
        lines = server.get("/metrics").text.splitlines()
        return [line for line in lines if line.startswith(("tucka_adapter_info{", "tucka_adapter_resident_bytes{"))]

    assert server.service is not None and (before := told())
    monkeypatch.setattr(server.service.adapters._copies, "save", full)
    body = {"name": "a", "path": TWO, "load_inplace": True}
    assert server.post("/v1/adapters", body).json()["error"]["code"] == "storage_unavailable"
    assert told() == before
