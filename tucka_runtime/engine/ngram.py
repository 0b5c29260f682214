"""Drafts by n-gram lookup: what followed the last tokens the last time that they stood in the same text. No torch.

Known as prompt lookup decoding (Saxena, 2023). Answers that quote their prompt or repeat themselves (code that is
edited, JSON, extraction, summaries) are drafted well; a draft that is wrong costs rows of a forward pass and changes
nothing, since only tokens that the sampler chooses anyway are kept.
"""

from tucka_runtime.config import EngineConfig
from tucka_runtime.messages import RouteScope


class NgramIndex:
    """Where every run of `least` to `most` tokens of one sequence was last followed by something.

    Tokens are indexed once, as they come: `draft` takes O(most - least) per new token, whatever the text's length. A
    run is known by its hash alone: two that share one make a bad draft, no more. Takes some 100 bytes per token and
    length.
    """

    __slots__ = ("indexed", "lengths", "limit", "seen", "tokens")

    def __init__(self, least: int, most: int, tokens: int):
        """A draft has at most `tokens` tokens."""
        self.lengths = range(most, least - 1, -1)
        self.tokens = self.limit = tokens
        self.indexed = 0
        self.seen: dict[int, int] = {}

    @staticmethod
    def of(config: EngineConfig, scope: RouteScope | None) -> "NgramIndex | None":
        """A new sequence's. None where nothing is drafted: also under the scope `batch`, where the route of a pass is
        the mean over the tokens in it, so that each token has to have a pass of its own."""
        if config.speculate == "none" or scope is RouteScope.BATCH:
            return None
        return NgramIndex(config.speculate_min_ngram, config.speculate_max_ngram, config.speculate_tokens)

    def draft(self, text: list[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `text`, which only ever grows: those behind the latest earlier place of
        its longest end that has one, and where they reach the end of the text, the draft's own from its beginning."""
        for end in range(self.indexed, len(text)):
            for length in self.lengths:
                if length <= end:
                    self.seen[hash(tuple(text[end - length : end]))] = end
        self.indexed = len(text)
        count = min(most, self.limit)
        if count > 0:
            for length in self.lengths:
                if length <= len(text) and (start := self.seen.get(hash(tuple(text[-length:])))) is not None:
                    period = len(text) - start
                    return [text[start + i % period] for i in range(count)]
        return []

    def verified(self, drafted: int, right: int) -> None:
        """Learns how many of a draft's tokens were right: the next is twice as long if all were, else about as long as
        that. So a text without repetitions is hardly slowed down by its drafts."""
        self.limit = min(2 * drafted, self.tokens) if right == drafted else max(right, 1)
