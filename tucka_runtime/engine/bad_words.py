"""Words that an answer may not have, as token ids. No torch."""

from collections.abc import Sequence


class BadWords:
    """The words of one sequence, by what stands before the last token of each. None is empty."""

    def __init__(self, words: Sequence[Sequence[int]]):
        self._last: dict[tuple[int, ...], list[int]] = {}
        for *before, last in words:
            self._last.setdefault(tuple(before), []).append(last)
        self._lengths = sorted({len(before) for before in self._last})

    def after(self, tokens: Sequence[int], start: int) -> list[int]:
        """The tokens that would end a word behind `tokens`, of which those from `start` on are the answer's."""
        end = len(tokens)
        return [
            last
            for length in self._lengths
            if end - length >= start
            for last in self._last.get(tuple(tokens[end - length :]), ())
        ]
