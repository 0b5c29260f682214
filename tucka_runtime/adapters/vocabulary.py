"""The vocabulary of an adapter: the base's, or one that was resized for training, as where tokens were added.

PEFT leaves the size to the file (`save_embedding_layers`): it is the number of rows of the embedding and of the head
there. Both have to be there whole, for what the base has no rows for nobody else knows.
"""

from collections.abc import Mapping, Set

from tucka_runtime.adapters.manifest import RESIZED, expected_tables
from tucka_runtime.adapters.safefile import Entry
from tucka_runtime.errors import BaseModelMismatchError
from tucka_runtime.messages import BaseLayout


def own_size(entries: Mapping[str, Entry], base: BaseLayout) -> int | None:
    """The number of tokens of an adapter's own vocabulary, None where it has the base's. Raises
    BaseModelMismatchError where its tables differ in that."""
    sizes = {entries[name].shape[0] for name in expected_tables(entries.keys(), base)}
    if len(sizes) > 1:
        raise BaseModelMismatchError(
            f"the adapter's embeddings and heads have different numbers of rows ({', '.join(map(str, sorted(sizes)))}),"
            " and are one vocabulary's. Save it again after transformers' resize_token_embeddings, which resizes both."
        )
    return sizes.pop() if sizes and sizes != {_base_size(base)} else None


def check_whole(saved: Set[str], resized: BaseLayout) -> None:
    """That an adapter with a vocabulary of its own, of which these parameters are `saved`, brings the embedding and the
    head. Raises BaseModelMismatchError."""
    if missing := [path for path in resized.tables if f"{path}.weight" not in saved]:
        size = _base_size(resized)
        raise BaseModelMismatchError(
            f"the adapter's file has a vocabulary of {size}, another one than this base, and not all rows of "
            f"{missing[0]} for it. " + RESIZED.format("resized", size)
        )


def _base_size(base: BaseLayout) -> int:
    return base.parameters[f"{base.embed}.weight"][0]
