"""JSON schemas that answers are held to: what the API checks at its door and the engine follows. No torch.

A schema becomes a grammar for llguidance. Between two values a model may write up to WHITESPACE blanks or line breaks,
enough to indent and too few to go on for ever.
"""

from llguidance import LLMatcher, LLParserLimits

WHITESPACE = 16

LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000, step_lexer_fuel=50_000, step_max_items=20_000, max_lexer_states=50_000
)
"""What one schema may cost the step loop: by llguidance's own figures 4 ms to begin with, then 5 ms a token, 100 MB.
Its defaults are 20, 17 and 500."""


def grammar(schema: str) -> str:
    """llguidance's form of a JSON schema, an object as text; its own options, in `x-guidance`, are overruled. Raises
    ValueError if it is no such text."""
    blanks = f"[ \\t\\n\\r]{{0,{WHITESPACE}}}"
    return LLMatcher.grammar_from_json_schema(
        schema, overrides={"whitespace_flexible": True, "whitespace_pattern": blanks}
    )


# llguidance's messages repeat what the schema says; ours do not. They are found by how llguidance's begin:
REASONS = {
    "Invalid type": "a `type` is none of JSON Schema's",
    "Unimplemented keys": "it has keywords that are not supported",
    "oneOf": "the cases of a `oneOf` overlap; use `anyOf`",
    "Pointer": "a `$ref` points to nothing in it",
    "Resource": "a `$ref` points out of it",
    "regex": "a `pattern` is no regular expression that is supported",
    "Unknown format": "a `format` is not supported",
    "Unsatisfiable": "nothing can match it",
    "schema too large": "it is too large",
    "recursion": "it is nested too deeply",
    "Expecting object": "it must be an object",
}
UNSUPPORTED = (
    "not if then else dependentSchemas dependentRequired propertyNames unevaluatedItems unevaluatedProperties contains "
    "minContains maxContains uniqueItems"
).split()


def check(schema: str) -> str | None:
    """Why a schema cannot be used; None if it can. What only a tokenizer tells, the engine finds out."""
    try:
        message = LLMatcher.validate_grammar(grammar(schema), limits=LIMITS)
    except ValueError as error:
        message = str(error)
    if not message:
        return None
    reason = next((ours for theirs, ours in REASONS.items() if message.startswith(theirs)), "it is no JSON schema")
    named = [word for word in UNSUPPORTED if f'"{word}"' in message]
    return f"{reason} ({', '.join(named)})" if named and reason == REASONS["Unimplemented keys"] else reason
