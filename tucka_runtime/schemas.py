"""JSON schemas as pydantic, zod, TypeBox and people write them, put into the words that llguidance follows. No torch.

What can be said in those words is said in them, meaning the same. What a grammar cannot follow is refused with its
place as a JSON pointer: that items differ from each other, what depends on a value beside it.
"""

import re
from collections.abc import Iterator
from itertools import permutations
from typing import Any

from tucka_runtime.schema_objects import held_to_fields, target
from tucka_runtime.schema_values import TYPES, all_but, is_of

MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
SINGLE = frozenset(
    {"items", "additionalProperties", "additionalItems", "not", "propertyNames", "unevaluatedProperties"}
)
"""Keywords that hold schemas: by name, in a list, or one."""
DEEPEST = 64
MOST_WRITTEN = 20_000  # values in a schema that is written out, and schemas looked at for that: some 50 ms
FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri unknown".split())
"""Formats that llguidance follows. Others are notes to the reader, as JSON Schema has it."""
MOST_UNIQUE = 4  # values whose orders are written out, 64 of them
MOST_BEFORE = 7  # items before those that an array has to contain: each place is a way of its own to write the array
_NAME = re.compile(r"[A-Za-z0-9_$-]{1,64}")
_TOO_LARGE = "it is too large once `contains` and `uniqueItems` are written out"
_DEPENDS = "what depends on a value beside it cannot be followed token by token; use `anyOf`"
UNFOLLOWABLE = {
    "if": _DEPENDS,
    "dependentSchemas": _DEPENDS,
    "dependentRequired": _DEPENDS,
    "dependencies": _DEPENDS,
    "unevaluatedItems": "what no other keyword has looked at cannot be told token by token; use `items`",
}

Path = tuple[str | int, ...]


class UnfollowableError(ValueError):
    """What in a schema cannot be followed, and where."""

    def __init__(self, reason: str, path: Path):
        super().__init__(f"{reason} (at `{pointer(path)}`)")


def pointer(path: Path) -> str:
    """The place as a JSON pointer; `?` stands for a name that is no plain word."""
    return "#" + "".join(f"/{part if _NAME.fullmatch(str(part)) else '?'}" for part in path)


def followable(schema: Any) -> Any:
    """The same schema in words that llguidance follows, as far as they are known here. Raises UnfollowableError."""
    schema = held_to_fields(schema)
    made = _Rewriter(schema).schema(schema, ())
    if _size(made, {}) > MOST_WRITTEN:
        raise UnfollowableError(_TOO_LARGE, ())
    return made


def places(schema: Any, path: Path = ()) -> Iterator[Path]:
    """Where the schemas are that a schema is made of, those that are further in last."""
    if not isinstance(schema, dict):
        return
    children: list[Path] = []
    for key, value in schema.items():
        if key in MAPS and isinstance(value, dict):
            children += [(key, name) for name in value]
        elif key in LISTS and isinstance(value, list):
            children += [(key, i) for i in range(len(value))]
        elif key in SINGLE and isinstance(value, dict):
            children.append((key,))
    yield from ((*path, *child) for child in children)
    for child in children:
        inner = schema
        for part in child:
            inner = inner[part]
        yield from places(inner, (*path, *child))


def _size(value: Any, known: dict[int, int]) -> int:
    """The number of values in one, each counted wherever it stands: what is written out shares its parts. `known` has
    the sizes by id so far."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(each, known) for each in inner)
    return known[id(value)]


class _Rewriter:
    def __init__(self, root: Any):
        self.root = root
        self.looked_at = 0

    def schema(self, value: Any, path: Path) -> Any:
        if not isinstance(value, dict):
            return value
        if len(path) > 2 * DEEPEST:
            raise UnfollowableError("it is nested too deeply", path[:8])
        self.looked_at += 1
        if self.looked_at > MOST_WRITTEN:
            raise UnfollowableError(_TOO_LARGE, path[:8])
        made: dict[str, Any] = {}
        for key, inner in value.items():
            if key in MAPS and isinstance(inner, dict):
                made[key] = {name: self.schema(each, (*path, key, name)) for name, each in inner.items()}
            elif key in LISTS and isinstance(inner, list):
                made[key] = [self.schema(each, (*path, key, i)) for i, each in enumerate(inner)]
            elif key in SINGLE:
                made[key] = self.schema(inner, (*path, key))
            else:
                made[key] = inner
        self._numbers(made)
        self._texts(made, path)
        self._arrays(made, path)
        self._objects(made, path)
        for key in ("then", "else", "if"):
            if key != "if" and "if" not in made:
                made.pop(key, None)
        for key, reason in UNFOLLOWABLE.items():
            if key in made and made[key] not in ({}, True):
                raise UnfollowableError(f"`{key}`: {reason}", path)
            made.pop(key, None)
        return False if self._excludes_all(made, path) else made

    def _numbers(self, made: dict[str, Any]) -> None:
        """Draft 4 says with true that the limit beside it is left out."""
        for limit, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            if made.get(exclusive) is True and limit in made:
                made[exclusive] = made.pop(limit)
            elif isinstance(made.get(exclusive), bool):
                del made[exclusive]

    def _texts(self, made: dict[str, Any], path: Path) -> None:
        """Formats, and patterns that look ahead at their beginning: each look is a pattern of its own."""
        form, pattern = made.get("format"), made.get("pattern")
        if isinstance(form, str) and form not in FORMATS:
            del made["format"]
        if not isinstance(pattern, str) or "(?" not in pattern.replace("(?:", ""):
            return
        if form in FORMATS:  # which says the same, in zod's schemas
            del made["pattern"]
        elif len(parts := list(_looks(pattern))) > 1:
            del made["pattern"]
            made["allOf"] = [*made.get("allOf", []), *({"pattern": part} for part in parts)]

    def _arrays(self, made: dict[str, Any], path: Path) -> None:
        least, most = made.pop("minContains", 1), made.pop("maxContains", None)
        if "contains" in made:
            self._contains(made, made.pop("contains"), least, most, path)
        unique = made.pop("uniqueItems", False)
        most = made.get("maxItems")
        if unique is not True or (isinstance(most, int) and most <= 1):
            return
        values = self._values(made.get("items"))
        if values is None or len(values) > MOST_UNIQUE:
            raise UnfollowableError(
                f"`uniqueItems`: that items differ from each other can be followed among up to {MOST_UNIQUE} given "
                "values alone",
                path,
            )
        least, most = made.pop("minItems", 0), made.pop("maxItems", len(values))
        del made["items"]
        orders = [o for count in range(least, min(most, len(values)) + 1) for o in permutations(values, count)]
        made["enum"] = [list(order) for order in orders]
        made.pop("type", None)

    def _contains(self, made: dict[str, Any], wanted: Any, least: int, most: int | None, path: Path) -> None:
        """The array in all ways that have `least` such items one after the other, with at most MOST_BEFORE before them.
        That is narrower than the keyword: whatever is written is right, but not all that would be right can be."""
        if least == 0 and most is None:
            return
        if most is not None and most < max(1, least):
            raise UnfollowableError("`maxContains`: it allows nothing, or no item of the kind alone", path)
        if "prefixItems" in made or isinstance(made.get("items"), list):
            raise UnfollowableError("`contains`: it can be followed beside `items` for all items alone", path)
        any_item = made.pop("items", True)
        item = any_item if isinstance(any_item, dict) else {}
        kind = self.schema({"allOf": [item, wanted]} if item else wanted, (*path, "contains"))
        other = item if most is None else self.schema({**item, "not": wanted}, (*path, "contains"))
        fewest, longest = made.pop("minItems", 0), made.pop("maxItems", None)
        room = MOST_BEFORE if longest is None else min(MOST_BEFORE, longest - least)
        limit = {} if longest is None else {"maxItems": longest}
        ways = [
            {"type": "array", "prefixItems": [other] * before + [kind] * least, "items": other,
             "minItems": max(fewest, before + least), **limit}
            for before in range(room + 1 if least else 1)
        ]  # fmt: skip
        if "array" not in _list(made.get("type", "array")) or any_item is False or not ways:
            raise UnfollowableError("`contains`: nothing can match", path)
        if made.get("type") != "array":
            others = [kind for kind in _list(made.get("type", list(TYPES))) if kind != "array"]
            ways.append({"type": others})
        made.pop("type", None)
        made["allOf"] = [*made.get("allOf", []), {"anyOf": ways}]

    def _values(self, items: Any) -> list[Any] | None:
        """All values that there are of a schema, where it names them."""
        items = self._target(items)
        if not isinstance(items, dict):
            return None
        if items.get("type") == "boolean":
            return [False, True]
        if "const" in items:
            return [items["const"]]
        found = items.get("enum")
        return found if isinstance(found, list) else None

    def _objects(self, made: dict[str, Any], path: Path) -> None:
        if "unevaluatedProperties" in made:
            self._closed(made, path)
        names = self._target(made.pop("propertyNames", True))
        if names is True or (isinstance(names, dict) and not names.keys() - {"type", "title", "description"}):
            return
        others = made.get("additionalProperties", True)
        known = made.get("properties", {})
        given = self._values(names)
        if given is not None:
            made["properties"] = {name: known.get(name, others) for name in given if isinstance(name, str)}
        elif isinstance(names, dict) and isinstance(names.get("pattern"), str) and not known:
            made["patternProperties"] = {**made.get("patternProperties", {}), names["pattern"]: others}
        else:
            raise UnfollowableError("`propertyNames`: only given names, or one pattern, can be followed", path)
        made["additionalProperties"] = False

    def _closed(self, made: dict[str, Any], path: Path) -> None:
        """`unevaluatedProperties` of objects that are merged: as `additionalProperties` of the merged one."""
        others = made.pop("unevaluatedProperties")
        if others is True or others == {}:
            return
        parts = [made, *map(self._target, made.get("allOf", []))]
        keys = {"type", "properties", "required", "title", "description", "$schema", "$id", "$defs", "allOf"}
        plain = [
            isinstance(part, dict) and not part.keys() - keys and part.get("type", "object") == "object"
            for part in parts
        ]
        if not all(plain) or any("allOf" in part for part in parts[1:]):
            raise UnfollowableError(
                "`unevaluatedProperties`: it can be followed beside plain objects of an `allOf` alone", path
            )
        merged: dict[str, Any] = {}
        for part in parts:
            for name, each in part.get("properties", {}).items():
                merged[name] = {"allOf": [merged[name], each]} if name in merged else each
        required = [name for part in parts for name in part.get("required", [])]
        made.pop("allOf", None)
        if any("type" in part for part in parts):
            made["type"] = "object"
        made |= {"properties": merged, "required": list(dict.fromkeys(required)), "additionalProperties": others}

    def _excludes_all(self, made: dict[str, Any], path: Path) -> bool:
        """Rewrites `not`. True where it leaves nothing."""
        if "not" not in made:
            return False
        other = made.pop("not")
        if other is True or other == {}:
            return True
        if other is False:
            return False
        own, excluded = self._values(made), self._excluded(other)
        if own is not None and excluded is not None:
            made.pop("const", None)
            made["enum"] = [value for value in own if value not in excluded]
            return not made["enum"]
        if isinstance(other, dict) and other.keys() == {"type"} and "integer" not in (kinds := _list(other["type"])):
            allowed = [kind for kind in _list(made.get("type", list(TYPES))) if kind not in kinds]
            made["type"] = [kind for kind in allowed if not (kind == "integer" and "number" in kinds)]
            return not made["type"]
        if excluded is not None:
            if any(isinstance(value, list | dict) for value in excluded):
                raise UnfollowableError("`not`: an array or object that an answer is not cannot be followed", path)
            if not (ways := list(all_but(excluded, _list(made.pop("type", list(TYPES)))))):
                return True
            made["allOf"] = [*made.get("allOf", []), {"anyOf": ways}]
            return False
        raise UnfollowableError("`not`: what an answer is not can be followed for types and for values alone", path)

    def _excluded(self, other: Any) -> list[Any] | None:
        """The values that a schema allows, if it does nothing but name them."""
        other = self._target(other)
        if not isinstance(other, dict) or other.keys() - {"const", "enum", "type", "title", "description"}:
            return None
        values = None if {"const", "enum"} <= other.keys() else self._values(other)
        kinds = _list(other.get("type", list(TYPES)))
        return values and [value for value in values if any(is_of(value, kind) for kind in kinds)]

    def _target(self, value: Any) -> Any:
        return target(self.root, value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _looks(pattern: str) -> Iterator[str]:
    """A pattern as those that a text has to match together: what it looks ahead at where it begins, and the rest."""
    rest = pattern.removeprefix("^")
    if rest == pattern:
        yield pattern
        return
    while rest.startswith("(?="):
        depth, escaped, in_class = 0, False, False
        end = 0
        for char in rest:
            if escaped or char == "\\":
                escaped = not escaped
            elif in_class or char == "[":
                in_class = char != "]"
            elif char in "()":
                depth += 1 if char == "(" else -1
                if not depth:
                    break
            end += 1
        else:
            break
        yield f"^(?:{rest[3:end]})"
        rest = rest[end + 1 :]
    yield f"^{rest}"
