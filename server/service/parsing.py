"""What parsers of answers have in common: they read a text that is still coming in as if it were all there.

A parser is a generator that is resumed with each piece of text and yields where it needs more to decide. What it
decides depends on the characters alone, never on how they were cut into pieces.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import TypeVar

from tucka_runtime.server.service.events import Event

T = TypeVar("T")
Step = Generator[None, None, T]
"""A part of a parser, which returns a T and may wait for text on the way."""


class StreamParser(ABC):
    """`text` is what was pushed and not yet taken, `marks` as in `OutputParser`."""

    marks: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.text = ""
        self.closed = False
        self.events: list[Event] = []
        self._run = self.run()
        next(self._run)

    @abstractmethod
    def run(self) -> Step[None]:
        """All of the parser. Ends when `closed` is set and the text is taken."""

    def push(self, text: str) -> list[Event]:
        self.text += text
        return self._resume()

    def finish(self) -> list[Event]:
        self.closed = True
        return self._resume()

    def _resume(self) -> list[Event]:
        next(self._run, None)
        events, self.events = self.events, []
        return events

    def take(self, count: int) -> str:
        """The first characters, which are then gone."""
        taken, self.text = self.text[:count], self.text[count:]
        return taken

    def char(self, index: int) -> Step[str]:
        """The character at `index`; empty where the text ends before."""
        while len(self.text) <= index and not self.closed:
            yield
        return self.text[index : index + 1]

    def skip_blanks(self, index: int) -> Step[int]:
        """The index of the first character from `index` on that is no blank, or the text's length."""
        while (yield from self.char(index)).isspace():
            index += 1
        return index

    def starts(self, word: str, index: int) -> Step[bool]:
        """Whether `word` stands at `index`. Waits only as long as it may."""
        for offset, wanted in enumerate(word):
            if (yield from self.char(index + offset)) != wanted:
                return False
        return True

    def before(self, word: str) -> int:
        """Characters at the beginning of the text that are certainly no part of `word`; all of them once it is
        closed."""
        if self.closed:
            return len(self.text)
        last = len(self.text) - len(word) + 1
        for start in range(max(last, 0), len(self.text)):
            if word.startswith(self.text[start:]):
                return start
        return len(self.text)
