"""What an answer is held to, by vLLM's and SGLang's names: a random model says what it has to, whole."""

import json
import re
from typing import Any

import jsonschema
import pytest

from tests.support import ROOT
from tests.support.servers import Server

ONE = {"const": [1]}
DATE = "[0-9]{4}-(0[1-9]|1[0-2])"
WORDS = ["yes", "no", 'a "quoted"\nword', "naïve"]
GBNF = 'root ::= "(" [a-c] ("," [a-c])? ")"'
LARK = 'start: "<" WORD ">"\nWORD: /[xy]{2}/'


def said(live: Server, model: str, fields: dict[str, Any]) -> str:
    body = {"model": model, "prompt": "Hello", "max_tokens": 120, "seed": 3, **fields}
    answer = live.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["text"]


@pytest.mark.parametrize("model", ["llama-tiny", "one"])
@pytest.mark.parametrize("value", [ONE, json.dumps(ONE)])
@pytest.mark.parametrize("name", ["guided_json", "json_schema", "json"])
def test_schemas_as_objects_and_as_texts(live: Server, model: str, name: str, value: object) -> None:
    fields = {"structured_outputs": {"json": value}} if name == "json" else {name: value}
    assert json.loads(said(live, model, fields)) == [1]


@pytest.mark.parametrize("fields", [{"guided_regex": DATE}, {"regex": DATE}, {"structured_outputs": {"regex": DATE}}])
def test_regular_expressions_match_from_begin_to_end(live: Server, fields: dict[str, Any]) -> None:
    assert re.fullmatch(DATE, said(live, "one", fields))


@pytest.mark.parametrize("fields", [{"guided_choice": WORDS}, {"structured_outputs": {"choice": WORDS}}])
def test_choices(live: Server, fields: dict[str, Any]) -> None:
    assert {said(live, "one", fields | {"seed": seed}) for seed in range(6)} <= set(WORDS)


@pytest.mark.parametrize("text", WORDS)
def test_a_choice_of_one(live: Server, text: str) -> None:
    assert said(live, "one", {"guided_choice": [text]}) == text


@pytest.mark.parametrize("field", ["guided_grammar", "ebnf", "grammar"])
def test_grammars_in_gbnf_and_in_lark(live: Server, field: str) -> None:
    for text, form in ((GBNF, r"\([a-c](,[a-c])?\)"), (LARK, "<[xy]{2}>")):
        fields = {"structured_outputs": {"grammar": text}} if field == "grammar" else {field: text}
        assert re.fullmatch(form, said(live, "one", fields))


@pytest.mark.parametrize("made", ["pydantic/Enums", "zod/records", "zod-to-json-schema/unions", "typebox/Evaluated"])
def test_schemas_as_libraries_make_them(live: Server, made: str) -> None:
    library, name = made.split("/")
    schema = json.loads((ROOT / "tests" / "schemas" / f"{library}.json").read_text())["schemas"][name]
    form = {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}
    body = {"model": "one", "prompt": "Hello", "max_tokens": 200, "seed": 5, "response_format": form}
    choice = live.post("/v1/completions", body).raise_for_status().json()["choices"][0]
    if choice["finish_reason"] == "stop":
        jsonschema.validate(json.loads(choice["text"]), schema)
    assert choice["text"].lstrip().startswith("{")


def test_in_chat(live: Server) -> None:
    body = {"model": "one", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 120, "guided_regex": DATE}
    answer = live.post("/v1/chat/completions", body).json()
    assert re.fullmatch(DATE, answer["choices"][0]["message"]["content"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "(a+"}, "guided_regex"),
        ({"guided_regex": "(?=a)b"}, "guided_regex"),
        ({"regex": "a" * 16_385}, "regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a" * 1000] * 20}, "guided_choice"),
        ({"guided_grammar": "junk junk"}, "guided_grammar"),
        ({"guided_grammar": "root ::= missing"}, "guided_grammar"),
        ({"ebnf": 'start: "a" missing'}, "ebnf"),
        ({"guided_json": "no schema"}, "guided_json"),
        ({"json_schema": {"not": {}}}, "json_schema"),
        ({"json_schema": {"items": {"type": "array", "uniqueItems": True}}}, "json_schema"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(live: Server, fields: dict[str, Any], param: str) -> None:
    answer = live.post("/v1/completions", {"model": "one", "prompt": "Hello", "max_tokens": 4, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
