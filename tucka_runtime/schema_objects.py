"""Objects whose schema names their fields and does not say whether there may be others. No torch.

JSON Schema lets them have any others. People who list fields mean those, and a small model that may write on does so
without end; so such an object is held to its fields, as other servers do it. What is written is right by the schema as
it was sent. `"additionalProperties": true` lets others in.
"""

from typing import Any

_IN_PLACE = ("allOf", "anyOf", "oneOf")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_INNER = ("items", "prefixItems", "additionalItems", "additionalProperties", "unevaluatedProperties")
_SAYS = frozenset(
    {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"}
    | {"allOf", "anyOf", "oneOf", "$ref", "not", "if", "dependentSchemas"}
)
"""Keywords beside which `properties` are not all that is known of an object's fields."""
NOTES = frozenset({"title", "description", "default", "examples", "$schema", "$id", "$defs", "definitions"})
_FURTHEST = 64  # references that lead to one another


def held_to_fields(root: Any) -> Any:
    """The same schema, with the objects closed that say nothing of further fields and are what they are by themselves:
    the parts of one object that several schemas describe together stay open, or none of them could be met."""
    return _Closing(root).copy(root)


def target(root: Any, value: Any) -> Any:
    """What a `$ref` within the schema leads to, if `value` is one and says nothing more."""
    for _ in range(_FURTHEST):
        reference = value.get("$ref") if isinstance(value, dict) and value.keys() - NOTES == {"$ref"} else None
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            break
        found = root
        for part in reference.split("/")[1:]:
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        value = found
    return value


class _Closing:
    def __init__(self, root: Any):
        self._root = root
        self._seen: set[tuple[int, bool]] = set()
        self._look(root, False)

    def _look(self, value: Any, part: bool) -> None:
        """Notes which schemas are a part of what an object has to be, wherever they stand."""
        if not isinstance(value, dict) or (id(value), part) in self._seen:
            return
        self._seen.add((id(value), part))
        beside = value.keys() - NOTES - {"type"}
        for key in _IN_PLACE:
            if isinstance(value.get(key), list):
                several = len(beside) > 1 or (key == "allOf" and len(value[key]) > 1)
                for each in value[key]:
                    self._look(each, part or several)
        if "$ref" in value:
            alone = {"$ref": value["$ref"]}
            leads_to = target(self._root, alone)
            if leads_to is not alone:
                self._look(leads_to, part or len(beside) > 1)
        for key in _MAPS:
            if isinstance(value.get(key), dict):
                for each in value[key].values():
                    self._look(each, False)
        for key in _INNER:
            for each in value[key] if isinstance(value.get(key), list) else [value.get(key)]:
                self._look(each, False)

    def copy(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        made = dict(value)
        for key in _MAPS:
            if isinstance(value.get(key), dict):
                made[key] = {name: self.copy(each) for name, each in value[key].items()}
        for key in (*_IN_PLACE, *_INNER):
            if isinstance(value.get(key), list):
                made[key] = [self.copy(each) for each in value[key]]
            elif key in value:
                made[key] = self.copy(value[key])
        if (id(value), True) not in self._seen and _names_all(value):
            made["additionalProperties"] = False
        return made


def _names_all(value: dict[str, Any]) -> bool:
    fields, required = value.get("properties"), value.get("required", [])
    if not isinstance(fields, dict) or not fields or value.keys() & _SAYS or not isinstance(required, list):
        return False
    kind = value.get("type", "object")
    return kind == "object" and all(isinstance(name, str) and name in fields for name in required)
