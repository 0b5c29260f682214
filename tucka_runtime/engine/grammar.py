"""Answers held to a grammar: which tokens may come next, found by llguidance.

A grammar (grammars.py) is over the bytes of the tokenizer's tokens; each sequence is followed with a matcher of its
own. llguidance is imported when the first grammar comes: kernels and engine run on a machine that has
torch, triton, transformers and safetensors alone.
"""

from functools import cached_property
from typing import TYPE_CHECKING

from tucka_runtime.engine.sequence import Sequence
from tucka_runtime.errors import InvalidRequestError, ModelLoadError, TuckaError
from tucka_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class Grammars:
    """The matchers of all sequences that have a grammar, until `forget`."""

    def __init__(self, tokenizer: Tokenizer | None, vocab: int, eos: frozenset[int]):
        self.tokenizer, self.vocab, self.eos = tokenizer, vocab, eos
        self.matchers: dict[tuple[str, int], tuple[LLMatcher, int]] = {}
        """Matchers by sequence, with the number of its tokens that each has seen."""
        self.broken: dict[tuple[str, int], TuckaError] = {}
        """The errors that sequences end with whose grammar turned out to be too complex."""

    @cached_property
    def tokens(self) -> "LLTokenizer":
        """The tokenizer as llguidance knows it. Made when it is first needed: a second for a large vocabulary."""
        from llguidance import LLTokenizer

        if self.tokenizer is None:
            raise ModelLoadError("The base model has no tokenizer, so no grammar can be followed.")
        return LLTokenizer(self.tokenizer.serialised, n_vocab=self.vocab, eos_token=sorted(self.eos) or None)

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that a matcher allows once the value is complete."""
        return frozenset(self.tokens.eos_tokens)

    def forget(self, seq: Sequence) -> None:
        self.matchers.pop(seq.key, None)
        self.broken.pop(seq.key, None)

    def allowed(self, seq: Sequence) -> bytes:
        """A byte for each token of the vocabulary, 0 where it may not follow what the sequence has; none is 0 if the
        grammar broke."""
        assert seq.sampling.grammar is not None
        entry = self.matchers.get(seq.key)
        if entry is None:
            from llguidance import LLMatcher

            from tucka_runtime.grammars import LIMITS

            matcher = LLMatcher(self.tokens, seq.sampling.grammar, log_level=0, limits=LIMITS)
            entry = matcher, seq.num_prompt
        matcher, known = entry
        matcher.consume_tokens(seq.tokens[known:])
        self.matchers[seq.key] = matcher, len(seq)
        mask = matcher.compute_logit_bias()
        if matcher.is_error():
            self.broken[seq.key] = InvalidRequestError(
                "What the answer is held to (a JSON schema, a grammar) takes too much to follow. Simplify its "
                "patterns and alternatives.",
                "response_format",
            )
            return b"\1" * self.vocab
        return mask
