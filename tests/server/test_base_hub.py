"""A base by its name on the Hub, in a cache laid out as huggingface_hub does."""

import hashlib
import json
from pathlib import Path

import pytest

from tests.support import GOLDEN
from tests.support.file_host import file_host
from tucka_runtime.bases import with_base
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.errors import ConfigError
from tucka_runtime.server.settings_check import check_settings

COMMIT = "c" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With one repository. No test reaches the Hub: what would be asked of it fails."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://127.0.0.1:9")
    root = tmp_path / "hub" / "models--org--tiny"
    (root / "snapshots" / COMMIT).mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted((GOLDEN / "bases" / "llama-tiny").iterdir())):
        blob = root / "blobs" / f"{number}"
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(path.read_bytes())
        (root / "snapshots" / COMMIT / path.name).symlink_to(blob)
    return tmp_path / "hub"


@pytest.mark.parametrize("model", ["org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"])
def test_found_in_the_cache(cache: Path, model: str) -> None:
    engine, server = with_base(EngineConfig(model=model), ServerConfig())
    assert engine.model == str(cache / "models--org--tiny" / "snapshots" / COMMIT)
    assert server.served_model_name == ("org/tiny",)
    check_settings(engine, server)
    _, server = with_base(EngineConfig(model=model), ServerConfig(served_model_name=("mine",)))
    assert server.served_model_name == ("mine",)


def test_not_downloaded_unless_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--download"):
        with_base(EngineConfig(model="org/other"), ServerConfig())
    with pytest.raises(ConfigError, match="could not be downloaded"):
        with_base(EngineConfig(model="org/other"), ServerConfig(download=True))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        with_base(EngineConfig(model="org/other"), ServerConfig(download=True))


def test_what_is_missing_of_a_commit_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As somebody leaves it who fetched single files of a repository; against the Hub's two routes that are asked."""
    files = {path.name: path.read_bytes() for path in (GOLDEN / "bases" / "llama-tiny").iterdir()}
    snapshot = cache / "models--org--tiny" / "snapshots" / COMMIT
    (snapshot / "model.safetensors").unlink()
    listed = [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in files.items()
    ]
    with file_host(None) as host:
        at = f"http://{host.address}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", at)
        route = at + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", route)
        host.headers = {"X-Repo-Commit": COMMIT}
        host.files = {f"/org/tiny/resolve/{COMMIT}/{name}": data for name, data in files.items()}
        tree = f"/api/models/org/tiny/tree/{COMMIT}?recursive=true&expand=false"
        host.files[tree] = json.dumps(listed).encode()
        for _ in range(2):
            engine, _ = with_base(EngineConfig(model="org/tiny"), ServerConfig(download=True))
        fetched = [path for verb, path in host.asked if verb == "GET"]
    assert engine.model == str(snapshot)
    assert (snapshot / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert fetched == [tree, f"/org/tiny/resolve/{COMMIT}/model.safetensors"]


def test_a_folder_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    mistyped = ("models/llama--v1", "models/llama..v2", "models/llama-", "org/name.git", "models/" + "a" * 100)
    for model in (None, "org/tiny", str(tmp_path), "./org/other", "a/b/c", "name", *mistyped):
        engine, _ = with_base(EngineConfig(model=model), ServerConfig())
        assert engine.model == (model and str(Path(model)))
