"""Records as questions: what is asked, and the text that is expected as the answer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tucka_runtime.conversations import CLOSE, Message
from tucka_runtime.trainer.records import DataError, TrainingRecord, normalise, read


@dataclass(frozen=True)
class Question:
    """A record, where it stands, and what its last turn that is learnt says, without its thought."""

    where: str
    record: TrainingRecord
    expected: str

    @property
    def task(self) -> str:
        return self.record.task

    @property
    def asked(self) -> str | list[Message]:
        """The prompt, or the messages before the turn."""
        if not self.record.messages:
            return self.record.prompt
        last = max(i for i, learnt in enumerate(self.record.learnt) if learnt)
        return list(self.record.messages[:last])

    def without(self, ends: Sequence[str]) -> "Question":
        """The same, an end token of `ends` that its record spells taken off: it ends an answer, and is no part of its
        text."""
        for end in ends:
            if self.expected.endswith(end):
                return replace(self, expected=self.expected.removesuffix(end).rstrip())
        return self


def questions(path: Path, limit: int | None) -> tuple[list[Question], int, str]:
    """The first `limit` questions of a file, how many records before them ask nothing that a text answers (texts
    without a prompt, and turns that call a function), and the file's SHA-256. Raises DataError."""
    file = read(path)
    found: list[Question] = []
    left_out = 0
    for where, line in file.rows:
        try:
            record = normalise(json.loads(line) if isinstance(line, str) else line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file.name}, {where}: {error}") from error
        answer: Any = {"content": record.completion}
        if record.messages:
            answer = [m for m, learnt in zip(record.messages, record.learnt, strict=True) if learnt][-1]
        if record.text or "tool_calls" in answer:
            left_out += 1
            continue
        found.append(Question(f"{file.name}, {where}", record, final(answer["content"])))
        if limit and len(found) == limit:
            break
    if not found:
        raise DataError(f"{path} asks nothing that a text answers: prompt/completion records or chats are expected.")
    return found, left_out, file.sha256


def final(text: str) -> str:
    """What is compared: a text without the thought before it and the blanks around it."""
    return text.rpartition(CLOSE)[2].strip()
