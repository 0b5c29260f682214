"""The tokens that an adapter's tokenizer.json adds to its base's. Standard library only.

Only data: nothing of the file but its added tokens is used, and no pattern, normaliser or model of it is ever run. A
server reads it in a process of its own (`python -m` on this module): a large one holds that up for a second, a hostile
one may end it, and nobody else.
"""

import hashlib
import json
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tucka_runtime.adapters.files import (
    DEFAULTS_LIMITS,
    TOKENIZER_NAME,
    open_file,
    open_folder,
    read_exactly,
    strict_json,
)
from tucka_runtime.added_tokens import NewToken
from tucka_runtime.children import end_with_parent
from tucka_runtime.errors import InvalidAdapterError

MAX_TOKENS = 4096
MAX_TOKEN_CHARS = 256
MAX_CHARS = 2**17  # of all of them: what a text is searched for
MAX_SECONDS = 30  # of processor time; 34 MB, as Gemma's, take 2
MAX_MEMORY = 2**30  # bytes that the process may take on top of what it has when it starts
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def new_tokens(data: bytes | bytearray, vocabulary: Mapping[str, int], added: frozenset[int]) -> list[NewToken]:
    """The added tokens that are none of the base's, in the order of their ids. `vocabulary` are all tokens of the base,
    `added` the ids of its added ones. Raises InvalidAdapterError where the two contradict each other."""
    try:
        table = strict_json(data.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise _refused(f"cannot be read: {error}", "Save it again") from None
    listed, pieces = _added_tokens(table), _pieces(table)
    ids = {id_: token for token, id_ in vocabulary.items()}
    for token, id_ in (*pieces.items(), *((token.content, token.id) for token in listed)):
        if vocabulary.get(token, id_) != id_ or ids.get(id_, token) != token:
            raise _refused(
                f"contradicts this base's tokenizer, of which the token {id_} is another one. The base's tokens must "
                "keep their ids, and new ones follow on them",
                "Save the tokenizer that the adapter was trained with on this base",
            )
    own = pieces.keys() - vocabulary.keys() - {token.content for token in listed}
    if own:
        raise _refused(
            f"has {len(own)} tokens that are no added ones but of its model, whose rules would make other tokens of a "
            "text. Only added tokens (`add_tokens`, `add_special_tokens`) can be used",
            "Serve a base that was saved with that tokenizer",
        )
    found = sorted(token for token in listed if token.id not in added)
    if len(found) > MAX_TOKENS or sum(len(token.content) for token in found) > MAX_CHARS:
        raise _refused(
            f"adds more than {MAX_TOKENS} tokens, or than {MAX_CHARS} characters of them",
            "Serve a base that was saved with that tokenizer",
        )
    return found


def _added_tokens(table: Any) -> list[NewToken]:
    listed = (table.get("added_tokens") or []) if isinstance(table, dict) else None
    if not isinstance(listed, list) or not all(map(_is_token, listed)):
        raise _refused(f"has no list of `added_tokens` with {', '.join(NewToken._fields)}", "Save it again")
    tokens = [NewToken(one["id"], one["content"], *(one[flag] for flag in _FLAGS)) for one in listed]
    if len({token.id for token in tokens}) < len(tokens) or len({token.content for token in tokens}) < len(tokens):
        raise _refused("has an added token, or the id of one, twice", "Save it again")
    return tokens


def _is_token(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("id")) is int
        and 0 <= value["id"] < 2**31
        and isinstance(value.get("content"), str)
        and 0 < len(value["content"]) <= MAX_TOKEN_CHARS
        and all(type(value.get(flag)) is bool for flag in _FLAGS)
    )


def _pieces(table: dict[str, Any]) -> dict[str, int]:
    """The vocabulary of the tokenizer's model: tokens by id, or Unigram's with their scores in the order of ids."""
    model = table.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list) and all(isinstance(one, list) and one and isinstance(one[0], str) for one in vocab):
        return {one[0]: id_ for id_, one in enumerate(vocab)}
    if isinstance(vocab, dict) and all(type(id_) is int for id_ in vocab.values()):
        return vocab
    raise _refused("has no `vocab` in its `model`", "Save it again")


def _refused(what: str, remedy: str) -> InvalidAdapterError:
    return InvalidAdapterError(f"the adapter's {TOKENIZER_NAME} {what}. {remedy}, or take the file out of the folder.")


def _read(folder: Path) -> bytearray:
    with (
        open_folder(folder) as folder_fd,
        open_file(folder_fd, TOKENIZER_NAME, DEFAULTS_LIMITS[TOKENIZER_NAME]) as found,
    ):
        return read_exactly(*found, TOKENIZER_NAME)


def _child_main() -> None:
    """Is given a folder and the digest of the file in it, and JSON with the base's `vocabulary` and `added`. Writes
    JSON, `tokens` or `error`."""
    parent, folder, digest = sys.argv[1:]
    end_with_parent(int(parent))
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_MEMORY, used + MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    answer: dict[str, Any]
    try:
        base = json.loads(sys.stdin.buffer.read())
        data = _read(Path(folder))
        if hashlib.sha256(data).hexdigest() != digest:
            raise _refused("was changed while it was read", "Load the adapter again")
        answer = {"tokens": new_tokens(data, base["vocabulary"], frozenset(base["added"]))}
    except InvalidAdapterError as error:
        answer = {"error": error.message}
    except MemoryError:
        os._exit(1)
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _child_main()
