"""Bodies as strict JSON: no number, string or depth that would bite later, wherever it stands."""

import json
from typing import Any

import pytest

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.http.body import MAX_DEPTH, parse_json

PLACES = ['{"a": %s}', '{"a": [%s]}', '{"a": [true, %s, "b"]}', '{"a": [{"b": [[%s]]}]}', f'{{"a": [{"7, " * 40}%s]}}']


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("1" + "0" * 20, "digits"),
        ("-1" + "0" * 20, "digits"),
        ("9" * 5000, "digits"),
        ("1e999", "too large"),
        ("-1e999", "too large"),
        ("NaN", "NaN"),
        ("-Infinity", "NaN"),
        ('"\\ud800"', "surrogate"),
        ('{"x": 1, "x": 1}', "twice"),
        ('{"\\udfff": 1}', "surrogate"),
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, "deeper"),
        ("01", "not valid JSON"),
    ],
)
def test_what_would_bite_later_is_refused_wherever_it_stands(place: str, value: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        parse_json((place % value).encode())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [10**20 - 1, 1 - 10**20, -(2**63), 1.5e308, -0.0, True, None, "é😀", {}, []])
def test_all_else_is_taken_as_it_is(place: str, value: Any) -> None:
    text = place % json.dumps(value)
    taken = parse_json(text.encode())
    assert taken == json.loads(text) and repr(taken) == repr(json.loads(text))
