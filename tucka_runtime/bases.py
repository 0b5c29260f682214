"""Where the files of a base are: in a folder, in the Hugging Face Hub's cache, or made of a GGUF file."""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from tucka_runtime.base_gguf import gguf_folder, model_name
from tucka_runtime.base_hub import hub_folder
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.embedded import FOLDER
from tucka_runtime.errors import ConfigError

log = logging.getLogger("tucka_runtime.bases")


def find_base(
    model: str | Path | None,
    dtype: str = "auto",
    *,
    download: bool = False,
    state_dir: str | None = None,
    say: Callable[[str], None],
) -> tuple[Path, str | None]:
    """The folder of a base, and what requests call it where that is not the folder's name.

    `model`: a folder, a GGUF file, which is dequantised to `dtype`, `org/name` or `org/name@revision` as on the Hub, or
    None for the embedded one; where it is none of these it is taken for a folder, whose reader says what it lacks. What
    is made of a GGUF file is kept below `state_dir`, or in the user's cache. Raises ConfigError.
    """
    if model is None:
        return FOLDER / "base", None
    path = Path(model)
    if os.path.isfile(path):
        return gguf_folder(path, dtype, _kept(state_dir), say), model_name(path)
    if path.suffix == ".gguf" and not os.path.isdir(path):
        raise ConfigError(f"The base {path} is no file that can be read here.")
    files = sorted(path.glob("*.gguf"))
    if files and not os.path.isfile(path / "config.json"):
        raise ConfigError(f"The base {path} is a folder of GGUF files. Name the file: {files[0]}")
    return hub_folder(str(model), download) or (path, None)


def with_base(engine: EngineConfig, server: ServerConfig) -> tuple[EngineConfig, ServerConfig]:
    """The configs with the folder of the base that they name. Raises ConfigError where it is not there."""
    if engine.model is None:
        return engine, server
    folder, name = find_base(
        engine.model, engine.dtype, download=server.download, state_dir=server.state_dir, say=log.info
    )
    names = server.served_model_name or ((name,) if name else ())
    return replace(engine, model=str(folder)), replace(server, served_model_name=names)


def command_base(model: str | Path | None, dtype: str = "auto") -> Path:
    """The folder of the base that a command names, which says on stderr what is done. Raises ConfigError."""
    folder, _ = find_base(model, dtype, say=partial(print, file=sys.stderr))
    return folder


def _kept(state_dir: str | None) -> Path:
    if state_dir is not None:
        return Path(state_dir) / "bases"
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "tucka" / "bases"
