"""The fields that hold lists and objects: read by hand, stopping at the first fault."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tucka_runtime import json_schema
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.messages import Route

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_SCHEMA_CHARS = 16_384  # of a schema made to take long, compiled in 0.2 s on the step loop
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MESSAGE_FIELDS = {"role", "content", "name", "refusal", "tool_calls", "function_call", "audio", "annotations"}


def prompts(value: Any, vocab_size: int, max_prompts: int) -> Sequence[str | list[int]]:
    """`prompt` in its four forms, as a list of texts or a list of token-id lists."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(
            "`prompt` must be a non-empty string, a list of strings, a list of token ids, or a list of such lists.",
            "prompt",
        )
    if isinstance(value[0], int):
        return [token_ids(value, vocab_size, "prompt")]
    if len(value) > max_prompts:
        raise InvalidRequestError(f"`prompt` holds more than {max_prompts} prompts, this server's --max-n.", "prompt")
    if isinstance(value[0], list):
        return [token_ids(item, vocab_size, "prompt") for item in value]
    for item in value:
        if not isinstance(item, str):
            raise InvalidRequestError("`prompt` mixes types. Send strings only, or token ids only.", "prompt")
        if not item:
            raise InvalidRequestError("A prompt is empty. Send at least one character.", "prompt")
    return value


def token_ids(value: Any, vocab_size: int, param: str) -> list[int]:
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(f"`{param}` must hold non-empty lists of token ids.", param)
    for item in value:
        if type(item) is not int:
            raise InvalidRequestError(f"`{param}` mixes types: token ids must be integers.", param)
        if not 0 <= item < vocab_size:
            raise InvalidRequestError(
                f"`{param}` has a token id outside the vocabulary (0 to {vocab_size - 1}).", param
            )
    return value


def stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or len(value) > MAX_STOPS:
        raise InvalidRequestError(f"`stop` must be a string or a list of at most {MAX_STOPS} strings.", "stop")
    for item in value:
        if not isinstance(item, str) or not 1 <= len(item) <= MAX_STOP_CHARS:
            raise InvalidRequestError(f"A stop must be a string of 1 to {MAX_STOP_CHARS} characters.", "stop")
    return tuple(value)


def stop_token_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    if value is None or value == []:
        return ()
    if isinstance(value, list) and len(value) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(f"`stop_token_ids` holds more than {MAX_STOP_TOKEN_IDS} ids.", "stop_token_ids")
    return tuple(token_ids(value, vocab_size, "stop_token_ids"))


def logit_bias(value: Any, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise InvalidRequestError(
            f"`logit_bias` must be an object of at most {MAX_LOGIT_BIAS} token ids and biases.", "logit_bias"
        )
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit()) or int(key) >= vocab_size:
            raise InvalidRequestError(
                f"`logit_bias` has a key that is no token id of the vocabulary (0 to {vocab_size - 1}).", "logit_bias"
            )
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise InvalidRequestError("`logit_bias` values must be numbers from -100 to 100.", "logit_bias")
        if int(key) in biases:
            raise InvalidRequestError("`logit_bias` names the same token id twice.", "logit_bias")
        biases[int(key)] = float(bias)
    return tuple(biases.items())


def response_format(value: Any) -> str | None:
    """The JSON schema, as text, that the answer has to match: `json_object` is any object; None for plain text."""
    if value is None or value == {"type": "text"}:
        return None
    if value == {"type": "json_object"}:
        return '{"type": "object"}'
    own = value.get("json_schema") if isinstance(value, dict) and value.get("type") == "json_schema" else None
    if not isinstance(own, dict) or value.keys() != {"type", "json_schema"}:
        raise InvalidRequestError(
            '`response_format` must be {"type": "text"}, {"type": "json_object"} or '
            '{"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}.',
            "response_format",
        )
    if not own.keys() <= {"name", "schema", "strict", "description"} or not isinstance(own.get("schema"), dict):
        raise InvalidRequestError(
            "`response_format.json_schema` must hold a `schema`, an object; beside it only `name`, `strict` and "
            "`description` are known.",
            "response_format",
        )
    schema = json.dumps(own["schema"])
    if len(schema) > MAX_SCHEMA_CHARS:
        raise InvalidRequestError(f"The JSON schema has more than {MAX_SCHEMA_CHARS} characters.", "response_format")
    if reason := json_schema.check(schema):
        raise InvalidRequestError(f"The JSON schema cannot be used: {reason}.", "response_format")
    return schema


def include_usage(stream: bool, options: Any) -> bool:
    """`stream_options.include_usage`, which is all that `stream_options` may hold."""
    if options is None:
        return False
    if not stream:
        raise InvalidRequestError("`stream_options` is only allowed with `stream: true`.", "stream_options")
    if not isinstance(options, dict) or not options.keys() <= {"include_usage", "include_obfuscation"}:
        raise InvalidRequestError("`stream_options` must be an object with `include_usage`.", "stream_options")
    if options.get("include_obfuscation", False) is not False:
        raise InvalidRequestError("`stream_options.include_obfuscation` is not supported.", "stream_options")
    usage = options.get("include_usage", False)
    if not isinstance(usage, bool):
        raise InvalidRequestError("`stream_options.include_usage` must be true or false.", "stream_options")
    return usage


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        fields = {"role": self.role, "content": self.content}
        return fields | {"name": self.name} if self.name else fields


def messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InvalidRequestError("`messages` must be a non-empty list.", "messages")
    return [_message(item) for item in value]


def pinned_route(value: Any) -> Route | None:
    """`{"group": int, "weights": [numbers from 0 to 1]}`; that they fit the adapter is checked when it is loaded."""
    if value is None:
        return None
    if isinstance(value, dict) and value.keys() == {"group", "weights"}:
        group, weights = value["group"], value["weights"]
        numbers = isinstance(weights, list) and 0 < len(weights) <= 4096
        if (
            type(group) is int
            and 0 <= group < 2**31
            and numbers
            and all(type(w) in (int, float) and 0 <= w <= 1 for w in weights)
        ):
            return Route(group, tuple(float(w) for w in weights))
    raise InvalidRequestError('`pinned` must be {"group": integer, "weights": [numbers from 0 to 1]}.', "pinned")


def _message(item: Any) -> Message:
    if not isinstance(item, dict) or not item.keys() <= _MESSAGE_FIELDS:
        raise InvalidRequestError(
            "A message must be an object with `role` and `content`, and no unknown field.", "messages"
        )
    role = item.get("role")
    if role in ("tool", "function") or item.get("tool_calls") or item.get("function_call"):
        raise InvalidRequestError("Tool messages are not supported by this server.", "messages")
    if item.get("audio") is not None:
        raise InvalidRequestError("Audio is not supported by this server.", "messages")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequestError("A message's `role` must be system, developer, user or assistant.", "messages")
    name = item.get("name")
    if name is not None and not isinstance(name, str):
        raise InvalidRequestError("A message's `name` must be a string.", "messages")
    return Message(_ROLES[role], _content(item.get("content")), name)


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequestError("A message's `content` must be a string or a list of text parts.", "messages")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise InvalidRequestError(
                "Only text parts are supported: images, audio, video and files are not.", "messages"
            )
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise InvalidRequestError('A text part must be {"type": "text", "text": string}.', "messages")
        texts.append(part["text"])
    return "\n".join(texts)
