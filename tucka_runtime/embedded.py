"""What `tucka serve` serves when no model is named: the small base and adapters that come with the package."""

from dataclasses import replace
from pathlib import Path

from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.errors import ConfigError

FOLDER = Path(__file__).parent / "default"
EXAMPLE = ("formats", "2024-03-05")
"""An embedded adapter, and a prompt whose answer (`5 March 2024`) shows that it is at work."""


def with_embedded_default(engine: EngineConfig, server: ServerConfig) -> tuple[EngineConfig, ServerConfig]:
    """The configs unchanged if they name a model; an --adapter takes the place of the embedded one of its name. Raises
    ConfigError if no model is named and none is embedded."""
    if engine.model is not None:
        return engine, server
    base = FOLDER / "base"
    if not (base / "config.json").is_file():
        raise ConfigError("This installation has no embedded model. Name one: tucka serve --model DIR.")
    given = {adapter.partition("=")[0] for adapter in server.adapter}
    folders = sorted(folder for folder in (FOLDER / "adapters").glob("*") if folder.is_dir())
    embedded = tuple(f"{folder.name}={folder}" for folder in folders if folder.name not in given)
    # Its own folder is a root, so that what was unloaded can come back: by its name, which is its path there.
    roots = (*server.adapter_root, str(FOLDER / "adapters"))
    return replace(engine, model=str(base)), replace(server, adapter=embedded + server.adapter, adapter_root=roots)
