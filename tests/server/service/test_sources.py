"""Named sources over real sockets: HTTPS with a certificate of the test's own, an object store, a hub's cache, a
folder; and models that are looked up in them."""

import base64
import hashlib
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import trustme

from tests.support import GOLDEN
from tests.support.file_host import FileHost, file_host
from tests.support.servers import Server
from tucka_runtime.adapters import remote
from tucka_runtime.adapters.readers import HubReader, StoreReader, token_variable
from tucka_runtime.adapters.remote import ChangedError, NoSuchAdapterError, Source, fetch
from tucka_runtime.errors import AdapterConflictError, ConfigError, InvalidAdapterError, SourceError
from tucka_runtime.server.service import resolver

ONE = GOLDEN / "llama-qv-r8k3t3" / "adapter"
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileHost]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    with file_host(authority) as host:
        host.files = {f"/ad/law/{name}": (ONE / name).read_bytes() for name in FILES}
        yield host


@pytest.fixture
def server(start_fake: Callable[..., Server], host: FileHost) -> Server:
    """A server that may load from the host below /ad, and looks models up there."""
    source = f"hub=https://{host.address}/ad"
    return start_fake(adapter_root=(), adapter_source=(source,), adapter_resolve=("hub",))


def load(server: Server, path: str, status: int, code: str | None = None) -> str:
    answer = server.post("/v1/adapters", {"name": "a", "path": path})
    assert answer.status_code == status, answer.text
    if code is not None:
        assert answer.json()["error"]["code"] == code
    return answer.text


def complete(server: Server, model: str) -> int:
    return server.post("/v1/completions", {"model": model, "prompt": "hi", "max_tokens": 1}).status_code


def test_fetched_over_https_by_digest(server: Server, host: FileHost, tmp_path: Path) -> None:
    load(server, "hub:law", 201)
    digest = server.get("/v1/adapters/a").json()["tucka"]["digest"]
    kept = tmp_path / "state0" / "blobs" / digest
    assert all((kept / name).read_bytes() == (ONE / name).read_bytes() for name in FILES)
    assert [path.name for path in kept.parent.iterdir()] == [digest]
    assert "no such adapter" in load(server, "hub:tax", 400, "invalid_adapter")
    del host.files["/ad/law/adapter_model.safetensors"]
    assert "no adapter_model.safetensors" in load(server, "hub:law", 400, "invalid_adapter")


def test_defaults_are_fetched_where_they_count(
    server: Server, start_fake: Callable[..., Server], host: FileHost
) -> None:
    host.files["/ad/law/generation_config.json"] = b'{"top_k": 3}'
    load(server, "hub:law", 201)
    assert not any(path.endswith("generation_config.json") for _, path in host.asked)
    source = f"hub=https://{host.address}/ad"
    allowed = start_fake(adapter_root=(), adapter_source=(source,), adapter_defaults=True)
    load(allowed, "hub:law", 201)
    assert allowed.get("/v1/adapters/a").json()["tucka"]["defaults"] == ["top_k"]
    host.files["/ad/law/chat_template.jinja"] = b"x" * (2**18 + 1)
    answer = allowed.post("/v1/adapters", {"name": "b", "path": "hub:law"})
    assert answer.status_code == 400 and "chat_template.jinja is larger than" in answer.text


def test_a_broken_connection_goes_on_where_it_was(server: Server, host: FileHost) -> None:
    host.cut = 1000
    load(server, "hub:law", 201)
    weights = [method for method, path in host.asked if path.endswith("safetensors")]
    assert weights == ["HEAD", "GET", "GET"]


def test_what_arrives_is_held_against_what_the_source_says(server: Server, host: FileHost) -> None:
    host.files = {name: host.files[name] for name in host.files if "config" in name}
    host.files["/ad/law/adapter_model.safetensors"] = b"x" * 100
    digest = base64.b64encode(hashlib.sha256(b"other").digest()).decode()
    host.headers = {"Repr-Digest": f"sha-256=:{digest}:"}
    assert "not what its source has" in load(server, "hub:law", 503, "source_unavailable")
    host.headers = {"Content-Length": str(2**21)}
    assert "larger than 1048576" in load(server, "hub:law", 400, "invalid_adapter")
    assert ("GET", "/ad/law/adapter_config.json") not in host.asked[-1:]


def test_row_28_nothing_but_what_is_named(server: Server, host: FileHost) -> None:
    """A redirect to another host is not followed: not to one of the same machine either."""
    with socket.create_server(("127.0.0.1", 0)) as inside:
        inside.settimeout(0.2)
        host.redirect = f"http://127.0.0.1:{inside.getsockname()[1]}"
        assert "another host" in load(server, "hub:law", 503, "source_unavailable")
        host.redirect = f"https://localhost:{host.server_port}"
        assert "another host" in load(server, "hub:law", 503, "source_unavailable")
        with pytest.raises(TimeoutError):
            inside.accept()
    host.asked.clear()
    for path in (
        "hub:../secret", "hub:a/../../b", "hub:/etc", "hub://evil", "hub:a b", "hub:a?b", "hub:a%2e%2e/b", "hub:-x",
        "hub:.x", "hub:a\\b", "other:law", f"https://{host.address}/ad/law", "HUB:law",
    ):  # fmt: skip
        load(server, path, 400, "invalid_adapter")
    assert not host.asked


def test_tokens_come_from_the_environment_and_stay_there(
    host: FileHost, start_fake: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host.token = "s3cret"
    source = (f"my-hub=https://{host.address}/ad",)
    refused = load(start_fake(adapter_root=(), adapter_source=source), "my-hub:law", 503, "source_unavailable")
    monkeypatch.setenv(token_variable("my-hub"), "s3cret")
    assert token_variable("my-hub") == "TUCKA_SOURCE_TOKEN_MY_HUB"
    server = start_fake(adapter_root=(), adapter_source=source)
    load(server, "my-hub:law", 201)
    host.redirect = "https://localhost"
    assert "s3cret" not in refused + load(server, "my-hub:law", 503) + caplog.text


def test_models_are_looked_up(server: Server, host: FileHost, monkeypatch: pytest.MonkeyPatch) -> None:
    assert complete(server, "law") == 200
    asked = len(host.asked)
    assert complete(server, "law") == 200 and len(host.asked) == asked
    assert [complete(server, "tax") for _ in range(3)] == [404] * 3
    assert host.asked[asked:] == [("HEAD", "/ad/tax/adapter_config.json")]
    host.files |= {path.replace("law", "team/tax"): data for path, data in host.files.items()}
    assert complete(server, "team/tax") == 200
    monkeypatch.setattr(resolver, "MAX_LOOKUPS", 0)
    assert complete(server, "other") == 429


def test_a_name_that_somebody_loads_meanwhile_is_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other content: the request is for what the name stands for."""
    names = server.service.adapters  # type: ignore[union-attr]
    on_load = names.load_from

    async def second(*arguments: Any, **options: Any) -> Any:
        await on_load(*arguments, **options)
        raise AdapterConflictError("An adapter of that name with other content is loaded.", "name")

    monkeypatch.setattr(names, "load_from", second)
    assert complete(server, "law") == 200


def test_a_source_that_is_away_is_said(server: Server, host: FileHost) -> None:
    host.redirect = "https://elsewhere.invalid"
    assert [complete(server, "law") for _ in range(3)] == [503] * 3
    assert len(host.asked) == 1 and complete(server, "base") == 200


def test_names_that_cannot_be_folders_stay_here(server: Server, host: FileHost) -> None:
    for name in (
        "a:b",
        "base:law",
        "a@b",
        "a b",
        "../law",
        ".law",
        "-law",
        "a//b",
        "é",
        "x" * 129,
        "law/",
        "\x00",
        "http://a",
    ):
        assert complete(server, name) == 404, name
    assert not host.asked


def test_row_41_unknown_names_that_are_looked_up(
    server: Server, host: FileHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is remembered of them is bounded, and one that is asked for by many at once is looked for once."""
    monkeypatch.setattr(resolver, "MAX_KNOWN", 5)
    for i in range(20):
        assert complete(server, f"n{i}") == 404
    look_ups = server.service.resolver._failed  # type: ignore[union-attr]
    assert list(look_ups) == [f"n{i}" for i in range(15, 20)]
    host.asked.clear()
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(complete(Server(server.url, 0), "law"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200] * 8
    assert len([path for _, path in host.asked if "config" in path]) == 2  # looked for, and fetched


def test_an_object_store(tmp_path: Path) -> None:
    """fsspec's own, in memory: tests/adapters/try_s3.py runs the same against S3's protocol."""
    files = fsspec.filesystem("memory")
    for name in FILES:
        files.pipe(f"/bucket/ad/law/{name}", (ONE / name).read_bytes())
    reader = StoreReader(Source("s", "memory", "bucket/ad"))
    fetch(reader, "law", tmp_path)
    assert all((tmp_path / name).read_bytes() == (ONE / name).read_bytes() for name in FILES)
    with pytest.raises(NoSuchAdapterError):
        fetch(reader, "tax", tmp_path)


def make_hub_cache(folder: Path, repository: str, below: str) -> None:
    """As huggingface_hub lays it out: blobs by their digests, links to them in the snapshot of a commit."""
    root, commit = folder / f"models--{repository.replace('/', '--')}", "c" * 40
    for name in FILES:
        data = (ONE / name).read_bytes()
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        link = root / "snapshots" / commit / below / name
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link.symlink_to(blob)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)


def test_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    make_hub_cache(tmp_path / "hub", "org/law", "v2")
    for number, (location, folder) in enumerate(
        (("", "org/law/v2"), ("org", "law/v2"), ("org/law", "v2"), ("org/law@main", "v2"), ("org/law/v2", ""))
    ):
        target = tmp_path / f"{number}"
        target.mkdir()
        fetch(HubReader(Source("h", "hf", location)), folder, target)
        assert all((target / name).read_bytes() == (ONE / name).read_bytes() for name in FILES)
    with pytest.raises(InvalidAdapterError, match="must name a repository"):
        fetch(HubReader(Source("h", "hf", "")), "law", tmp_path)
    with pytest.raises((NoSuchAdapterError, SourceError)):
        fetch(HubReader(Source("h", "hf", "org")), "tax", tmp_path)
    blob = next((tmp_path / "hub").rglob("blobs/*"))
    blob.write_bytes(blob.read_bytes()[::-1])
    (tmp_path / "damaged").mkdir()
    with pytest.raises(SourceError, match="not what its source has"):
        fetch(HubReader(Source("h", "hf", "org/law")), "v2", tmp_path / "damaged")


def test_the_hub_over_http(start_fake: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub itself, against a stand-in for the Hub: its route of a file, with the headers that it has."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with file_host(None) as host:
        at = f"http://{host.address}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", at)
        route = at + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", route)
        host.headers = {"X-Repo-Commit": "c" * 40, "X-Error-Code": "EntryNotFound"}
        files = {name: (ONE / name).read_bytes() for name in FILES}
        host.files = {f"/org/law/resolve/v2/{name}": data for name, data in files.items()}
        server = start_fake(adapter_root=(), adapter_source=("hub=hf:org",))
        load(server, "hub:law@v2", 201)
        kept = tmp_path / "state0" / "blobs" / server.get("/v1/adapters/a").json()["tucka"]["digest"]
        assert all((kept / name).read_bytes() == data for name, data in files.items())
        assert ("GET", "/org/law/resolve/v2/adapter_model.safetensors") in host.asked
        load(server, "hub:tax@v2", 400, "invalid_adapter")
        host.headers["X-Linked-Size"] = str(2**40)
        assert "larger than" in load(server, "hub:law@v2", 400, "invalid_adapter")
        host.headers = {"X-Repo-Commit": "d" * 40, "X-Linked-Etag": '"' + "0" * 64 + '"'}
        assert "not what its source has" in load(server, "hub:law@v2", 503, "source_unavailable")
    load(server, "hub:law@v4", 503, "source_unavailable")


def test_a_folder(start_fake: Callable[..., Server], tmp_path: Path) -> None:
    shutil.copytree(ONE, tmp_path / "shared" / "law")
    (tmp_path / "shared" / "out").symlink_to(ONE)
    server = start_fake(adapter_root=(), adapter_source=(f"disk=file://{tmp_path}/shared",), adapter_resolve=("disk",))
    load(server, "disk:law", 201)
    load(server, "disk:out", 400, "invalid_adapter")
    assert (complete(server, "law"), complete(server, "out"), complete(server, "tax")) == (200, 404, 404)


def test_a_name_that_is_found_has_its_line_in_the_audit_log(start_fake: Callable[..., Server], tmp_path: Path) -> None:
    shutil.copytree(ONE, tmp_path / "shared" / "law")
    sources = {"adapter_source": (f"disk=file://{tmp_path}/shared",), "adapter_resolve": ("disk",)}
    server = start_fake(adapter_root=(), audit_log=str(tmp_path / "audit"), **sources)
    assert (complete(server, "law"), complete(server, "tax")) == (200, 404)
    (line,) = map(json.loads, (tmp_path / "audit").read_text().splitlines())
    assert line["digest_after"] == server.get("/v1/models/law").json()["tucka"]["digest"]
    assert (line["action"], line["adapter"], line["by"]) == ("load", "law", "--adapter-resolve")


@pytest.mark.parametrize(
    "text", ["law", "law=", "law=/srv", "law=http://a/b", "a b=https://a", "law=https://", "law=https://me:pw@host/a",
             "law=file:/nowhere", "law=ftp://a", "=s3://b", "s3://b"],
)  # fmt: skip
def test_sources_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        Source.parse(text)
    assert "pw" not in error.value.message


def test_a_file_of_the_hub_that_is_another_version_by_now_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with the other readers: what was looked at and what is read are one file, or it is looked at again."""
    files = [tmp_path / name for name in ("a" * 40, "b" * 40)]
    for file in files:
        file.write_bytes(b"{}")
    reader, cached = HubReader(Source.parse("hub=hf:org")), iter(files)
    monkeypatch.setattr(reader, "_cached", lambda path: next(cached))
    seen = reader.look("law/adapter_config.json")
    with pytest.raises(ChangedError):
        list(reader.read("law/adapter_config.json", seen, 0))
