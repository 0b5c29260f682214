"""Schemas as pydantic, zod, zod-to-json-schema and TypeBox made them (tests/schemas): all can be followed but what no
grammar can, which is refused with its place, and whatever is said under one of them is of it."""

import json
import random
import time
from functools import cache
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from tests.support import ROOT
from tucka_runtime.embedded import FOLDER
from tucka_runtime.grammars import LIMITS, UnusableError, of_schema
from tucka_runtime.schemas import followable
from tucka_runtime.tokenizer import Tokenizer

SETS = {path.stem: json.loads(path.read_text())["schemas"] for path in (ROOT / "tests" / "schemas").glob("*.json")}
SCHEMAS = {f"{made}/{name}": schema for made, schemas in SETS.items() for name, schema in schemas.items()}
REFUSED = {
    "pydantic/Collections": ("uniqueItems", "#/properties/unique"),
    "typebox/Arrays": ("uniqueItems", "#/properties/u"),
    "zod-to-json-schema/refined": ("nothing can match", "#/properties/s/allOf/0"),
    "zod-to-json-schema/set": ("uniqueItems", "#/properties/tags"),
}


@cache
def tokens() -> tuple[Tokenizer, LLTokenizer]:
    tokenizer = Tokenizer.load(FOLDER / "base")
    assert tokenizer is not None
    return tokenizer, LLTokenizer(tokenizer.serialised, eos_token=sorted(tokenizer.ends))


def refusal(schema: Any) -> str | None:
    """Why a schema cannot be used; None if it can."""
    try:
        of_schema(json.dumps(schema))
    except UnusableError as error:
        return str(error)
    return None


def said(schema: Any, seed: int, most: int = 1200) -> str | None:
    """What somebody says who draws from what is allowed, and rather ends than goes on; None if it does not end."""
    tokenizer, known = tokens()
    closing = {tokenizer.encode(char, False)[0] for char in '"}]'} | set(tokenizer.ends)
    matcher = LLMatcher(known, of_schema(json.dumps(schema)), log_level=0, limits=LIMITS)
    chance, ids = random.Random(seed), []
    for _ in range(most):
        allowed = [i for i, bias in enumerate(matcher.compute_logit_bias()) if bias]
        assert allowed and not matcher.is_error()
        ends = [i for i in allowed if i in closing]
        ids.append(chance.choice(ends if ends and chance.random() < 0.4 else allowed))
        matcher.consume_token(ids[-1])
        if matcher.is_stopped() or ids[-1] in tokenizer.ends:
            return tokenizer.decode(ids, skip_special_tokens=True)
    return None


def test_there_are_enough() -> None:
    assert len(SCHEMAS) >= 100 and set(SETS) == {"pydantic", "zod", "zod-to-json-schema", "typebox"}


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_a_schema_as_it_is_made(name: str) -> None:
    schema = SCHEMAS[name]
    reason = refusal(schema)
    if name in REFUSED:
        word, place = REFUSED[name]
        assert reason is not None and word in reason and f"(at `{place}`)" in reason
        return
    assert reason is None
    if name.endswith("/formats2"):
        del schema["properties"]["emoji"]["pattern"]  # Python's re has no \p
    if name.endswith("/openai"):
        schema["$schema"] = "http://json-schema.org/draft-04/schema#"  # which it is: `exclusiveMinimum` is true
    answers = [answer for seed in range(3) if (answer := said(schema, seed)) is not None]
    for answer in answers:
        jsonschema.validate(json.loads(answer, strict=False), schema)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "array", "items": {"enum": ["a", 1]}, "uniqueItems": True}, ["a", 1], [1, 1]),
        ({"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "minItems": 2}, [True, False], [True]),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "maxItems": 1}, [3], [3, 4]),
        ({"propertyNames": {"$ref": "#/$defs/N"}, "$defs": {"N": {"enum": ["x"]}}}, {"x": 1}, {"y": 1}),
        ({"propertyNames": {"pattern": "^x"}, "additionalProperties": {"const": 2}}, {"xy": 2}, {"y": 2}),
        ({"type": "string", "pattern": "^(?=.*[0-9])(?=.*[a-z])[0-9a-z]{3,}$"}, "ab1", "abc"),
        ({"not": {"type": ["null", "number"]}}, "x", 1),
        ({"type": ["integer", "string"], "not": {"type": "number"}}, "x", 1),
        ({"enum": ["a", "b"], "not": {"const": "b"}}, "a", "b"),
        ({"type": "object", "properties": {"a": {"not": {}}, "b": {"const": 1}}}, {"b": 1}, {"a": 1}),
        (
            {"type": "object", "unevaluatedProperties": False, "allOf": [
                {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
                {"type": "object", "properties": {"b": {"const": 2}}}]},
            {"a": 1, "b": 2}, {"a": 1, "c": 3},
        ),
        ({"type": "string", "format": "no-such"}, "x", 1),
        ({"type": "array", "contains": {"const": 1}, "minContains": 0}, [2], {}),
        ({"then": {"const": 1}, "const": 2}, 2, 1),
        ({"type": "string", "not": {"const": "it"}}, "i", "it"),
        ({"type": "string", "not": {"enum": ["it", "its", "", "a.b"]}}, "itsy", "its"),
        ({"type": "string", "not": {"enum": ["it", "its", "", "a.b"]}}, "a-b", ""),
        ({"type": "string", "not": {"enum": ["it", "its", "", "a.b"]}, "maxLength": 3}, "a.", "a.bc"),
        ({"type": "integer", "not": {"enum": [5, 7, 7.5]}}, 6, 7),
        ({"type": "number", "not": {"const": 1}, "maximum": 3}, 1.5, 1),
        ({"not": {"enum": [None, True, "x", 2]}}, False, True),
        ({"not": {"enum": [None, True, "x", 2]}}, [2], 2),
        ({"type": "null", "not": {"const": False}}, None, False),
        ({"type": "array", "items": {"type": "integer"}, "contains": {"const": 1}}, [2, 3, 1, 4], [2, 3]),
        ({"type": "array", "contains": {"const": 1}, "minContains": 2, "maxItems": 3}, [0, 1, 1], [1, 0]),
        ({"type": "array", "items": {"type": "number"}, "contains": {"const": 1}, "maxContains": 2}, [2, 1], [1, 1, 1]),
        ({"contains": {"type": "string"}}, ["a"], [1]),
        ({"contains": {"type": "string"}}, 3, []),
        ({"type": "string", "contains": {"const": 1}, "uniqueItems": True}, "x", [1]),
        ({"type": ["array", "null"], "items": False, "contains": {}}, None, [1]),
        ({"type": "array", "contains": {"const": 1}, "minContains": 2.0, "maxItems": 3.0}, [0, 1, 1], [0, 1]),
        ({"type": "array", "minItems": 1.0, "items": {"type": "null"}}, [None], []),
        ({"type": ["array", "null"], "uniqueItems": True, "items": {"type": "boolean"}}, None, [True, True]),
        ({"uniqueItems": True, "items": {"enum": [1]}}, "x", [1, 1]),
        ({"type": "array", "uniqueItems": True, "items": {"const": True, "type": "boolean"}}, [True], [False]),
        ({"type": "array", "uniqueItems": True, "items": {"type": "string", "enum": ["a", 1]}}, ["a"], [1]),
        ({"type": "array", "uniqueItems": True, "items": {"type": ["null", "boolean"]}}, [None, True], [None, None]),
        ({"type": "array", "uniqueItems": True, "items": {"enum": [1, 1.0, True]}}, [1, True], [1, 1]),
        ({"not": {"const": True, "type": "boolean"}}, False, True),
        ({"not": {"const": True, "type": "boolean"}, "type": "boolean"}, False, True),
        ({"enum": [1, True, "a"], "not": {"const": True}}, 1, True),
        ({"enum": [1, "a"], "not": {"const": 1.0}}, "a", 1),
        ({"propertyNames": {"type": "string", "enum": ["a", 1]}}, {"a": 1}, {"b": 1}),
        ({"propertyNames": {"type": "null"}}, {}, {"a": 1}),
    ],
)  # fmt: skip
def test_what_is_put_into_other_words_means_the_same(schema: dict[str, Any], right: object, wrong: object) -> None:
    _, known = tokens()
    tokenizer, _ = tokens()
    for value, accepted in ((right, True), (wrong, False)):
        matcher = LLMatcher(known, of_schema(json.dumps(schema)), log_level=0, limits=LIMITS)
        ids = tokenizer.encode(json.dumps(value), add_special_tokens=False)
        taken = matcher.validate_tokens(ids)
        assert (taken == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()) == accepted
        assert jsonschema.Draft202012Validator(schema).is_valid(value) == accepted


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"properties": {"a": {"items": {"type": "thing"}}}}, "#/properties/a/items"),
        ({"anyOf": [{"type": "string"}, {"type": "string", "pattern": "(?<=a)b"}]}, "#/anyOf/1"),
        ({"$defs": {"N": {"if": {"type": "null"}, "then": {"const": 1}}}, "$ref": "#/$defs/N"}, "#/$defs/N"),
        ({"properties": {"a secret": {"not": {"pattern": "x"}}}}, "#/properties/?"),
        ({"type": "array", "items": {"enum": [1, 2, 3, 4, 5]}, "uniqueItems": True}, "#"),
        ({"type": "array", "items": {"enum": ["a", "bb"], "maxLength": 1}, "uniqueItems": True}, "#"),
        ({"type": "array", "prefixItems": [{}], "items": {"enum": ["a"]}, "uniqueItems": True}, "#"),
        ({"propertyNames": {"enum": ["a"]}, "patternProperties": {"^a": {"type": "null"}}}, "#"),
        ({"propertyNames": {"pattern": "a", "maxLength": 1}}, "#"),
        ({"propertyNames": {"$ref": "#/$defs/N", "maxLength": 1}, "$defs": {"N": {"enum": ["a", "bb"]}}}, "#"),
        ({"properties": {"a": {"type": "array", "minItems": 1.5}}}, "#/properties/a"),
    ],
)
def test_where_it_cannot_be_followed(schema: dict[str, Any], place: str) -> None:
    reason = refusal(schema)
    assert reason is not None and f"(at `{place}`)" in reason


@pytest.mark.parametrize(
    "schema",
    [
        *({"type": "array", "contains": {}, key: "x"} for key in ("minContains", "maxContains", "maxItems")),
        *({"type": "array", "contains": {}, "minContains": count} for count in (-1, 1.5, True, None, 1e300)),
        {"type": "array", "uniqueItems": True, "items": {"enum": [1]}, "maxItems": "x"},
        {"type": "array", "uniqueItems": True, "items": {"enum": 1}},
        {"propertyNames": {"enum": ["a"]}, "properties": []},
        {"propertyNames": {"pattern": "a"}, "patternProperties": []},
        *({"unevaluatedProperties": False, key: 5} for key in ("required", "allOf", "properties")),
        {"type": "string", "allOf": 5, "pattern": "^(?=a)b"},
        {"format": [], "pattern": "(?=a)"},
        {"type": "number", "not": {"const": 1e999}},
    ],
)
def test_what_is_malformed_is_refused(schema: dict[str, Any]) -> None:
    assert refusal(schema) is not None


def test_what_nothing_can_match() -> None:
    assert refusal({"not": {}}) == "nothing can match it (at `#`)"
    assert refusal({"type": "integer", "not": {"const": 1e999}}) is None


@pytest.mark.parametrize("shift", range(4))
def test_a_complaint_that_is_cut_within_a_character_is_one(shift: int) -> None:
    """llguidance cuts what it quotes after 100 bytes, and panics where that is no character's end."""
    schema = {"type": "object", "properties": {"b": {"type": {}}}, "required": [["a" * shift + "\U0001f600" * 60]]}
    assert refusal(schema) is not None


def nested(times: int, **more: Any) -> dict[str, Any]:
    """Arrays that contain such arrays: each is written out in eight ways."""
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(times):
        schema = {"type": "array", "contains": schema, **({"items": schema} if more else {}), **more}
    return schema


SHORT = {"type": "array", "contains": {}, "minContains": 2_000_000}
FEWER = {"type": "array", "contains": {}, "minContains": 2_000}
LONG = [f"{i:03d}" + "x" * 250 for i in range(40)]
OFTEN = {"allOf": [{"not": {"$ref": "#/$defs/L"}}] * 100, "$defs": {"L": {"enum": LONG}}}


@pytest.mark.parametrize(
    "schema", [nested(9), nested(30), nested(9, minItems=1), SHORT, {"anyOf": [FEWER] * 200}, OFTEN]
)
def test_what_a_few_words_ask_for_is_bounded(schema: dict[str, Any]) -> None:
    begin = time.thread_time()
    reason = refusal(schema)
    assert reason is not None and "too large" in reason
    assert time.thread_time() - begin < 1
    assert refusal(nested(2)) is None


def test_a_fault_is_looked_for_in_bounded_time() -> None:
    """What takes long to check is not checked once for every place that the fault may be at."""
    slow = {f"p{i}": {"type": "string", "format": "email"} for i in range(250)}
    begin = time.thread_time()
    reason = refusal({"type": "object", "properties": {**slow, "z": {"type": "string", "pattern": "("}}})
    assert reason is not None and "`pattern`" in reason
    assert time.thread_time() - begin < 1


def test_what_is_no_schema_is_left_as_it_is() -> None:
    for value in (1, "x", None, [], {"properties": [1]}, {"allOf": {"a": 1}}, {"items": 3}, {"$ref": "#/a/b"}):
        assert followable(value) == value
        refusal(value)


A = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"const": 2}}, "required": ["b"]}
C = {"type": "object", "properties": {"c": A}}


@pytest.mark.parametrize(
    ("schema", "right", "closed"),
    [
        (A, {"a": 1}, {"a": 1, "x": 1}),
        ({**A, "additionalProperties": True}, {"a": 1, "x": 1}, None),
        (C, {"c": {"a": 1}}, {"c": {"a": 1, "x": 1}}),
        ({"type": "array", "items": A}, [{"a": 1}], [{"a": 1, "x": 1}]),
        ({"anyOf": [A, B]}, {"b": 2}, {"b": 2, "x": 1}),
        ({"allOf": [A]}, {"a": 1}, {"a": 1, "x": 1}),
        ({"allOf": [A, B]}, {"a": 1, "b": 2}, None),
        ({"allOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}], "$defs": {"A": A, "B": B}}, {"a": 1, "b": 2}, None),
        ({**A, "anyOf": [B, C]}, {"a": 1, "b": 2}, None),
        ({"$ref": "#/$defs/A", "$defs": {"A": A}}, {"a": 1}, {"a": 1, "x": 1}),
        ({"$ref": "#/$defs/A", "properties": {"b": {}}, "$defs": {"A": A}}, {"a": 1, "b": 2}, None),
        ({"type": "object", "properties": {"a": {}}, "required": ["x"]}, {"x": 1}, None),
        ({"type": "object"}, {"x": 1}, None),
        ({"properties": {"not": A}, "not": {"type": "null"}}, {"not": {"a": 1}}, {"not": {"a": 1, "x": 1}}),
    ],
)  # fmt: skip
def test_objects_have_the_fields_that_are_named(schema: dict[str, Any], right: object, closed: object) -> None:
    """Where all that an object is stands at one place; parts of one object stay open, or nothing could be them all."""
    tokenizer, known = tokens()
    for value, accepted in ((right, True), *([] if closed is None else [(closed, False)])):
        assert jsonschema.Draft202012Validator(schema).is_valid(value)
        matcher = LLMatcher(known, of_schema(json.dumps(schema)), log_level=0, limits=LIMITS)
        ids = tokenizer.encode(json.dumps(value), add_special_tokens=False)
        taken = matcher.validate_tokens(ids)
        assert (taken == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()) == accepted
