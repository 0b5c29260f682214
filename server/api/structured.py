"""What an answer has to match, by every name that clients have for it: OpenAI's `response_format`, or the `format` of a
response's text, vLLM's `structured_outputs` and `guided_*`, SGLang's `json_schema`, `regex` and `ebnf`. It comes out as
one grammar.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tucka_runtime import grammars
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.api.bodies import FormatFields, JsonObjectFormat, JsonSchema, JsonSchemaFormat, TextFormat
from tucka_runtime.server.service.service import Service

ANY_OBJECT: dict[str, Any] = {"type": "object"}
MAX_GRAMMAR_CHARS = 16_384  # of a schema made to take long, compiled in 0.2 s on the step loop


@dataclass(frozen=True, slots=True)
class Kind:
    """What an answer may be held to. `make` makes a grammar of it, as text."""

    name: str
    make: Callable[[str], str]


SCHEMA = Kind("JSON schema", grammars.of_schema)
_REGEX = Kind("regular expression", grammars.of_regex)
_CHOICE = Kind("choice", grammars.of_choice)
_GRAMMAR = Kind("grammar", grammars.of_text)


async def grammar(body: FormatFields, own: str, schema: dict[str, Any] | None, service: Service) -> str | None:
    """The grammar that the answer has to match; None where it is free. `schema` is what the door's own field for it
    asks, `own` that field's name. Raises InvalidRequestError."""
    asked = ((own, schema, SCHEMA), *_given(body))
    given = [(name, value, kind) for name, value, kind in asked if value is not None]
    if not given:
        return None
    names = [name for name, _, _ in given]
    field = names[-1].partition(".")[0]
    if len(given) > 1:
        named = ", ".join(f"`{name}`" for name in names)
        raise InvalidRequestError(
            f"An answer can be held to one thing, and this request has {named}. Leave out all but one.", field
        )
    service.base_defaults.text_tokenizer(field)
    _, value, kind = given[0]
    return await grammar_of(kind, value, field, service)


async def grammar_of(kind: Kind, value: dict[str, Any] | list[str] | str, param: str, service: Service) -> str:
    """The grammar of `value`, which came in the field `param`; vLLM and SGLang take schemas as text too. Raises
    InvalidRequestError."""
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequestError(f"What the answer is held to has more than {MAX_GRAMMAR_CHARS} characters.", param)
    try:
        return await service.grammars.get(kind.make, text)
    except grammars.UnusableError as error:
        raise InvalidRequestError(f"The {kind.name} cannot be used: {error}.", param) from None


def _given(body: FormatFields) -> Iterator[tuple[str, Any, Kind]]:
    """Every other name that there is for it, its value, and what that is; an error is about the field."""
    yield "guided_json", body.guided_json, SCHEMA
    yield "json_schema", body.json_schema, SCHEMA
    yield "guided_regex", body.guided_regex, _REGEX
    yield "regex", body.regex, _REGEX
    yield "guided_choice", body.guided_choice, _CHOICE
    yield "guided_grammar", body.guided_grammar, _GRAMMAR
    yield "ebnf", body.ebnf, _GRAMMAR
    if (outputs := body.structured_outputs) is not None:
        yield "structured_outputs.json", outputs.json_, SCHEMA
        yield "structured_outputs.json_object", ANY_OBJECT if outputs.json_object else None, SCHEMA
        yield "structured_outputs.regex", outputs.regex, _REGEX
        yield "structured_outputs.choice", outputs.choice, _CHOICE
        yield "structured_outputs.grammar", outputs.grammar, _GRAMMAR


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
