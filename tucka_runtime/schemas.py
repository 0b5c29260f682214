"""JSON schemas as pydantic, zod, TypeBox and people write them, put into the words that llguidance follows. No torch.

What can be said in those words is said in them, meaning the same. What a grammar cannot follow is refused with its
place as a JSON pointer: that items differ from each other, how many of them are of a kind, what depends on a value
beside it.
"""

import re
from collections.abc import Iterator
from itertools import permutations
from typing import Any

MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
SINGLE = frozenset(
    {"items", "additionalProperties", "additionalItems", "not", "propertyNames", "unevaluatedProperties"}
)
"""Keywords that hold schemas: by name, in a list, or one."""
DEEPEST = 64
FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri unknown".split())
"""Formats that llguidance follows. Others are notes to the reader, as JSON Schema has it."""
TYPES = ("null", "boolean", "number", "string", "array", "object")
MOST_UNIQUE = 4  # values whose orders are written out, 64 of them
_NAME = re.compile(r"[A-Za-z0-9_$-]{1,64}")
_DEPENDS = "what depends on a value beside it cannot be followed token by token; use `anyOf`"
_COUNTS = "how many items are of a kind cannot be followed token by token"
UNFOLLOWABLE = {
    "if": _DEPENDS,
    "dependentSchemas": _DEPENDS,
    "dependentRequired": _DEPENDS,
    "dependencies": _DEPENDS,
    "contains": _COUNTS,
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
    return _Rewriter(schema).schema(schema, ())


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


class _Rewriter:
    def __init__(self, root: Any):
        self.root = root

    def schema(self, value: Any, path: Path) -> Any:
        if not isinstance(value, dict):
            return value
        if len(path) > 2 * DEEPEST:
            raise UnfollowableError("it is nested too deeply", path[:8])
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
        if made.get("contains") is not None and made.get("minContains") == 0 and "maxContains" not in made:
            del made["contains"], made["minContains"]
        if "contains" not in made:
            made.pop("minContains", None)
            made.pop("maxContains", None)
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
        own = self._values(made)
        if own is not None and (excluded := self._values(other)) is not None and other.keys() <= {"const", "enum"}:
            made.pop("const", None)
            made["enum"] = [value for value in own if value not in excluded]
            return not made["enum"]
        if isinstance(other, dict) and other.keys() == {"type"} and "integer" not in (kinds := _list(other["type"])):
            allowed = [kind for kind in _list(made.get("type", list(TYPES))) if kind not in kinds]
            made["type"] = [kind for kind in allowed if not (kind == "integer" and "number" in kinds)]
            return not made["type"]
        raise UnfollowableError(
            "`not`: what an answer is not can be followed for a type, and for values of an `enum`, alone", path
        )

    def _target(self, value: Any) -> Any:
        """What a `$ref` within the schema leads to, if it is one."""
        for _ in range(DEEPEST):
            reference = value.get("$ref") if isinstance(value, dict) else None
            if not isinstance(reference, str) or not reference.startswith("#/"):
                break
            found = self.root
            for part in reference[2:].split("/"):
                found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
            value = found
        return value


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
