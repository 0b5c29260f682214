"""Preference pairs: records that say which of two answers to a prompt is the better one, as pairs of token examples.

Both answers are what the server would be asked for and say: each is encoded as a record of its own, by the same rule
for prompts and ends as any other (`data`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tucka_runtime.tokenizer import Tokenizer
from tucka_runtime.trainer.data import Example, encode_all, encode_turns
from tucka_runtime.trainer.records import DataFile, TrainingRecord, normalise


@dataclass(frozen=True)
class Pair:
    """Two answers to the same prompt."""

    chosen: Example
    rejected: Example

    @property
    def task(self) -> str:
        return self.chosen.task

    @property
    def key(self) -> tuple[int, ...]:
        return self.chosen.key

    @property
    def tokens(self) -> int:
        return self.chosen.tokens + self.rejected.tokens


def normalise_pair(record: Any) -> tuple[TrainingRecord, TrainingRecord]:
    """The record's two answers, each as the last turn of a record of its own. Raises ValueError with the reason."""
    if not isinstance(record, dict):
        raise ValueError("a record must be a JSON object")
    rest = {key: value for key, value in record.items() if value is not None}
    answers = [rest.pop(name, None) for name in ("chosen", "rejected")]
    prompt = rest.pop("prompt", None)
    if all(isinstance(answer, str) and answer for answer in answers):
        if not isinstance(prompt, str):
            raise ValueError("'prompt' must be a non-empty string, as 'chosen' and 'rejected' are")
        asked = {key: value for key, value in rest.items() if key not in ("messages", "conversations", "instruction")}
        first, second = (normalise(asked | {"prompt": prompt, "completion": answer}) for answer in answers)
        return first, second
    if not all(isinstance(answer, list) and answer for answer in answers):
        raise ValueError("'chosen' and 'rejected' must be two non-empty strings, or two lists of messages")
    before = prompt if isinstance(prompt, list) else []
    if prompt is not None and not before and any(len(answer) == 1 for answer in answers):
        raise ValueError("'prompt' must be a list of messages, as 'chosen' and 'rejected' are")
    talks = [[*before, *answer] for answer in answers]
    if talks[0][:-1] != talks[1][:-1]:
        raise ValueError("'chosen' and 'rejected' must be the same but for the last message: that is what is preferred")
    rest.pop("conversations", None)
    first, second = (normalise(rest | {"messages": [*map(_unlearnt, talk[:-1]), talk[-1]]}) for talk in talks)
    return first, second


def encode_pair(record: Any, tokenizer: Tokenizer, max_length: int) -> tuple[list[Pair], frozenset[str]]:
    """The record's pair, and the keys that nothing was made of. Raises as `data.encode` does."""
    first, second = normalise_pair(record)
    chosen, rejected = (encode_turns(answer, tokenizer, max_length, "last")[-1] for answer in (first, second))
    if chosen.ids == rejected.ids:
        raise ValueError("'chosen' and 'rejected' are the same, so that neither is preferred")
    return [Pair(chosen, rejected)], first.ignored | second.ignored


def load(
    file: DataFile,
    tokenizer: Tokenizer,
    max_length: int,
    strict: bool = False,
    tell: Callable[[str], None] | None = None,
) -> list[Pair]:
    """Pairs of a file, as `data.load` has its examples."""
    return encode_all(file, lambda record: encode_pair(record, tokenizer, max_length), strict, tell)


def _unlearnt(message: Any) -> Any:
    return message | {"weight": 0} if isinstance(message, dict) else message
