"""Prompts as completions and embeddings take them: texts or token ids, one or several."""

from collections.abc import Sequence

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.api import fields
from tucka_runtime.server.api.door import Context
from tucka_runtime.server.service.truncation import Truncation


def listed(
    value: str | list[str] | list[int] | list[list[int]], vocab_size: int, param: str, most: int, setting: str
) -> Sequence[str | list[int]]:
    """The four forms of `param` as a list of texts or of token-id lists. Raises InvalidRequestError where there are
    more than `most`, which is what the server's `setting` says."""
    if isinstance(value, str):
        return [value]
    if isinstance(value[0], int):
        return [fields.token_ids(value, vocab_size, param)]
    if len(value) > most:
        raise InvalidRequestError(f"`{param}` holds more than {most} prompts, this server's {setting}.", param)
    if isinstance(value[0], str):
        return value
    return [fields.token_ids(item, vocab_size, param) for item in value]


async def tokenize(
    context: Context,
    prompts: Sequence[str | list[int]],
    param: str,
    add_special_tokens: bool,
    split_special_tokens: bool,
    truncation: Truncation | None,
) -> list[list[int]]:
    """The prompts as token ids, cut by `truncation`, none of them empty. Raises InvalidRequestError."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        ids = [prompt for prompt in prompts if not isinstance(prompt, str)]
        return ids if truncation is None else [truncation.ids(prompt) for prompt in ids]
    ids = await context.service.encode(
        context.defaults, texts, add_special_tokens, param, context.vocab_size, split_special_tokens, truncation
    )
    if not all(ids):
        raise InvalidRequestError("A prompt has no tokens. Send text that the tokenizer knows.", param)
    return ids
