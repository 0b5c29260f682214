"""A sequence's ids as text, one id at a time, at a constant cost: no half of a UTF-8 character ever leaves it."""

import codecs
from collections.abc import Collection

from tucka_runtime.tokenizer import Tokenizer


class Detokenizer:
    """One sequence's ids to text. Every token is a known run of bytes; a UTF-8 character leaves when it is whole.
    `shown` are special tokens that are not skipped."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, shown: Collection[int] = ()):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_tokens_but(shown) if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.pending = False
        """True while a character waits for its last bytes."""

    def push(self, token_id: int) -> str:
        """The text that became final with this token; may be empty."""
        if token_id in self._skipped:
            return ""
        if not self.pending and (whole := self._tokenizer.whole[token_id]) is not None:
            return whole
        text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        self.pending = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """What is left when no token follows: the replacement character for an unfinished one."""
        self.pending = False
        return self._decoder.decode(b"", final=True)
