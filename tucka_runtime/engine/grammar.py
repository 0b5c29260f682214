"""Answers held to a grammar: which tokens may come next, found by llguidance.

A grammar (grammars.py) is over the bytes of the tokenizer's tokens; each sequence is followed with a matcher of its
own. llguidance is imported when the first grammar comes: kernels and engine run on a machine that has
torch, triton, transformers and safetensors alone.
"""

from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tucka_runtime.engine.sequence import Sequence
from tucka_runtime.errors import InvalidRequestError, ModelLoadError, TuckaError
from tucka_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer


class Grammars:
    """The matchers of all sequences that have a grammar, until `forget`."""

    def __init__(self, tokenizer: Tokenizer | None, vocab: int, eos: frozenset[int]):
        self.tokenizer, self.vocab, self.eos = tokenizer, vocab, eos
        self.matchers: dict[tuple[str, int], tuple[LLMatcher, int]] = {}
        """Matchers by sequence, with the number of its tokens that each has seen."""
        self.broken: dict[tuple[str, int], TuckaError] = {}
        """The errors that sequences end with whose grammar turned out to be too complex."""
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._begun: tuple[dict[tuple[str, int], int], Future[Tensor]] | None = None
        """The rows of the masks that `begin` asked for, by sequence, and the masks."""

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

    def begin(self, seqs: Rows[Sequence]) -> None:
        """Finds what may follow the sequences, in a thread of its own: beside the forward pass. No token of theirs may
        be on its way. `masks` has it, in any order of these sequences."""
        rows = {seq.key: i for i, seq in enumerate(seqs)}
        self._begun = (rows, self._thread.submit(self._find, list(seqs))) if rows else None

    def masks(self, seqs: Rows[Sequence]) -> Tensor:
        """What may follow each sequence: a bit for each token of the vocabulary (N, words) int32, the lowest first, on
        the host. All are set where a grammar broke."""
        if self._begun is None:
            return self._find(seqs)
        (rows, found), self._begun = self._begun, None
        return found.result()[[rows[seq.key] for seq in seqs]]

    @cached_property
    def _executor(self) -> "LLExecutor":
        """Threads that find several masks at once, as many as torch has."""
        from llguidance import LLExecutor

        return LLExecutor(num_threads=torch.get_num_threads())

    def _find(self, seqs: Rows[Sequence]) -> Tensor:
        made = torch.full((len(seqs), -(-self.vocab // 32)), -1, dtype=torch.int32)
        matchers = [self._matcher(seq) for seq in seqs]
        whole = [(matcher, i) for i, matcher in enumerate(matchers) if not matcher.is_error()]
        if len(whole) == 1:
            matcher, i = whole[0]
            matcher.unsafe_compute_mask_ptr(made[i].data_ptr(), made.shape[1] * 4)
        elif whole:
            self._executor.unsafe_compute_mask_ptr(whole, made.data_ptr(), made.shape[1] * 4, len(seqs))
        for seq, matcher, row in zip(seqs, matchers, made, strict=True):
            if matcher.is_error():
                row.fill_(-1)
                self.broken[seq.key] = InvalidRequestError(
                    "What the answer is held to (a JSON schema, a grammar) takes too much to follow. Simplify its "
                    "patterns and alternatives."
                )
        return made

    def _matcher(self, seq: Sequence) -> "LLMatcher":
        """The sequence's matcher, which has seen all of its answer."""
        entry = self.matchers.get(seq.key)
        if entry is None:
            from llguidance import LLMatcher

            from tucka_runtime.grammars import LIMITS

            assert seq.sampling.grammar is not None
            matcher = LLMatcher(self.tokens, seq.sampling.grammar, log_level=0, limits=LIMITS)
            entry = matcher, seq.num_prompt
        matcher, known = entry
        matcher.consume_tokens(seq.tokens[known:])
        self.matchers[seq.key] = matcher, len(seq)
        return matcher
