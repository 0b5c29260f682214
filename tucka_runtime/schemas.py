"""JSON schemas as pydantic, zod, TypeBox and people write them, put into the words that llguidance follows. No torch.

What can be said in those words is said in them, meaning the same. What a grammar cannot follow is refused with its
place as a JSON pointer: that items differ from each other, what depends on a value beside it.
"""

import re
from collections.abc import Iterator
from itertools import permutations
from typing import Any

from tucka_runtime.schema_objects import NOTES, held_to_fields, target
from tucka_runtime.schema_values import TYPES, all_but, frozen, named

MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
SINGLE = frozenset(
    {"items", "additionalProperties", "additionalItems", "not", "propertyNames", "unevaluatedProperties"}
)
"""Keywords that hold schemas: by name, in a list, or one."""
DEEPEST = 64
MOST_WRITTEN = 20_000  # values in a schema that is written out, and schemas and values looked at for that: some 50 ms
VALUES = frozenset({"const", "enum", "type"})
"""Keywords that may be all that a schema says, where it names its values."""
FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri unknown".split())
"""Formats that llguidance follows. Others are notes to the reader, as JSON Schema has it."""
PATTERN_CHARS = 50  # that count as one value
MOST_UNIQUE = 4  # values whose orders are written out, 64 of them
MOST_BEFORE = 7  # items before those that an array has to contain: each place is a way of its own to write the array
COUNTS = tuple(f"{end}{what}" for what in ("Items", "Contains", "Length", "Properties") for end in ("min", "max"))
_NAME = re.compile(r"[A-Za-z0-9_$-]{1,64}")
_TOO_LARGE = "it is too large once `contains`, `uniqueItems` and `not` are written out"
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
        self.written = 0

    def _spend(self, values: int, path: Path) -> None:
        """Notes that so many more values are to be written or looked at, before they are."""
        self.written += values
        if self.written > MOST_WRITTEN:
            raise UnfollowableError(_TOO_LARGE, path[:8])

    def schema(self, value: Any, path: Path) -> Any:
        if not isinstance(value, dict):
            return value
        if len(path) > 2 * DEEPEST:
            raise UnfollowableError("it is nested too deeply", path[:8])
        self._spend(1, path)
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
        self._numbers(made, path)
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

    def _numbers(self, made: dict[str, Any], path: Path) -> None:
        """Counts, which may be written as `1.0`; and draft 4 says with true that the limit beside it is left out."""
        for key in COUNTS:
            count = made.get(key, 0)
            if isinstance(count, float) and count.is_integer():
                count = made[key] = int(count)
            if type(count) is not int or count < 0:
                raise UnfollowableError(f"`{key}`: it must be a whole number, 0 or more", path)
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
        said = {key: made.pop(key) for key in ("contains", "minContains", "maxContains", "uniqueItems") if key in made}
        if "array" not in _list(made.get("type", "array")):
            return
        least, most = said.get("minContains", 1), said.get("maxContains")
        if "contains" in said and (least or most is not None):
            self._contains(made, said["contains"], least, most, path)
        if said.get("uniqueItems") is True and made.get("maxItems", 2) > 1:
            self._unique(made, path)

    def _unique(self, made: dict[str, Any], path: Path) -> None:
        values = None if "prefixItems" in made else self._values(made.pop("items", None))
        if values is None or len(values) > MOST_UNIQUE:
            raise UnfollowableError(
                f"`uniqueItems`: that items differ from each other can be followed among up to {MOST_UNIQUE} given "
                "values alone",
                path,
            )
        least, most = made.pop("minItems", 0), made.pop("maxItems", len(values))
        counts = range(least, min(most, len(values)) + 1)
        orders = [list(order) for count in counts for order in permutations(values, count)]
        self._spend(len(orders), path)
        self._be(made, [{"enum": orders}] if orders else [], "uniqueItems", path)

    def _contains(self, made: dict[str, Any], wanted: Any, least: int, most: int | None, path: Path) -> None:
        """The array in all ways that have `least` such items one after the other, with at most MOST_BEFORE before them.
        That is narrower than the keyword: whatever is written is right, but not all that would be right can be."""
        if most is not None and most < max(1, least):
            raise UnfollowableError("`maxContains`: it allows nothing, or no item of the kind alone", path)
        if "prefixItems" in made or isinstance(made.get("items"), list):
            raise UnfollowableError("`contains`: it can be followed beside `items` for all items alone", path)
        any_item = made.pop("items", True)
        kind = {"allOf": [any_item, self.schema(wanted, (*path, "contains"))]}
        other = any_item
        if most is not None:
            other = {"allOf": [any_item, self.schema({"not": wanted}, (*path, "contains"))]}
        fewest, longest = made.pop("minItems", 0), made.pop("maxItems", None)
        room = MOST_BEFORE if longest is None else min(MOST_BEFORE, longest - least)
        befores = range(room + 1 if least else 1)
        self._spend(sum(before + least for before in befores), path)
        limit = {} if longest is None else {"maxItems": longest}
        ways = [
            {"type": "array", "prefixItems": [other] * before + [kind] * least, "items": other,
             "minItems": max(fewest, before + least), **limit}
            for before in befores
        ]  # fmt: skip
        self._be(made, ways, "contains", path)

    def _be(self, made: dict[str, Any], ways: list[dict[str, Any]], keyword: str, path: Path) -> None:
        """Lets a value be an array in one of these ways, or of another type that it may be of."""
        if others := [kind for kind in _list(made.pop("type", list(TYPES))) if kind != "array"]:
            ways = [*ways, {"type": others}]
        if not ways:
            raise UnfollowableError(f"`{keyword}`: nothing can match", path)
        made["allOf"] = [*made.get("allOf", []), {"anyOf": ways}]

    def _values(self, schema: Any) -> list[Any] | None:
        """All values that a schema allows, if it does nothing but name them."""
        schema = self._target(schema)
        return named(schema) if isinstance(schema, dict) and not schema.keys() - NOTES - VALUES else None

    def _objects(self, made: dict[str, Any], path: Path) -> None:
        if "unevaluatedProperties" in made:
            self._closed(made, path)
        names = self._target(made.pop("propertyNames", True))
        kinds = _list(names.get("type", "string")) if isinstance(names, dict) else []
        said = names.keys() - NOTES - {"type"} if "string" in kinds else None
        if names is True or said == set():
            return
        others, known = made.get("additionalProperties", True), made.get("properties", {})
        given, alone = self._values(names), "patternProperties" not in made
        if given is not None and alone:
            made["properties"] = {name: known.get(name, others) for name in given if isinstance(name, str)}
        elif said == {"pattern"} and isinstance(names["pattern"], str) and not known and alone:
            made["patternProperties"] = {names["pattern"]: others}
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
        own, excluded = named({key: made[key] for key in VALUES & made.keys()}), self._values(other)
        if excluded is not None:
            self._spend(len(excluded), path)
        if own is not None and excluded is not None:
            made.pop("const", None)
            out = set(map(frozen, excluded))
            made["enum"] = [value for value in own if frozen(value) not in out]
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
            self._spend(sum(len(way.get("pattern", "")) for way in ways) // PATTERN_CHARS, path)
            made["allOf"] = [*made.get("allOf", []), {"anyOf": ways}]
            return False
        raise UnfollowableError("`not`: what an answer is not can be followed for types and for values alone", path)

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
