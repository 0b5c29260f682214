"""Grammars that answers are held to, as texts for llguidance: the API makes and checks them, the engine follows them.
No torch.

Between two values of JSON a model may write up to WHITESPACE blanks or line breaks, enough to indent and too few to go
on for ever.
"""

import json
import time
from itertools import islice
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark

from tucka_runtime import schemas

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

WHITESPACE = 16

LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000, step_lexer_fuel=50_000, step_max_items=20_000, max_lexer_states=50_000
)
"""What one grammar may cost the step loop: by llguidance's own figures 4 ms to begin with, then 5 ms a token, 100 MB.
Its defaults are 20, 17 and 500."""


JSON_OPTIONS: "JsonCompileOptions" = {
    "whitespace_flexible": True,
    "whitespace_pattern": f"[ \\t\\n\\r]{{0,{WHITESPACE}}}",
}
"""llguidance's own, which a schema holds in `x-guidance`; a client's are overruled."""


class UnusableError(ValueError):
    """Why an answer cannot be held to something."""


def of_schema(schema: str) -> str:
    """The grammar of a JSON schema, an object as text. Raises UnusableError."""
    return _of_followed(followed(schema))


def of_regex(regex: str) -> str:
    """The grammar of what a regular expression matches from begin to end. Raises UnusableError."""
    made = LLMatcher.grammar_from_regex(regex)
    if _complaint(made):
        raise UnusableError(
            "it is malformed, takes too much to follow, or has what cannot be followed token by token, as look-around "
            "and back references"
        )
    return made


def of_choice(choice: str) -> str:
    """The grammar of one text out of several, a list of strings as JSON."""
    return "start: " + " | ".join(map(json.dumps, json.loads(choice)))


def of_text(text: str) -> str:
    """The grammar that a text in Lark or in GBNF says, as llama-server reads that. Raises UnusableError."""
    try:
        made = any_to_lark(text)
    except Exception:  # the converter has nothing narrower for a rule that is missing
        made = None
    if made is None or _complaint(made):
        raise UnusableError(
            "it is neither Lark (as llguidance reads it, beginning at `start`) nor GBNF (beginning at `root`), names a "
            "rule that it does not have, or takes too much to follow"
        )
    return made


def _complaint(grammar: str) -> str:
    """llguidance's message about a grammar; empty if there is none. It panics where it cuts a long message in the
    middle of a character, and such an error passes every `except Exception`."""
    try:
        return LLMatcher.validate_grammar(grammar, limits=LIMITS)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return "panic"


def after_thought(grammar: str, begun: bool, begin: str, end: str) -> str:
    """The grammar that lets a model think first, between `begin` and `end`; `begun`: it has to, since its prompt ends
    with `begin`."""
    thought = "think BLANKS" if begun else f"({json.dumps(begin)} think BLANKS)?"
    blanks = f"/[ \\t\\n\\r]{{0,{WHITESPACE}}}/"
    first = f"start: {thought} @answer\nthink[suffix={json.dumps(end)}]: /(.|\\n)*/\nBLANKS: {blanks}"
    held = json.loads(grammar)["grammars"] if grammar.startswith("{") else [{"lark_grammar": grammar}]
    return json.dumps({"grammars": [{"lark_grammar": first}, {**held[0], "name": "answer"}]})


# llguidance's messages repeat what the schema says; ours do not. They are found by how llguidance's begin:
REASONS = {
    "Invalid type": "a `type` is none of JSON Schema's",
    "Unimplemented keys": "it has keywords that are not supported",
    "oneOf": "the cases of a `oneOf` overlap; use `anyOf`",
    "Pointer": "a `$ref` points to nothing in it",
    "Resource": "a `$ref` points out of it",
    "regex": "a `pattern` is no regular expression that is supported; look-around is not, but at its beginning",
    "Unknown format": "a `format` is not supported",
    "Unsatisfiable": "nothing can match it",
    "schema too large": "it is too large",
    "recursion": "it is nested too deeply",
    "Expecting object": "it must be an object",
}
MOST_PLACES = 64  # schemas within one that are left out in turn to find where its fault is
PLACE_SECONDS = 0.1  # of processor time for that: a schema may take as long each time


def followed(schema: str) -> str:
    """A JSON schema, an object as text, in the words that llguidance follows and with JSON_OPTIONS: it can be used as
    it is, by itself or within Lark. Raises UnusableError, which says where, as a JSON pointer."""
    try:
        made = schemas.followable(json.loads(schema))
        text, message = _told(made)
    except schemas.UnfollowableError as error:
        raise UnusableError(str(error)) from None
    except RecursionError:
        raise UnusableError(REASONS["recursion"]) from None
    except (ValueError, TypeError, AttributeError, OverflowError):  # a keyword's value is not of the keyword's type
        raise UnusableError("it is no JSON schema") from None
    if message:
        reason = next((ours for theirs, ours in REASONS.items() if message.startswith(theirs)), "it is no JSON schema")
        raise UnusableError(f"{reason} (at `{schemas.pointer(_place(made))}`)")
    return text


def _told(schema: Any) -> tuple[str, str]:
    """A schema as text, with JSON_OPTIONS, and llguidance's message about it; that is empty if there is none. Raises
    ValueError for what is no JSON."""
    if not isinstance(schema, dict):
        return "", "Unsatisfiable" if schema is False else "Expecting object"
    text = json.dumps({**schema, "x-guidance": JSON_OPTIONS}, allow_nan=False)
    return text, _complaint(_of_followed(text))


def _of_followed(text: str) -> str:
    return f'{{"grammars": [{{"json_schema": {text}}}]}}'


def _place(schema: Any) -> schemas.Path:
    """The smallest schema within one without which it could be used, as far as that is found in PLACE_SECONDS."""
    found: schemas.Path = ()
    end = time.thread_time() + PLACE_SECONDS
    for path in islice(schemas.places(schema), MOST_PLACES):
        if path[: len(found)] == found and not _told(_without(schema, path))[1]:
            found = path
        if time.thread_time() > end:
            break
    return found


def _without(schema: Any, path: schemas.Path) -> Any:
    """The same schema with anything at all allowed at a place; among alternatives with one that says little, since
    beside anything at all the others would not be looked at."""
    first, *rest = path
    copy: Any = list(schema) if isinstance(schema, list) else dict(schema)
    if first in ("anyOf", "oneOf") and len(rest) == 1:
        copy[first] = [{"const": "-"} if i == rest[0] else each for i, each in enumerate(schema[first])]
    else:
        copy[first] = _without(schema[first], tuple(rest)) if rest else {}
    return copy
