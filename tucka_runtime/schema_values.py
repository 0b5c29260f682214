"""Values as JSON Schema tells them apart, and schemas of all but some of them. No torch."""

import re
from collections.abc import Iterator
from typing import Any

TYPES = ("null", "boolean", "number", "string", "array", "object")


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, as JSON Schema has it."""
    match value:
        case None:
            return bool(kind == "null")
        case bool():
            return bool(kind == "boolean")
        case int() | float():
            return bool(kind == "number" or (kind == "integer" and _whole(value)))
        case str():
            return bool(kind == "string")
        case list():
            return bool(kind == "array")
    return bool(kind == "object")


def frozen(value: Any) -> Any:
    """Something hashable that is equal for values that are equal: 1 is 1.0, and is not true."""
    match value:
        case bool():
            return "boolean", value
        case list():
            return tuple(map(frozen, value))
        case dict():
            return frozenset((name, frozen(each)) for name, each in value.items())
    return value


def named(schema: dict[str, Any]) -> list[Any] | None:
    """All values that `const`, `enum` and `type` allow together, each once; None where there are too many to name."""
    kinds = schema.get("type", list(TYPES))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if {"const", "enum"} <= schema.keys():
        return None
    if "enum" in schema:
        values = schema["enum"]
    elif "const" in schema:
        values = [schema["const"]]
    elif all(kind in ("null", "boolean") for kind in kinds):
        values = [None, False, True]
    else:
        return None
    if not isinstance(values, list):
        return None
    return list({frozen(value): value for value in values if any(is_of(value, kind) for kind in kinds)}.values())


def _whole(value: float) -> bool:
    return isinstance(value, int) or value.is_integer()


def all_but(values: list[Any], kinds: list[Any]) -> Iterator[dict[str, Any]]:
    """Schemas that together are all values of these types but some, none of which is an array or an object."""
    for kind in kinds:
        if kind == "string":
            yield {"type": kind, "pattern": f"^(?:{_no_text_of([v for v in values if isinstance(v, str)])})$"}
        elif kind in ("number", "integer"):
            numbers: list[float] = [v for v in values if type(v) in (int, float) and (kind == "number" or _whole(v))]
            below: float | None = None
            for above in [*sorted(set(numbers)), None]:
                low = {} if below is None else {"exclusiveMinimum": below}
                yield {"type": kind, **low, **({} if above is None else {"exclusiveMaximum": above})}
                below = above
        elif kind == "boolean":
            if left := [v for v in (False, True) if not any(v is value for value in values)]:
                yield {"enum": left}
        elif kind == "null":
            if not any(value is None for value in values):
                yield {"type": kind}
        else:
            yield {"type": kind}


def _no_text_of(texts: list[str]) -> str:
    """A pattern of all texts but these, one character after the other: where they go on, what goes on otherwise."""
    following: dict[str, list[str]] = {}
    for text in texts:
        if text:
            following.setdefault(text[0], []).append(text[1:])
    ways = [re.escape(char) + f"(?:{_no_text_of(rest)})" for char, rest in following.items()]
    others = "".join(re.escape(char) for char in following)
    ways.append(f"[^{others}][\\s\\S]*" if others else "[\\s\\S]+")
    if "" not in texts:
        ways.append("")
    return "|".join(ways)
