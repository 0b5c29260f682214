"""Adapters in the body of a request: as files, as archives, and what is refused of them."""

import gzip
import socket
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.chaos.archives import made
from tests.support import GOLDEN
from tests.support.servers import Server
from tucka_runtime.adapters import registry
from tucka_runtime.cli.main import main
from tucka_runtime.server.service import sources

ONE = GOLDEN / "llama-qv-r8k3t3" / "adapter"
TWO = GOLDEN / "llama-all7-r4k2t2" / "adapter"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def parts(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (name, (folder / name).read_bytes())) for name in FILES]


def tar(folder: Path) -> bytes:
    return made([(name, (folder / name).read_bytes()) for name in FILES], tarfile.PAX_FORMAT)


def put(server: Server, name: str, query: str = "", **body: object) -> httpx.Response:
    return server.client.put(f"{server.url}/v1/adapters/{name}{query}", **body)  # type: ignore[arg-type]


def refusal(
    answer: httpx.Response, code: str | None = "invalid_adapter", status: int = 400, param: str | None = None
) -> str:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), answer.text
    return error["message"]


def text(server: Server, model: str) -> str:
    body = {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0, "route": "request"}
    return server.post("/v1/completions", body).raise_for_status().json()["choices"][0]["text"]


def test_uploaded_replaced_and_served(live: Server) -> None:
    """The real engine: what came as files is what the same adapter loaded from its folder is."""
    answer = put(live, "team/up", files=parts(ONE))
    assert answer.status_code == 201 and answer.json() == live.get("/v1/models/team/up").json()
    assert text(live, "team/up") == text(live, "one")
    assert put(live, "team/up", content=tar(ONE)).status_code == 200
    assert "load_inplace" in refusal(put(live, "team/up", content=tar(TWO)), "adapter_exists", 409, "name")
    assert put(live, "team/up", "?load_inplace=true", content=gzip.compress(tar(TWO))).status_code == 201
    assert text(live, "team/up") == text(live, "two")
    assert live.client.delete(f"{live.url}/v1/adapters/team/up").status_code == 200


def test_curl_and_the_command(live: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """curl -T sends a pipe in chunks, without a length or a type; larger bodies of it wait for 100 Continue."""
    url = f"{live.url}/v1/adapters/up"
    said = subprocess.run(f"tar -C {ONE} -cz . | curl -sT - {url}", shell=True, capture_output=True, text=True).stdout
    assert '"id":"up"' in said.replace(" ", "")
    form = [f"-Ffile=@{ONE / name}" for name in FILES]
    code = ["-s", "-o", "/dev/null", "-w", "%{http_code}"]
    assert subprocess.run(["curl", *code, "-X", "PUT", *form, url], capture_output=True, text=True).stdout == "200"
    assert main(["adapters", "upload", "up", str(TWO), "--url", live.url]) == 1
    assert "--replace" in capsys.readouterr().err
    assert main(["adapters", "upload", "up", str(TWO), "--replace", "--url", live.url]) == 0
    assert "up is loaded" in capsys.readouterr().out
    assert main(["adapters", "upload", "up", str(TWO / "nowhere"), "--url", live.url]) == 1
    assert main(["adapters", "unload", "up", "--url", live.url]) == 0


@pytest.fixture
def server(start_fake: Callable[..., Server]) -> Server:
    return start_fake(adapter_root=(), max_body_bytes=1000)


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "state0" / "blobs").glob(f"{registry.TEMPORARY}*"))


def test_no_root_is_needed_and_nothing_is_left(server: Server, tmp_path: Path) -> None:
    assert put(server, "a", files=parts(ONE)).status_code == 201
    assert put(server, "b", content=tar(TWO)).status_code == 201
    assert not leftovers(tmp_path)
    assert server.post("/load_lora_adapter", {"lora_name": "a", "lora_path": "x"}).status_code == 400
    assert {path.name for path in (tmp_path / "state0" / "blobs").iterdir()} == {
        server.get(f"/v1/adapters/{name}").json()["tucka"]["digest"] for name in "ab"
    }


def test_row_52_hostile_archives_over_http(server: Server, tmp_path: Path) -> None:
    link = tarfile.TarInfo("adapter_config.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    for data, why in (
        (link.tobuf() + bytes(1024), "link"),
        (made([("../../adapter_config.json", b"{}")]), "`..`"),
        (gzip.compress(made([("adapter_model.safetensors", bytes(2**27))])), "far more"),
        (b"hello", "neither a .tar"),
        (b"", "neither a .tar"),
        (made([("adapter_config.json", b"{}")]), "no adapter_model.safetensors"),
    ):
        assert why in refusal(put(server, "a", content=data))
    assert not leftovers(tmp_path) and [path.name for path in tmp_path.iterdir()] == ["state0"]
    assert server.get("/v1/adapters").json()["data"] == []


def test_bodies_that_are_refused(server: Server, tmp_path: Path) -> None:
    good = parts(ONE)
    assert "twice" in refusal(put(server, "a", files=[*good, good[0]]), None)
    assert "none of the files" in refusal(put(server, "a", files=[*good, ("file", ("../x", b""))]), None)
    config = ("file", ("adapter_config.json", bytes(2**20 + 1)))
    assert "larger than 1048576" in refusal(put(server, "a", files=[config]), None)
    assert "no adapter_config.json" in refusal(put(server, "a", files=[good[1]]))
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    assert "ends before" in refusal(put(server, "a", content=b"--b\r\n", headers=kind), None)
    assert "told apart" in refusal(put(server, "a", content=b"hello", headers=kind), None)
    assert "boundary" in refusal(put(server, "a", content=b"", headers={"Content-Type": "multipart/form-data"}), None)
    packed = {"Content-Encoding": "gzip"}
    refusal(put(server, "a", content=tar(ONE), headers=packed), "unsupported_media_type", 415)
    refusal(put(server, "base", content=tar(ONE)), "adapter_exists", 409, "name")
    refusal(put(server, "a%20b", content=tar(ONE)), None, param="name")
    refusal(put(server, "a", "?load_inplace=yes", content=tar(ONE)), None, param="load_inplace")
    answer = put(server, "a", "?colour=red", content=tar(ONE))
    assert answer.status_code == 201 and answer.headers["x-tucka-ignored"] == "colour"
    assert not leftovers(tmp_path)


def test_too_large_and_too_many(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A refused client that goes on sending gets its answer, not a reset."""
    monkeypatch.setattr(sources, "MAX_ARCHIVE_BYTES", 2**20)
    assert "1048576 bytes" in refusal(put(server, "a", content=bytes(2**25)), "request_too_large", 413)
    monkeypatch.setattr(sources, "MAX_UPLOADS", 0)
    refusal(put(server, "a", content=tar(ONE)), "overloaded", 429)
    assert not leftovers(tmp_path)


def test_a_client_that_leaves(server: Server, tmp_path: Path) -> None:
    """What it had sent is gone, and nothing is loaded."""
    with socket.create_connection(server.address) as connection:
        connection.sendall(b"PUT /v1/adapters/a HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n" + bytes(5000))
        while not leftovers(tmp_path):
            server.get("/health")
    while leftovers(tmp_path):
        server.get("/health")
    assert server.get("/v1/adapters").json()["data"] == []


def test_a_full_disk(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources.MultipartFiles, "feed", full)
    assert "No space left" in refusal(put(server, "a", files=parts(ONE)), "storage_unavailable", 503)
