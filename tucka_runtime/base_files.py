"""The small JSON files of a base model's folder, and what they say of where a text ends."""

import codecs
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tucka_runtime.errors import ModelLoadError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, which may begin with a byte order mark.

    Raises ModelLoadError for anything but an object, OSError where the file cannot be read.
    """
    try:
        value = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} cannot be read: it holds no JSON object.")
    return value


@contextmanager
def without_marks(folder: Path) -> Iterator[Path]:
    """The folder for transformers, which takes no byte order marks: itself, or while a JSON file of it begins with one,
    a temporary folder with the same files."""
    marked = []
    for path in folder.glob("*.json"):
        with path.open("rb") as file:
            if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
                marked.append(path)
    if not marked:
        yield folder
        return
    with TemporaryDirectory() as made:
        for path in folder.iterdir():
            if path in marked:
                (Path(made) / path.name).write_bytes(path.read_bytes()[len(codecs.BOM_UTF8) :])
            else:
                (Path(made) / path.name).symlink_to(path.resolve())
        yield Path(made)


def end_tokens(folder: Path, own: int | None) -> tuple[int, ...]:
    """The tokens that end a text, for the server and the trainer alike: the tokenizer's `own` and those of
    generation_config.json and config.json, in that order, each once. The first is the one that training teaches.

    Fine-tunes often change one of the three and leave the others as they were, so all of them are ends. Some files name
    ids beyond the vocabulary, or -1 for none: those are left out. Raises ModelLoadError.
    """
    config = read_json(folder / "config.json")
    generation: dict[str, Any] = {}
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")
    found = [own, *_ids(generation, "generation_config.json"), *_ids(config, "config.json")]
    vocab = config.get("vocab_size")
    known = [i for i in found if i is not None and i >= 0 and not (isinstance(vocab, int) and i >= vocab)]
    return tuple(dict.fromkeys(known))


def _ids(config: dict[str, Any], file: str) -> list[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise ModelLoadError(f"{file}: `eos_token_id` must be a token id or a list of them.")
    return ids
