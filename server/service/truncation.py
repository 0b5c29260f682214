"""Prompts cut to a number of tokens, as vLLM's `truncate_prompt_tokens` asks."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Truncation:
    """Keeps `most` tokens of a prompt: its last ones where `side` is "left", the side that is cut, else its first."""

    most: int
    side: Literal["left", "right"]

    def ids(self, ids: list[int], start: int = 0) -> list[int]:
        """The prompt cut. The first `start` tokens, which the tokenizer put there, stay and count."""
        if len(ids) <= self.most:
            return ids
        if self.side == "right":
            return ids[: self.most]
        start = min(start, self.most)
        return ids[:start] + ids[len(ids) - self.most + start :]

    def text(self, text: str, most: int) -> str:
        """So many characters of a text, of the side that is kept."""
        if len(text) <= most:
            return text
        return text[-most:] if self.side == "left" else text[:most]
