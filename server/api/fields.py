"""What a body's fields mean for this model and server: the checks that its types cannot say."""

from typing import Literal

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.messages import EngineInfo, Route
from tucka_runtime.server.api.bodies import PinnedRoute, StreamOptions, TruncationFields
from tucka_runtime.server.http.body import MAX_DIGITS
from tucka_runtime.server.service.defaults import Defaults
from tucka_runtime.server.service.truncation import Truncation


def token_ids(value: list[int], vocab_size: int, param: str) -> list[int]:
    """The ids, none of which is negative."""
    if max(value) >= vocab_size:
        raise InvalidRequestError(f"`{param}` has a token id outside the vocabulary (0 to {vocab_size - 1}).", param)
    return value


def stops(value: str | list[str] | None) -> tuple[str, ...]:
    """An empty string is no stop at all."""
    if not value:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def stop_token_ids(value: list[int] | None, vocab_size: int) -> tuple[int, ...]:
    return tuple(token_ids(value, vocab_size, "stop_token_ids")) if value else ()


def allowed_token_ids(value: list[int] | None, vocab_size: int) -> tuple[int, ...]:
    return tuple(token_ids(value, vocab_size, "allowed_token_ids")) if value else ()


def logit_bias(value: dict[str, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases: dict[int, float] = {}
    for key, bias in (value or {}).items():
        if not (key.isascii() and key.isdigit()) or len(key) > MAX_DIGITS or int(key) >= vocab_size:
            raise InvalidRequestError(
                f"`logit_bias` has a key that is no token id of the vocabulary (0 to {vocab_size - 1}).", "logit_bias"
            )
        if int(key) in biases:
            raise InvalidRequestError("`logit_bias` names the same token id twice.", "logit_bias")
        biases[int(key)] = bias
    return tuple(biases.items())


def bad_words(value: list[str] | None, defaults: Defaults, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """The words as token ids, as vLLM makes them: each as it begins a text and, where that is another token of its own,
    behind a space."""
    words: list[tuple[int, ...]] = []
    for text in value or ():
        tokenizer = defaults.text_tokenizer("bad_words")
        plain, spaced = (tuple(tokenizer.encode(before + text.lstrip(), False)) for before in ("", " "))
        if not plain:
            raise InvalidRequestError("`bad_words` has a word of which no token is made. Leave it out.", "bad_words")
        words += [plain, spaced] if plain[0] != spaced[0] and len(plain) == len(spaced) else [plain]
        token_ids(list(plain + spaced), vocab_size, "bad_words")
    return tuple(words)


def truncation(
    body: TruncationFields, answer: int, info: EngineInfo, side: Literal["left", "right"] = "left"
) -> Truncation | None:
    """How the prompts are to be cut, on `side` unless the body names one, where the context has to hold `answer` tokens
    beside them."""
    asked = body.truncate_prompt_tokens
    if asked is None:
        return None
    most = max(info.context - answer, 1)
    if asked == 0 or asked > most:
        raise InvalidRequestError(
            f"`truncate_prompt_tokens` must be -1 or between 1 and {most}, the context less the answer.",
            "truncate_prompt_tokens",
        )
    return Truncation(most if asked < 0 else asked, body.truncation_side or side)


def stream_options(stream: bool, options: StreamOptions | None) -> StreamOptions:
    if options is None:
        return StreamOptions()
    if not stream:
        raise InvalidRequestError("`stream_options` is only allowed with `stream: true`.", "stream_options")
    return options


def pinned_route(value: PinnedRoute | None) -> Route | None:
    """That it fits the adapter is checked when that is loaded."""
    return None if value is None else Route(value.group, tuple(value.weights))
