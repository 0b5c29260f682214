"""What can be told of a server's settings at first sight, before the engine takes seconds to find it out."""

import os
from pathlib import Path

from tucka_runtime.adapters.remote import Source
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.errors import ConfigError, InvalidRequestError
from tucka_runtime.names import check_name
from tucka_runtime.server.http.key_file import read_key_file
from tucka_runtime.server.service.declared import read_declaration


def check_settings(engine_config: EngineConfig, config: ServerConfig) -> None:
    """Raises ConfigError for what is wrong."""
    folder = Path(engine_config.model or "")
    if not os.path.isdir(folder):
        raise ConfigError(
            f"--model {folder} is no folder that can be read here. Give the folder of a Hugging Face model, its name "
            "there (org/name), or a GGUF file."
        )
    if not os.path.isfile(folder / "config.json"):
        raise ConfigError(f"--model {folder} has no config.json: give the folder of a Hugging Face model.")
    for file in (folder / "config.json", *folder.glob("*.safetensors")):
        if not os.access(file, os.R_OK):
            raise ConfigError(f"--model: {file} cannot be read by this user: chmod -R a+rX {folder} lets everybody.")
    for name in config.served_model_name:
        try:
            check_name(name)
        except InvalidRequestError as error:
            raise ConfigError(f"--served-model-name follows the rule of adapters' names: {error.message}") from None
    for root in config.adapter_root:
        if not os.path.isdir(root):
            raise ConfigError(f"--adapter-root {root} is no folder that can be read here.")
    if config.api_key_file is not None:
        read_key_file(config.api_key_file)
    if config.adapter_watch is not None and not os.path.isdir(config.adapter_watch):
        raise ConfigError(f"--adapter-watch {config.adapter_watch} is no folder that can be read here.")
    if config.adapters_file is not None:
        read_declaration(Path(config.adapters_file))
    first_adapters(config)
    named_sources(config)


def first_adapters(config: ServerConfig) -> dict[str, Path]:
    """The names and folders of --adapter. Raises ConfigError."""
    adapters: dict[str, Path] = {}
    for adapter in config.adapter:
        name, _, path = adapter.partition("=")
        if not name or not path:
            raise ConfigError("--adapter takes NAME=PATH: the name for requests and the adapter's folder.")
        if not os.path.isdir(path):
            raise ConfigError(f"--adapter {name}: {path} is no folder that can be read here.")
        if name in adapters:
            raise ConfigError(f"--adapter {name} is given twice: every adapter needs a name of its own.")
        adapters[name] = Path(path).resolve()
    if unknown := set(config.adapter_resident) - adapters.keys():
        raise ConfigError(f"--adapter-resident {min(unknown)}: there is no --adapter of that name.")
    return adapters


def named_sources(config: ServerConfig) -> list[Source]:
    """Those of --adapter-source. Raises ConfigError."""
    sources = [Source.parse(text) for text in config.adapter_source]
    names = {source.name for source in sources}
    if len(names) < len(sources):
        raise ConfigError("--adapter-source has a name twice: every source needs one of its own.")
    if unknown := set(config.adapter_resolve) - names:
        raise ConfigError(f"--adapter-resolve {min(unknown)}: there is no --adapter-source of that name.")
    return sources
