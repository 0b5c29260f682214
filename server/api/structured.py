"""What an answer has to match, by every name that clients have for it: OpenAI's `response_format`, or the `format` of a
response's text, vLLM's `structured_outputs` and `guided_*`, SGLang's `json_schema`, `regex` and `ebnf`. It comes out as
one grammar.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from tucka_runtime import grammars
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.api.bodies import FormatFields, JsonObjectFormat, JsonSchema, JsonSchemaFormat, TextFormat
from tucka_runtime.server.service.service import Service

ANY_OBJECT: dict[str, Any] = {"type": "object"}
MAX_GRAMMAR_CHARS = 16_384  # of a schema made to take long, compiled in 0.2 s on the step loop


def grammar(body: FormatFields, own: str, schema: dict[str, Any] | None, service: Service) -> str | None:
    """The grammar that the answer has to match; None where it is free. `schema` is what the door's own field for it
    asks, `own` that field's name. Raises InvalidRequestError."""
    asked = ((own, schema, of_schema), *_given(body))
    given = [(name, value, make) for name, value, make in asked if value is not None]
    if not given:
        return None
    names = [name for name, _, _ in given]
    field = names[-1].partition(".")[0]
    if len(given) > 1:
        named = ", ".join(f"`{name}`" for name in names)
        raise InvalidRequestError(
            f"An answer can be held to one thing, and this request has {named}. Leave out all but one.", field
        )
    service.text_tokenizer(field)
    _, value, make = given[0]
    return make(value, field)


def _given(body: FormatFields) -> Iterator[tuple[str, Any, Callable[[Any, str], str]]]:
    """Every other name that there is for it, its value, and what makes a grammar of that; an error is about the field,
    which that is told too."""
    yield "guided_json", body.guided_json, of_schema
    yield "json_schema", body.json_schema, of_schema
    yield "guided_regex", body.guided_regex, _of_regex
    yield "regex", body.regex, _of_regex
    yield "guided_choice", body.guided_choice, _of_choice
    yield "guided_grammar", body.guided_grammar, _of_text
    yield "ebnf", body.ebnf, _of_text
    if (outputs := body.structured_outputs) is not None:
        yield "structured_outputs.json", outputs.json_, of_schema
        yield "structured_outputs.json_object", ANY_OBJECT if outputs.json_object else None, of_schema
        yield "structured_outputs.regex", outputs.regex, _of_regex
        yield "structured_outputs.choice", outputs.choice, _of_choice
        yield "structured_outputs.grammar", outputs.grammar, _of_text


def schema_of(value: TextFormat | JsonObjectFormat | JsonSchemaFormat | JsonSchema | None) -> dict[str, Any] | None:
    """The JSON schema of a format as OpenAI has them, if it has one."""
    if value is None or isinstance(value, TextFormat):
        return None
    if isinstance(value, JsonSchemaFormat):
        value = value.json_schema
    if isinstance(value, JsonSchema):
        return value.schema_
    own = value.schema_ if value.value is None else value.value
    return ANY_OBJECT if own is None else own


def of_schema(schema: dict[str, Any] | str, param: str) -> str:
    """The grammar of a JSON schema, which vLLM and SGLang take as text too. Raises InvalidRequestError."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    _check_length(text, param)
    if reason := grammars.check_schema(text):
        raise InvalidRequestError(f"The JSON schema cannot be used: {reason}.", param)
    return grammars.of_schema(text)


def _of_regex(regex: str, param: str) -> str:
    _check_length(regex, param)
    made = grammars.of_regex(regex)
    if not grammars.usable(made):
        raise InvalidRequestError(
            "The regular expression cannot be used: it is malformed, takes too much to follow, or has what cannot be "
            "followed token by token, as look-around and back references.",
            param,
        )
    return made


def _of_choice(choice: list[str], param: str) -> str:
    made = grammars.of_choice(choice)
    _check_length(made, param)
    return made


def _of_text(text: str, param: str) -> str:
    """Of a grammar in llguidance's Lark or in GBNF, as llama-server reads it."""
    _check_length(text, param)
    made = grammars.of_text(text)
    if made is None or not grammars.usable(made):
        raise InvalidRequestError(
            "The grammar cannot be used: it is neither Lark (as llguidance reads it, beginning at `start`) nor GBNF "
            "(beginning at `root`), names a rule that it does not have, or takes too much to follow.",
            param,
        )
    return made


def _check_length(text: str, param: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequestError(f"What the answer is held to has more than {MAX_GRAMMAR_CHARS} characters.", param)
