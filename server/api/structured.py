"""What an answer has to match, by every name that clients have for it: OpenAI's `response_format`, vLLM's
`structured_outputs` and `guided_*`, SGLang's `json_schema`, `regex` and `ebnf`. It comes out as one grammar.
"""

import json
from typing import Any

from tucka_runtime import grammars
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.api.bodies import GenerationBody, JsonObjectFormat, JsonSchemaFormat, TextFormat

MAX_GRAMMAR_CHARS = 16_384  # of a schema made to take long, compiled in 0.2 s on the step loop


def grammar(body: GenerationBody) -> str | None:
    """The grammar that the answer has to match; None where it is free. Raises InvalidRequestError."""
    given = [made for made in (_response_format(body.response_format), *_by_name(body)) if made is not None]
    if len(given) > 1:
        names = ", ".join(f"`{param}`" for param, _ in given)
        raise InvalidRequestError(
            f"An answer can be held to one thing, and this request has {names}.", _field(given[1][0])
        )
    return given[0][1] if given else None


def _by_name(body: GenerationBody) -> list[tuple[str, str] | None]:
    """(name, grammar) of each field that has one of its own."""
    outputs = body.structured_outputs
    objects = outputs is not None and outputs.json_object
    schemas = {
        "guided_json": body.guided_json,
        "json_schema": body.json_schema,
        "structured_outputs.json": outputs.json_ if outputs else None,
        "structured_outputs.json_object": {"type": "object"} if objects else None,
    }
    regexes = {
        "guided_regex": body.guided_regex,
        "regex": body.regex,
        "structured_outputs.regex": outputs.regex if outputs else None,
    }
    choices = {
        "guided_choice": body.guided_choice,
        "structured_outputs.choice": outputs.choice if outputs else None,
    }
    texts = {
        "guided_grammar": body.guided_grammar,
        "ebnf": body.ebnf,
        "structured_outputs.grammar": outputs.grammar if outputs else None,
    }
    return [
        *((name, _of_schema(value, _field(name))) for name, value in schemas.items() if value is not None),
        *((name, _of_regex(value, _field(name))) for name, value in regexes.items() if value is not None),
        *((name, _of_choice(value, _field(name))) for name, value in choices.items() if value is not None),
        *((name, _of_text(value, _field(name))) for name, value in texts.items() if value is not None),
    ]


def _field(name: str) -> str:
    """The body's field that an error is about."""
    return name.partition(".")[0]


def _response_format(value: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> tuple[str, str] | None:
    """`json_object` without a schema is any object."""
    if value is None or isinstance(value, TextFormat):
        return None
    if isinstance(value, JsonSchemaFormat):
        schema: dict[str, Any] | None = value.json_schema.schema_
    else:
        schema = value.schema_ if value.value is None else value.value
    return "response_format", _of_schema({"type": "object"} if schema is None else schema, "response_format")


def _of_schema(schema: dict[str, Any] | str, param: str) -> str:
    """Of a JSON schema, which vLLM and SGLang take as text too."""
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
