"""Answers held to a JSON schema: which tokens may come next, found by llguidance.

The schema becomes a grammar over the bytes of the tokenizer's tokens. The door checks it (`check`, without torch), the
engine follows each sequence with a matcher of its own. Between two values a model may write up to WHITESPACE blanks or
line breaks, enough to indent and too few to go on for ever.
"""

from functools import cached_property
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from tucka_runtime.errors import ModelLoadError
from tucka_runtime.sequence import Sequence
from tucka_runtime.tokenizer import Tokenizer

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


# llguidance's messages repeat what the schema says; ours do not. By how its begin:
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


class Grammars:
    """The matchers of all sequences that have a schema, until `forget`."""

    def __init__(self, folder: Path, vocab: int, eos: frozenset[int]):
        self.folder, self.vocab, self.eos = folder, vocab, eos
        self.matchers: dict[tuple[str, int], tuple[LLMatcher, int]] = {}
        """By sequence, and how many of its tokens each has seen."""
        self.broken: set[tuple[str, int]] = set()
        """Sequences whose grammar turned out to be too complex."""

    @cached_property
    def tokenizer(self) -> LLTokenizer:
        """Made when it is first needed: a second for a large vocabulary."""
        file = self.folder / "tokenizer.json"
        if file.is_file():  # transformers, which takes seconds to import, would make the same of it
            text = file.read_text("utf-8")
        elif (found := Tokenizer.load(self.folder)) is not None:
            text = found.serialised
        else:
            raise ModelLoadError("The base model has no tokenizer, so no JSON schema can be followed.")
        return LLTokenizer(text, n_vocab=self.vocab, eos_token=sorted(self.eos) or None)

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that a matcher allows once the value is complete."""
        return frozenset(self.tokenizer.eos_tokens)

    def forget(self, seq: Sequence) -> None:
        self.matchers.pop(seq.key, None)
        self.broken.discard(seq.key)

    def allowed(self, seq: Sequence) -> bytes:
        """A byte for each token of the vocabulary, 0 where it may not follow what the sequence has; none is 0 if the
        grammar broke."""
        assert seq.sampling.json_schema is not None
        entry = self.matchers.get(seq.key)
        if entry is None:
            matcher = LLMatcher(self.tokenizer, grammar(seq.sampling.json_schema), log_level=0, limits=LIMITS)
            entry = matcher, seq.num_prompt
        matcher, known = entry
        matcher.consume_tokens(seq.tokens[known:])
        self.matchers[seq.key] = matcher, len(seq)
        mask = matcher.compute_logit_bias()
        if matcher.is_error():
            self.broken.add(seq.key)
            return b"\1" * self.vocab
        return mask
