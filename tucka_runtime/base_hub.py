"""Bases that are named as on the Hugging Face Hub: found in its cache, and downloaded where the operator allows
that."""

import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path

from tucka_runtime.errors import ConfigError

FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What serving reads of a repository: never its code, nor pickled weights."""

_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.-]+))?", re.ASCII)


def names_repository(model: str) -> bool:
    """Whether a model is named as on the Hub, and is nothing that lies at that path here."""
    found = _REPOSITORY.fullmatch(model)
    return found is not None and not os.path.exists(found[0])


def hub_folder(model: str, download: bool) -> tuple[Path, str] | None:
    """The folder of a model `org/name` or `org/name@revision`, and `org/name`; None for any other, for what no
    repository may be called, and for a folder of that path. Raises ConfigError where it is not there."""
    if not names_repository(model):
        return None
    repository, _, revision = model.partition("@")
    from huggingface_hub.errors import HFValidationError

    try:
        return _folder(repository, revision or None, download), repository
    except HFValidationError:
        return None


def _folder(repository: str, revision: str | None, download: bool) -> Path:
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    cached: Path | None = None
    fetched = partial(snapshot_download, repository, allow_patterns=list(FILES))
    with suppress(LocalEntryNotFoundError):
        cached = Path(fetched(revision=revision, local_files_only=True))
    if not download or is_offline_mode():
        if cached is not None:
            return cached
        why = "HF_HUB_OFFLINE is set" if download else "only tucka serve --download would fetch it"
        raise ConfigError(
            f"--model {repository} is no folder here and not in the Hugging Face cache, and {why}. Give the folder "
            "of a model, or fetch it first: hf download."
        )
    try:
        # What the cache has some files of gets the others, and is not replaced by what a branch has come to mean.
        return Path(fetched(revision=cached.name if cached else revision))
    except Exception as error:  # the hub's, the network's and the disk's, in one line
        raise ConfigError(f"--model {repository} could not be downloaded: {type(error).__name__}: {error}") from None
