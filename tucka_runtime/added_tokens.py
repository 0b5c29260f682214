"""A base's tokenizer with the tokens that an adapter adds to it."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from tucka_runtime.errors import InvalidAdapterError
from tucka_runtime.tokenizer import Tokenizer, backend_with


class NewToken(NamedTuple):
    """An added token as tokenizer.json has it."""

    id: int
    content: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class ExtendedTokenizer(Tokenizer):
    """What it adds is all that it keeps: the rest is its base's."""

    def __init__(self, base: Tokenizer, tokens: Sequence[NewToken]):
        """Raises InvalidAdapterError for ids that cannot be: the library numbers added tokens one after another."""
        from tokenizers import AddedToken

        added = [AddedToken(**{name: value for name, value in t._asdict().items() if name != "id"}) for t in tokens]
        self._set_backend(backend_with(base._backend, added))
        for token in tokens:
            if (id_ := self.id_of(token.content)) != token.id:
                raise InvalidAdapterError(
                    f"the adapter's tokenizer.json: an added token has the id {token.id}, and would be {id_} on this "
                    "base, whose added tokens must have the ids that follow on its own. Save the tokenizer that the "
                    "adapter was trained with, or take the file out of the folder."
                )
        self._base = base
        self._unknown, self.ends, self.special_tokens = base._unknown, base.ends, base.special_tokens
        self.chat_template, self.tool_template = base.chat_template, base.tool_template
        texts = {token.id: token.content for token in tokens}
        self._bytes = {id_: text.encode() for id_, text in texts.items()}
        self.whole = _Whole(texts, base.whole)

    def token_bytes(self, token_id: int) -> bytes:
        own = self._bytes.get(token_id)
        return self._base.token_bytes(token_id) if own is None else own

    @cached_property
    def longest_token(self) -> int:
        return max(self._base.longest_token, *(len(text) for text in self._added.values()))


class _Whole(dict[int, str | None]):
    """The texts of the tokens that are added; others are their base's."""

    def __init__(self, own: dict[int, str], base: dict[int, str | None]):
        super().__init__(own)
        self._base = base

    def __missing__(self, token_id: int) -> str | None:
        return self._base[token_id]
