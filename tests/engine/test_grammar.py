"""Answers held to a JSON schema: whatever a random model would rather say, what comes out is JSON of that schema."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits

import tucka_runtime
from tests.support.driving import GREEDY, ask, build, prompt, run, save_lora, save_model
from tucka_runtime import grammars
from tucka_runtime.engine.engine import Engine
from tucka_runtime.grammars import WHITESPACE, UnusableError, of_regex, of_schema
from tucka_runtime.messages import AdapterKey, FinishReason, SamplingParams
from tucka_runtime.tokenizer import Tokenizer

BASE = Path(tucka_runtime.__file__).parent / "default" / "base"
ROW = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", 'quote" and \\', "äöü"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["kind", "count", "tags"],
    "additionalProperties": False,
}
HOT = SamplingParams(max_tokens=150, temperature=1.0, seed=1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A random model over the embedded base's bytes."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, vocab_size=264, eos_token_id=0, num_hidden_layers=1, max_position_embeddings=512)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, folder)
    return build(folder, kv_cache_tokens=8192)


def text(engine: Engine, ids: list[int]) -> str:
    tokenizer = Tokenizer.load(BASE)
    assert tokenizer is not None
    return tokenizer.decode(ids, skip_special_tokens=True)


def held(sampling: SamplingParams, schema: dict[str, Any]) -> SamplingParams:
    return replace(sampling, grammar=of_schema(json.dumps(schema)))


def test_every_answer_is_of_the_schema(engine: Engine, tmp_path: Path) -> None:
    """Greedy and drawn, base and adapter, beside answers that are held to nothing and stay what they are alone."""
    key = AdapterKey("plain", 1)
    engine.load_adapter(key, save_lora(tmp_path / "plain", engine.layout, targets=("q_proj", "o_proj"), r=4))
    free = ask(prompt(6), id="free", sampling=replace(GREEDY, max_tokens=12))
    ((alone,),) = run(engine, free)
    (beside,), *answers = run(
        engine,
        free,
        ask(prompt(5), id="greedy", sampling=held(replace(HOT, temperature=0.0), ROW)),
        ask(prompt(5), id="drawn", sampling=held(HOT, ROW), n=4),
        ask(prompt(4), id="adapter", sampling=held(replace(HOT, ignore_eos=True, min_tokens=149), ROW), adapter=key),
    )
    assert beside.token_ids == alone.token_ids
    ended = [a for group in answers for a in group if a.finish_reason is FinishReason.STOP]
    assert ended
    for answer in ended:
        jsonschema.validate(json.loads(text(engine, answer.token_ids)), ROW)
    engine.unload_adapter(key)


SCALARS = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -5, "maximum": 5},
        {"type": "string", "maxLength": 3},
        {"enum": [1, "two", None]},
        {"const": {"a": [1]}},
        {"type": "string", "pattern": "^[a-c]{2}$"},
    ]
)
SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.builds(lambda s, n: {"type": "array", "items": s, "maxItems": n}, inner, st.integers(0, 2)),
        st.builds(
            lambda own: {
                "type": "object",
                "properties": own,
                "required": list(own),
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["x", "y y", "ü"]), inner, max_size=2),
        ),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
    ),
    max_leaves=4,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS, seed=st.integers(0, 99))
def test_any_schema(engine: Engine, schema: dict[str, Any], seed: int) -> None:
    ((answer,),) = run(engine, ask(prompt(3, seed), sampling=held(replace(HOT, seed=seed), schema)))
    if answer.finish_reason is FinishReason.STOP:
        jsonschema.validate(json.loads(text(engine, answer.token_ids)), schema)
    else:
        assert len(answer.token_ids) == HOT.max_tokens


def test_drafts_change_no_answer(engine: Engine) -> None:
    """A draft is held to the schema token by token, and a matcher sees what is right of it alone; at its end the answer
    ends. A stop token that a draft has ends it too."""
    regex = replace(HOT, grammar=of_regex("(ab|ba){3,9}c?"), logprobs=1)
    requests = [
        ask(prompt(5), id="rows", sampling=held(replace(HOT, logprobs=2), ROW), n=4),
        ask(prompt(5), id="greedy", sampling=held(replace(HOT, temperature=0.0, frequency_penalty=0.3), ROW)),
        ask(prompt(4), id="regex", sampling=regex, n=6),
        ask(prompt(4), id="free", sampling=replace(HOT, stop_token_ids=tuple(range(60, 64)), min_tokens=9), n=3),
    ]
    alone = run(engine, *requests)
    assert any(a.finish_reason is FinishReason.STOP for a in alone[0]), "choose another seed"
    drafted = 0
    on_launch = engine.runner.launch

    def counted(chunks: Any) -> Any:
        nonlocal drafted
        launched = on_launch(chunks)
        drafted += sum(len(chunk.draft or ()) for chunk in launched.chunks)
        return launched

    engine.runner.launch = counted
    again = run(engine, *requests, known=alone)
    engine.runner.launch = on_launch
    assert drafted > 100
    flat = [itertools.chain.from_iterable(answers) for answers in (alone, again)]
    for before, after in zip(*flat, strict=True):
        assert (after.token_ids, after.finish_reason) == (before.token_ids, before.finish_reason)
        assert [(e.token_id, e.rank) for e in after.logprobs] == [(e.token_id, e.rank) for e in before.logprobs]


def test_blanks_come_to_an_end(engine: Engine) -> None:
    """A model that would rather write line breaks than anything else may write WHITESPACE of them in a row."""
    tokenizer = Tokenizer.load(BASE)
    assert tokenizer is not None
    (newline,) = tokenizer.encode("\n", add_special_tokens=False)
    sampling = replace(GREEDY, max_tokens=200, logit_bias=((newline, 100.0),))
    schema = {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}
    ((answer,),) = run(engine, ask(prompt(3), sampling=held(sampling, schema)))
    written = text(engine, answer.token_ids)
    assert answer.finish_reason is FinishReason.STOP and json.loads(written) == [1, 1]
    assert "\n" * WHITESPACE in written and "\n" * (WHITESPACE + 1) not in written


def test_a_grammar_that_breaks_ends_its_sequence_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is lowered so that a pattern whose states double with every letter meets it soon."""
    monkeypatch.setattr(grammars, "LIMITS", LLParserLimits(max_lexer_states=10))
    schema = {"type": "string", "pattern": "^(a|b)*a(a|b){20}c$"}
    requests = [
        ask(prompt(3), id="broken", sampling=held(HOT, schema)),
        ask(prompt(3), id="other", sampling=held(HOT, {"const": 7})),
    ]
    alone = (broken,), (other,) = run(engine, *requests)
    (drafted,), _ = run(engine, *requests, known=list(alone))
    assert (drafted.token_ids, drafted.finish_reason) == (broken.token_ids, FinishReason.ERROR) and drafted.token_ids
    assert broken.finish_reason is FinishReason.ERROR
    assert other.finish_reason is FinishReason.STOP and json.loads(text(engine, other.token_ids)) == 7


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ('{"type": "secret"}', "`type`"),
        ('{"not": {"pattern": "secret"}}', "`not`"),
        ('{"uniqueItems": true, "type": "array", "x-if": "secret"}', "`uniqueItems`"),
        ('{"$ref": "http://127.0.0.1/secret"}', "out of it"),
        ('{"$ref": "#/secret"}', "nothing in it"),
        ('{"pattern": "(secret", "type": "string"}', "`pattern`"),
        ('{"oneOf": [{"type": "string"}, {"type": "string"}]}', "`anyOf`"),
        ('{"const": 1, "type": "string"}', "nothing can match"),
        ('{"required": "secret"}', "no JSON schema"),
        ("[1]", "an object"),
        ('{"a": ' * 500 + "1" + "}" * 500, "nested"),
        ('{"type": "array", "items": {"type": "string", "minLength": -1}}', "whole number, 0 or more (at `#/items`)"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(schema: str, reason: str) -> None:
    with pytest.raises(UnusableError) as refused:
        of_schema(schema)
    assert reason in str(refused.value)
    assert "secret" not in str(refused.value) and "127" not in str(refused.value)
