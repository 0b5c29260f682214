"""Text to token ids and back, from the files of a base model's folder.

Special tokens are what a model is controlled with: they begin and end texts and turns. What people write in messages is
text and never becomes one: `shield` marks where a message spells one before the chat template sees it, and `encode`
makes plain text of what is marked, while those that the template itself writes stay what they are.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tucka_runtime.base_files import end_tokens, without_marks
from tucka_runtime.chat_rendering import render_chat
from tucka_runtime.errors import ModelLoadError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MARK = f"\ufdd0{secrets.randbelow(10**12):012}\ufdd0"
"""Breaks what spells a special token. Nobody can guess it; who could would have no more than plain text of it."""
_NEVER = re.compile(r"(?!)")


class Tokenizer:
    """One base model's tokenizer. Safe to use from several threads: the underlying objects are only read.

    `ends` are the tokens that end a text: the tokenizer's own, and those that the folder's other files name.
    """

    def __init__(self, tokenizer: Any, ends: tuple[int, ...] | None = None):
        self._set_backend(tokenizer.backend_tokenizer)
        own = tokenizer.eos_token_id
        self.ends = ends if ends is not None else () if own is None else (own,)
        self._unknown: int | None = tokenizer.unk_token_id
        self._bytes: dict[int, bytes] = {}
        self.whole: dict[int, str | None] = _Whole(self)
        template = tokenizer.chat_template
        templates: dict[str, str | None] = template if isinstance(template, dict) else {"default": template}
        self.chat_template = templates.get("default")
        self.tool_template = templates.get("tool_use")
        self.special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}

    def _set_backend(self, backend: Any) -> None:
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self._added = {id_: str(token.content) for id_, token in added.items()}
        self._special = {id_: self._added[id_] for id_, token in added.items() if token.special}
        self._special_ids = frozenset(self._special)
        self._byte_level = type(self._backend.decoder).__name__ == "ByteLevel"

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer | None":
        """The folder's tokenizer, or None when it holds none. Raises ModelLoadError if it cannot be used."""
        if not any((folder / name).is_file() for name in _FILES):
            return None
        from transformers import AutoTokenizer  # takes seconds: here, the engine loads the model meanwhile

        try:
            with without_marks(folder) as clean:
                tokenizer = AutoTokenizer.from_pretrained(str(clean), local_files_only=True, trust_remote_code=False)
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
        return cls(tokenizer, end_tokens(folder, tokenizer.eos_token_id))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """A conversation as the prompt that asks for the assistant's next turn, by the model's own chat template, in
        this process. Raises ValueError without a template, and whatever the template raises."""
        template = (self.tool_template if tools else None) or self.chat_template
        if template is None:
            raise ValueError("the tokenizer has no chat template")
        return render_chat(
            template,
            self.special_tokens,
            self.shield(messages),
            self.shield(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
        )

    def encode(self, text: str, add_special_tokens: bool, split_special_tokens: bool = False) -> list[int]:
        """The ids of a text, as a prompt has them.

        With `add_special_tokens` what the tokenizer puts before every text comes first, unless the text begins with it;
        what it would put behind (an end token) is left out: after that nothing follows. What `shield` marked is plain
        text; with `split_special_tokens` all of the text is.
        """
        if split_special_tokens:
            ids = self._plain(self.shield(text).split(_MARK), begins=True)
        elif _MARK in text:
            ids = self._encode_marked(text)
        else:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        if add_special_tokens and ids[: len(self._prefix)] != self._prefix:
            ids = self._prefix + ids
        return ids

    def encode_whole(self, text: str) -> list[int]:
        """The ids of a text that nothing follows, with what the tokenizer puts before and behind it."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=True).ids
        return ids

    def num_start(self, ids: list[int]) -> int:
        """How many of these ids are what the tokenizer puts before every text."""
        return len(self._prefix) if ids[: len(self._prefix)] == self._prefix else 0

    def encode_completion(self, prompt: str, completion: str, add_special_tokens: bool) -> list[int]:
        """The ids of a text that goes on `prompt`: the prompt is tokenised alone, as it is when an answer is asked for,
        and these ids, detokenised behind it, are `completion` to the letter wherever the tokenizer can spell it.

        Where the tokens of the whole text begin with those of the prompt they are the rest of them. Else the completion
        is tokenised behind a letter that it does not merge with: alone, SentencePiece's tokenizers would put a space
        before it.
        """
        begin = self.encode(prompt, add_special_tokens)
        whole = self.encode(prompt + completion, add_special_tokens)
        rest = whole[len(begin) :]
        if whole[: len(begin)] == begin and self._spells(rest, completion):
            return rest
        return self._continue(completion, lambda text: self.encode(text, add_special_tokens=False))

    def _spells(self, ids: list[int], text: str) -> bool:
        return b"".join(map(self.token_bytes, ids)) == unshielded(text).encode()

    def _continue(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """The ids of a text that begins nothing: as it is tokenised behind a letter that it does not merge with."""
        for before in ("\n", "a", ".", "0"):
            begin, whole = encode(before), encode(before + text)
            if whole[: len(begin)] == begin and self._spells(whole[len(begin) :], text):
                return whole[len(begin) :]
        return encode(text)

    def shield(self, value: Any) -> Any:
        """The same messages (or whatever they are made of), with a mark in all that spells a special token."""
        if isinstance(value, str):
            return self._spelling.sub(lambda m: m[0] + _MARK, value)
        if isinstance(value, Mapping):
            return {self.shield(key): self.shield(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self.shield(item) for item in value]
        return value

    def special_ids(self, texts: Iterable[str]) -> dict[int, str]:
        """The special tokens that some of these texts spell, each text exactly one."""
        wanted = set(texts)
        return {id_: spelled for id_, spelled in self._special.items() if spelled in wanted}

    @cached_property
    def _spelling(self) -> re.Pattern[str]:
        """The first character of whatever spells a special token, in any case: marking too much does no harm."""
        tails: dict[str, list[str]] = {}
        for text in self._special.values():
            if text.strip():
                tails.setdefault(text[0], []).append(re.escape(text[1:]))
        if not tails:
            return _NEVER
        heads = (f"{re.escape(head)}(?={'|'.join(rest)})" for head, rest in tails.items())
        return re.compile("|".join(heads), re.IGNORECASE)

    @cached_property
    def _prefix(self) -> list[int]:
        """What the tokenizer puts before every text."""
        with_them = self._backend.encode("a", add_special_tokens=True).ids
        without = self._backend.encode("a", add_special_tokens=False).ids
        for start in range(len(with_them) - len(without) + 1):
            if with_them[start : start + len(without)] == without:
                return list(with_them[:start])
        return []

    @cached_property
    def _no_special(self) -> Any:
        """The tokenizer without its special tokens; `_MARK` is a token instead, to put before what begins no text."""
        from tokenizers import AddedToken

        plain = backend_with(self._backend, [AddedToken(_MARK, normalized=False)])
        plain.encode_special_tokens = True
        return plain

    def _plain(self, parts: list[str], begins: bool) -> list[int]:
        """The ids of a text without special tokens. Where the vocabulary itself spells one (Unigram's do), the `parts`
        between its marks are tokenised one by one."""
        before = "" if begins else _MARK
        ids = self._without_special(before + "".join(parts))[0 if begins else 1 :]
        if (self._special.keys() - {self._unknown}).isdisjoint(ids):
            return ids
        first, *rest = parts
        ids = self._plain([first], begins) if len(parts) > 1 else ids
        ids += [i for part in rest for i in self._continue(part, self._without_special)]
        return [plain for id_ in ids for plain in self._spelled_out.get(id_, (id_,))]

    @cached_property
    def _spelled_out(self) -> dict[int, list[int]]:
        """The special tokens of one character, which no mark can part, as the vocabulary's bytes, or as unknown."""
        unknown = [] if self._unknown is None else [self._unknown]
        found = {}
        for id_, text in self._special.items():
            if len(text) == 1 and id_ != self._unknown:
                spelled = [self._backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
                found[id_] = unknown if None in spelled else spelled
        return found

    def _without_special(self, text: str) -> list[int]:
        ids: list[int] = self._no_special.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_marked(self, text: str) -> list[int]:
        """The special tokens that are spelled without a mark, and between them what is plain text."""
        found = self._backend.encode(text, add_special_tokens=False)
        ids: list[int] = []
        start, first = 0, 0  # where the text since the last special token begins, in characters and in tokens

        def close(end: int, last: int) -> None:
            between = text[start:end]
            if _MARK in between:
                ids.extend(self._plain(between.split(_MARK), begins=not start))
            else:
                ids.extend(found.ids[first:last])

        for i, (id_, (begin, end)) in enumerate(zip(found.ids, found.offsets, strict=True)):
            spelled = text[begin:end].strip().lower() == self._special.get(id_, _MARK).strip().lower()
            if spelled and not text.startswith(_MARK, end):  # a mark there belongs to a token of one character
                close(begin, i)
                ids.append(id_)
                start, first = end, i + 1
        close(len(text), len(found.ids))
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if not self._byte_level:
            return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))
        kept = (id_ for id_ in ids if not (skip_special_tokens and id_ in self._special))
        return b"".join(map(self.token_bytes, kept)).decode(errors="replace")

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of c characters has at least c / longest_token tokens."""
        return max(map(len, self.vocabulary))

    @property
    def vocabulary(self) -> dict[str, int]:
        """The ids of all tokens, as the files spell them."""
        found: dict[str, int] = self._backend.get_vocab()
        return found

    @property
    def added_ids(self) -> frozenset[int]:
        """The ids of the added tokens, which are found in a text before anything else is."""
        return frozenset(self._added)

    @property
    def serialised(self) -> str:
        """The whole tokenizer as the text of a tokenizer.json."""
        return str(self._backend.to_str())

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def special_tokens_but(self, shown: Collection[int]) -> frozenset[int]:
        """The ids of the special tokens that are not among `shown`."""
        return self._special_ids if not shown else self._special_ids - frozenset(shown)

    def id_of(self, token: str) -> int | None:
        """The id of a token as the files spell it; None if there is none."""
        found: int | None = self._backend.token_to_id(token)
        return found

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
        if token_id in self._added:  # added tokens are spelled as they are, whatever the alphabet of the others
            return self._added[token_id].encode()
        if self._byte_level:
            mapped = [_CHAR_TO_BYTE.get(char) for char in token]
            return token.encode() if None in mapped else bytes(b for b in mapped if b is not None)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        # Decoders strip the space that begins a text, so the token is decoded behind another one.
        before = self.decode([self._anchor], skip_special_tokens=False)
        both = self.decode([self._anchor, token_id], skip_special_tokens=False)
        return both[len(before) :].encode()

    @cached_property
    def _anchor(self) -> int:
        return self.encode("a", add_special_tokens=False)[-1]


def backend_with(backend: Any, tokens: Sequence[Any]) -> Any:
    """The same tokenizer of the library `tokenizers` with more added tokens. It shares all but these with the first:
    the vocabulary of a large one takes half a second to copy, and tens of megabytes."""
    from tokenizers import Tokenizer as Backend

    made: Any = Backend(backend.model)
    made.normalizer, made.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    made.post_processor, made.decoder = backend.post_processor, backend.decoder
    known = backend.get_added_tokens_decoder()
    made.add_tokens([*(known[id_] for id_ in sorted(known)), *tokens])
    return made


class _Whole(dict[int, str | None]):
    """The texts of tokens, by their ids; None for those that are not whole characters, which must be put together.
    Each is found when it is first needed."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str | None:
        try:
            self[token_id] = self._tokenizer.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            self[token_id] = None
        return self[token_id]


def unshielded(text: str) -> str:
    """A text without the marks of `Tokenizer.shield`."""
    return text.replace(_MARK, "")


def _byte_alphabet() -> dict[str, int]:
    """How byte-level tokenizers spell bytes: printable Latin-1 as itself, the others by code points from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_CHAR_TO_BYTE = _byte_alphabet()
