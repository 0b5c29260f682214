"""Bases that are named as on the Hugging Face Hub: found in its cache, and downloaded where the operator allows
that."""

import os
import re
from pathlib import Path

from tucka_runtime.errors import ConfigError

FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What serving reads of a repository: never its code, nor pickled weights."""

_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.-]+))?", re.ASCII)


def hub_folder(model: str, download: bool) -> tuple[Path, str] | None:
    """The folder of a model `org/name` or `org/name@revision`, and `org/name`; None for any other, and for a folder of
    that path. Raises ConfigError where it is not there."""
    found = _REPOSITORY.fullmatch(model)
    if found is None or os.path.exists(found[0]):
        return None
    return _folder(found[1], found[2], download), found[1]


def _folder(repository: str, revision: str | None, download: bool) -> Path:
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=list(FILES)))
    except LocalEntryNotFoundError:
        pass
    if not download or is_offline_mode():
        why = "HF_HUB_OFFLINE is set" if download else "only tucka serve --download would fetch it"
        raise ConfigError(
            f"--model {repository} is no folder here and not in the Hugging Face cache, and {why}. Give the folder "
            "of a model, or fetch it first: hf download."
        )
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # the hub's, the network's and the disk's, in one line
        raise ConfigError(f"--model {repository} could not be downloaded: {type(error).__name__}: {error}") from None
