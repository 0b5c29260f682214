"""From a request to its typed body, leaving in `state.ignored` what was taken without being acted upon."""

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from starlette.requests import Request

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.api.conversation import Echoed, ForeignPart, Unspoken
from tucka_runtime.server.api.values import Body
from tucka_runtime.server.http.body import read_json
from tucka_runtime.server.service.service import Service

IGNORED_HEADER = "x-tucka-ignored"
SHOWN = 32  # names in that header
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

# Fields of other servers for what has another name here.
_ELSEWHERE = {
    "adapter_id": "Name the adapter in `model`.",
    "lora_path": "Name the adapter in `model`.",
    "previous_response_id": "No answer is kept: send the whole conversation in `input`.",
    "conversation": "None is kept: send all of it in `input`.",
    "max_tokens": "Send `max_output_tokens`.",
    "max_completion_tokens": "Send `max_output_tokens`.",
    "response_format": "Send `text` with a `format`.",
}

# Lists whose items differ by a field, and what `_SENTENCES` calls that.
_TAGS = {"messages": "role", "input": "item"}

# What pydantic's messages would repeat of the input, or say of its own inside.
_SENTENCES = {
    "role": "A message's `role` must be system, developer, user or assistant, or in chat tool or function",
    "item": "An item must be a message with `role` and `content`, or of the `type` function_call, function_call_output "
    "or reasoning: an item_reference needs answers that were kept, and others tools that this server does not have",
    "content": "A message's `content` must be a string or a list of text parts: images, audio, video and files are not "
    "supported",
    "prompt": "It must be a non-empty string, a list of such strings, a list of token ids, or a list of such lists",
    "input": "It must be a non-empty string or a non-empty list: of items for a response, of strings or token ids to "
    "embed",
    "messages": "It must be a non-empty list of objects, each with `role` and `content`",
    "stop": "It must be a string or a list of at most 16 strings, of 1 to 1024 characters each",
    "response_format": 'It must be {"type": "text"}, {"type": "json_object"} or '
    '{"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}',
    "format": 'It must be {"type": "text"}, {"type": "json_object"} or '
    '{"type": "json_schema", "name": …, "schema": {…}}',
}

B = TypeVar("B", bound=Body)


async def read_body(http: Request, kind: type[B]) -> B:
    """The request's body as `kind`. Raises InvalidRequestError, BodyTooLargeError, ClientDisconnect."""
    return accept(http, kind, await read_json(http))


def query_of(http: Request, kind: type[Body]) -> dict[str, bool | int | str]:
    """The query as a body of that kind would say it. Raises InvalidRequestError."""
    texts = {name for name, field in kind.model_fields.items() if _is_text(field.annotation)}
    pairs = http.query_params.multi_items()
    query = {key: text if key in texts else _value(text) for key, text in pairs}
    if len(query) != len(pairs):
        raise InvalidRequestError("The query names the same parameter twice. Send every one once.")
    return query


def _is_text(annotation: Any) -> bool:
    return annotation is str or any(_is_text(part) for part in get_args(annotation))


def _value(text: str) -> bool | int | str:
    if re.fullmatch(r"[0-9]{1,9}", text):
        return int(text)
    return {"true": True, "false": False}.get(text, text)


def accept(http: Request, kind: type[B], value: dict[str, Any]) -> B:
    """What a request says, as `kind`; notes for the answer which of it has no effect. Raises InvalidRequestError."""
    service: Service = http.app.state.service
    body = parse(kind, value)
    ignored = sorted(ignored_names(body))
    if ignored and service.config.strict:
        raise InvalidRequestError(
            f"Fields that are unknown, or without effect, are refused by this server, which was started with --strict: "
            f"{shown(ignored)}. Leave them out.",
            ignored[0] if ignored[0] != "?" else None,
        )
    http.state.ignored = ignored
    return body


def parse(kind: type[B], body: dict[str, Any]) -> B:
    """The body as `kind`. Raises InvalidRequestError naming the first field that is wrong."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _error(kind, error) from None


def ignored_names(body: Body) -> set[str]:
    """The fields that were sent and have no effect, at every level: `user`, `tools`, and with their places those
    inside; `?` for one whose name is not printable. A null is as if the field were not there."""
    found: set[str] = set()
    _note_ignored(body, "", found)
    return found


def _note_ignored(body: Body, place: str, found: set[str]) -> None:
    """Looks at nothing but what was sent, by pydantic's slots: a conversation has many messages."""
    kind, sent = type(body), body.__pydantic_fields_set__
    if kind.named_by is not None:
        left_out: str = getattr(body, kind.named_by)
        found.add(place + left_out if _NAME.fullmatch(left_out) else "?")
        return
    if extra := body.__pydantic_extra__:
        for name, value in extra.items():
            if value is not None:
                found.add(place + name if _NAME.fullmatch(name) else "?")
    if not kind.ignored.isdisjoint(sent):
        found.update(place + name for name in kind.ignored & sent if getattr(body, name) is not None)
    for name in kind.nested:
        if name not in sent:
            continue
        value = getattr(body, name)
        if isinstance(value, Body):
            _note_ignored(value, f"{place}{name}.", found)
        elif isinstance(value, list):
            within = f"{place}{name}."
            for item in value:
                _note_ignored(item, within, found)


def shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _error(kind: type[Body], error: ValidationError) -> InvalidRequestError:
    """Of the faults found the deepest: where a field may be of several types that is the one which fits best."""
    found = max(
        error.errors(include_url=False, include_context=False, include_input=False), key=lambda e: len(e["loc"])
    )
    param = str(found["loc"][0])
    if param in kind.ignored:
        elsewhere = _ELSEWHERE.get(param, "Leave the field out.")
        return InvalidRequestError(f"`{param}`: what it asks for is not supported by this server. {elsewhere}", param)
    if found["type"] == "missing" and len(found["loc"]) == 1:
        return InvalidRequestError(f"The field `{param}` is required.", param)
    if param == "model" and found["type"] == "string_too_short":
        return InvalidRequestError("`model` is empty. GET /v1/models lists what it can be.", param)
    place, names = _place(found["loc"])
    if found["type"].startswith("union_tag") and names[-1] in _TAGS:
        names.append(_TAGS[names[-1]])
    if len(names) > 1 and names[-1] in _NESTED_IGNORED:
        return InvalidRequestError(f"`{place}`: what it asks for is not supported by this server.", param)
    sentence = kind.sentences.get(names[-1]) or _SENTENCES.get(names[-1], found["msg"])
    return InvalidRequestError(f"`{place}`: {sentence}.", param)


def _place(loc: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """Where a fault is, as `messages[3].content`, and the names on the way. Left out are the parts that pydantic adds
    for the type that it tried (after a list's index it is the item's), and keys of the client's own choosing."""
    place, names = str(loc[0]), [str(loc[0])]
    for before, part in pairwise(loc):
        if isinstance(part, int):
            place += f"[{part}]"
        elif isinstance(before, str) and part in _declared() and part != names[-1]:
            place, names = f"{place}.{part}", [*names, part]
    return place, names


def _subclasses(kind: type[Body]) -> Iterator[type[Body]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from _subclasses(sub)


@cache
def _declared() -> frozenset[str]:
    """The names of all fields of all bodies, once every door has been imported."""
    return frozenset(name for kind in _subclasses(Body) for name in kind.model_fields) | {"schema"}


_NESTED_IGNORED = Echoed.ignored | Unspoken.ignored | ForeignPart.ignored | {"include_obfuscation"}
