"""What a choice says, apart from any door's format: text, reasoning and calls of functions, in the order of the answer.

A parser makes events of a choice's text while it streams in; a door's `Answer` (server/api/answer.py) writes them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True)
class Text:
    """The next piece of what is said to the user."""

    text: str


@dataclass(slots=True)
class Reasoning:
    """The next piece of what the model thinks before it speaks."""

    text: str


@dataclass(slots=True)
class ReasoningEnded:
    """The thought is complete. It does not come where the answer was cut off."""


@dataclass(slots=True)
class CallBegun:
    """A call of the function `name`; `index` counts the choice's calls from 0."""

    index: int
    id: str
    name: str


@dataclass(slots=True)
class CallArguments:
    """The next piece of a call's arguments, which are JSON as text."""

    index: int
    text: str


@dataclass(slots=True)
class CallEnded:
    """The call's arguments are complete. It does not come where the answer was cut off."""

    index: int


Event = Text | Reasoning | ReasoningEnded | CallBegun | CallArguments | CallEnded


class OutputParser(Protocol):
    """One choice's text made into events. However the text is cut into pieces, the same message comes of it. `marks`
    are what it has to see even where they are special tokens."""

    marks: tuple[str, ...]

    def push(self, text: str) -> list[Event]:
        """What is certain after the next piece of text, which may be empty."""

    def finish(self) -> list[Event]:
        """What was held back, when no more text comes."""


ParserFactory = Callable[[], OutputParser]


class PlainText:
    """The parser of answers that are nothing but text."""

    marks: tuple[str, ...] = ()

    def push(self, text: str) -> list[Event]:
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        return []


@dataclass(slots=True)
class Call:
    """A whole call; `arguments` is JSON as text."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """All that a choice says."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[Event]) -> "Message":
        """The message of a choice's events from the first on."""
        content, reasoning, calls = [], [], []
        for event in events:
            match event:
                case Text():
                    content.append(event.text)
                case Reasoning():
                    reasoning.append(event.text)
                case CallBegun():
                    calls.append((event, [""]))
                case CallArguments():
                    calls[event.index][1].append(event.text)
        made = [Call(begun.id, begun.name, "".join(pieces)) for begun, pieces in calls]
        return cls("".join(content), "".join(reasoning), made)
