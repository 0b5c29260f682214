"""A base by its name on the Hub, in a cache laid out as huggingface_hub does."""

from pathlib import Path

import pytest

from tests.support import GOLDEN
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


def test_a_folder_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for model in (None, "org/tiny", str(tmp_path), "./org/other", "a/b/c", "name"):
        engine, _ = with_base(EngineConfig(model=model), ServerConfig())
        assert engine.model == (model and str(Path(model)))
