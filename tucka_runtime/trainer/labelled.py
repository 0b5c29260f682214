"""Labelled texts: records that say which class a text is of, as token examples."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tucka_runtime.tokenizer import Tokenizer
from tucka_runtime.trainer.chat_records import check_whole
from tucka_runtime.trainer.data import check_length, encode_all
from tucka_runtime.trainer.records import DataFile, normalise


@dataclass(frozen=True)
class Labelled:
    """A text's ids, as the tokenizer gives them, and its label."""

    ids: tuple[int, ...]
    label: str
    task: str

    @property
    def key(self) -> tuple[int, ...]:
        return self.ids

    @property
    def tokens(self) -> int:
        return len(self.ids)


def encode_labelled(record: Any, tokenizer: Tokenizer, max_length: int) -> tuple[list[Labelled], frozenset[str]]:
    """The record's text with its label, and the keys that nothing was made of. Raises ValueError with the reason."""
    if not isinstance(record, dict):
        raise ValueError("a record must be a JSON object")
    rest = {key: value for key, value in record.items() if value is not None}
    label = rest.pop("label", None)
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    if not isinstance(label, str) or not label:
        raise ValueError("'label' must be a non-empty string or an integer")
    check_whole(label)
    known = normalise({"text": rest.pop("text", ""), "task": rest.pop("task", "all")})
    ids = tokenizer.encode_whole(known.text)
    if not ids:
        raise ValueError("the text has no tokens")
    check_length(ids, max_length)
    return [Labelled(tuple(ids), label, known.task)], frozenset(rest)


def load(
    file: DataFile,
    tokenizer: Tokenizer,
    max_length: int,
    strict: bool = False,
    tell: Callable[[str], None] | None = None,
) -> list[Labelled]:
    """Labelled texts of a file, as `data.load` has its examples."""
    return encode_all(file, lambda record: encode_labelled(record, tokenizer, max_length), strict, tell)


def labels_of(texts: Iterable[Labelled]) -> tuple[str, ...]:
    """The labels in the order of the head's outputs: numbers by size, else names by the alphabet."""
    found = {text.label for text in texts}
    by_size = all(label.isdecimal() for label in found)
    return tuple(sorted(found, key=lambda label: (int(label) if by_size else 0, label)))
