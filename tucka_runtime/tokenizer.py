"""Text to token ids and back, from the files of a base model's folder.

Detokenisation is incremental: a `Detokenizer` takes one id at a time and returns the text that is final, so that no
half of a UTF-8 character ever leaves it, at constant cost per token.
"""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tucka_runtime.errors import ModelLoadError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """One base model's tokenizer. Safe to use from several threads: the underlying object is only read."""

    def __init__(self, tokenizer: Any):
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special = {id_ for id_, token in self._backend.get_added_tokens_decoder().items() if token.special}
        self._byte_level = type(self._backend.decoder).__name__ == "ByteLevel"
        self._bytes: dict[int, bytes] = {}
        template = tokenizer.chat_template
        self.chat_template: str | None = template.get("default") if isinstance(template, dict) else template
        self.special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer | None":
        """The folder's tokenizer, or None when it holds none. Raises ModelLoadError if it cannot be used."""
        if not any((folder / name).is_file() for name in _FILES):
            return None
        from transformers import AutoTokenizer  # takes seconds: here, the engine loads the model meanwhile

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
            raise ModelLoadError(
                f"The tokenizer in {folder} cannot be read: {error}. "
                "Repair its files, or remove them to serve token-id prompts only."
            ) from error
        if not getattr(tokenizer, "is_fast", False):
            raise ModelLoadError(
                f"The tokenizer in {folder} has no fast version (tokenizer.json). "
                "Save it once with transformers' fast class, or remove its files to serve token-id prompts only."
            )
        return cls(tokenizer)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation as the prompt that asks for the assistant's next turn, by the model's own chat template, in
        this process. Raises ValueError without a template, and whatever the template raises."""
        if self.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        return render_chat(self.chat_template, self.special_tokens, messages)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of c characters has at least c / longest_token tokens."""
        return max(map(len, self._backend.get_vocab()))

    @property
    def serialised(self) -> str:
        """The whole tokenizer as the text of a tokenizer.json."""
        return str(self._backend.to_str())

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def token(self, token_id: int) -> str | None:
        """The token as the files spell it; None if there is none of that id."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a running text; empty for an id that the tokenizer does not know."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._find_bytes(token_id)
        return found

    def _find_bytes(self, token_id: int) -> bytes:
        token = self.token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            mapped = [_CHAR_TO_BYTE.get(char) for char in token]
            return token.encode() if None in mapped else bytes(b for b in mapped if b is not None)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        if token_id in self._special:
            return token.encode()
        # Decoders strip the space that begins a text, so the token is decoded behind another one.
        before = self.decode([self._anchor], skip_special_tokens=False)
        both = self.decode([self._anchor, token_id], skip_special_tokens=False)
        return both[len(before) :].encode()

    @cached_property
    def _anchor(self) -> int:
        return self.encode("a", add_special_tokens=False)[-1]


def render_chat(template: str, special_tokens: Mapping[str, str], messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt that a chat template, in transformers' sandbox, makes of a conversation."""
    from transformers.utils.chat_template_utils import render_jinja_template

    conversations: Any = [list(messages)]
    variables: dict[str, Any] = dict(special_tokens)
    rendered = render_jinja_template(conversations, chat_template=template, add_generation_prompt=True, **variables)
    return rendered[0][0] if isinstance(rendered, tuple) else rendered[0]


class Detokenizer:
    """One sequence's ids to text. Every token is a known run of bytes; a UTF-8 character leaves when it is whole."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> bool:
        """True while a character waits for its last bytes."""
        return bool(self._decoder.getstate()[0])

    def push(self, token_id: int) -> str:
        """The text that became final with this token; may be empty."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left when no token follows: the replacement character for an unfinished one."""
        return self._decoder.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """How byte-level tokenizers spell bytes: printable Latin-1 as itself, the others by code points from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_CHAR_TO_BYTE = _byte_alphabet()
