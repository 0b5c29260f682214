"""Numbers without a fraction are integers, as JSON Schema has it, and so /openapi.json; others are none, and none is a
boolean."""

from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from tests.support.servers import Server
from tucka_runtime.server.api import app
from tucka_runtime.server.api.values import Body

ASK = {"model": "llama-tiny", "prompt": "hi", "max_tokens": 3, "temperature": 0}


@pytest.mark.parametrize(
    ("field", "value", "integers"),
    [
        ("n", 2.0, 2), ("max_tokens", 3.0, 3), ("seed", -5.0, -5), ("top_k", -1.0, -1), ("logprobs", 1.0, 1),
        ("min_tokens", -0.0, 0), ("stop_token_ids", [7.0, 8], [7, 8]), ("allowed_token_ids", [70.0], [70]),
        ("prompt", [5.0, 6.0], [5, 6]), ("prompt", [[5.0], [6]], [[5], [6]]), ("truncate_prompt_tokens", 2.0, 2),
    ],
)  # fmt: skip
def test_an_integral_number_is_that_integer(live: Server, field: str, value: object, integers: object) -> None:
    said, meant = (live.post("/v1/completions", ASK | {field: each}) for each in (value, integers))
    assert said.status_code == 200, said.text
    assert said.json()["choices"] == meant.json()["choices"]
    for wrong in (1.5, [1.5], [[1.5]], 1e300, [1e300], True, [True], ["1", 1]):
        answer = live.post("/v1/completions", ASK | {field: wrong})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == field, wrong


@pytest.mark.parametrize(("field", "value"), [("use_beam_search", 0), ("images", 0.0), ("detokenize", 1)])
def test_a_number_is_no_boolean(live: Server, field: str, value: object) -> None:
    assert live.post("/v1/completions", ASK | {field: bool(value)}).status_code == 200
    answer = live.post("/v1/completions", ASK | {field: value})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field


def kinds(kind: type[Body]) -> Iterator[type[Body]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from kinds(sub)


def faults(kind: type[Body], field: str, value: object) -> list[str]:
    try:
        kind.model_validate({field: value})
    except ValidationError as error:
        return [each["type"] for each in error.errors() if each["loc"][0] == field]
    return []


def test_no_integer_of_any_body_is_forgotten() -> None:
    assert app.create_app, "every door has been imported"
    found = 0
    for kind in set(kinds(Body)):
        for field, schema in kind.model_json_schema().get("properties", {}).items():
            if any(one.get("type") == "integer" for one in (schema, *schema.get("anyOf", ()))):
                found += 1
                assert not faults(kind, field, 1.0), (kind, field)
                assert faults(kind, field, 0.5), (kind, field)
    assert found > 50
