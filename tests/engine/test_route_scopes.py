"""Routes of a prompt's own: what they come from, that nobody else changes them, and whose KV is reused under them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.support.driving import (
    GREEDY,
    Answer,
    Answers,
    Drafts,
    Recorder,
    ask,
    build,
    check_idle,
    drain,
    prompt,
    relative,
    run,
    save_lora,
    save_model,
    save_tucka,
    table_route,
)
from tucka_runtime.engine.adapters.delta import AdapterDelta
from tucka_runtime.engine.engine import Engine
from tucka_runtime.engine.route_cache import RouteCache
from tucka_runtime.engine.sequence import Sequence as EngineSequence
from tucka_runtime.messages import ROUTE_PREFIX_TOKENS, AdapterKey, FinishReason, Request, Route, RouteScope

BATCH, REQUEST, PREFIX = RouteScope.BATCH, RouteScope.REQUEST, RouteScope.PREFIX
TUCKA, INNER, LORA = (AdapterKey(name, 1) for name in ("tucka", "inner", "lora"))
ROUTED = [TUCKA, INNER]
ALL = [*ROUTED, LORA]
FIRST = 8  # tokens that route a prompt under the scope prefix here
FEW = replace(GREEDY, max_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model; a TuckA adapter routed by token ids, one routed inside the model, a LoRA: two contents of each."""
    folder = tmp_path_factory.mktemp("scopes")
    save_model(folder / "model")
    layout = build(folder / "model").layout
    for generation in (1, 2):
        save_tucka(folder / f"tucka{generation}", layout, generation)
        save_tucka(folder / f"inner{generation}", layout, generation, ("o_proj", "down_proj"), r=3, k=4)
        save_lora(folder / f"lora{generation}", layout, generation)
        for name in ("tucka", "inner"):
            training = {"route_prefix_tokens": FIRST}
            (folder / f"{name}{generation}" / "training.json").write_text(json.dumps(training))
    return folder


def serve(folder: Path, **changes: Any) -> Engine:
    engine = build(folder / "model", **{"block_size": 4, **changes})
    for key in ALL:
        engine.load_adapter(key, folder / f"{key.name}1")
    return engine


def one(engine: Engine, ids: Sequence[int], key: AdapterKey, scope: RouteScope = PREFIX, **more: Any) -> Answer:
    """The answer to one prompt."""
    ((answer,),) = run(engine, ask(ids, sampling=FEW, adapter=key, scope=scope, **more))
    assert answer.last is not None
    return answer


def cached(engine: Engine, ids: Sequence[int], key: AdapterKey, scope: RouteScope = PREFIX, **more: Any) -> int:
    """How many tokens of a prompt the cache had."""
    last = one(engine, ids, key, scope, **more).last
    assert last is not None
    return last.cached_tokens


# ---- routes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_the_first_tokens_are_the_route(folder: Path, length: int):
    """The whole prompt where it is shorter."""
    engine = serve(folder)
    ids = prompt(length)
    assert one(engine, ids, TUCKA).route.route == table_route(engine.adapters[TUCKA], ids[:FIRST])
    assert one(engine, ids, TUCKA, REQUEST).route.route == table_route(engine.adapters[TUCKA], ids)
    inner = one(engine, ids, INNER).route.route
    alone = one(serve(folder), ids[:FIRST], INNER, REQUEST).route.route
    assert inner.group == alone.group
    assert inner.weights == pytest.approx(alone.weights, abs=1e-6)


def test_what_only_decodes_makes_its_cores_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Answers of 10, 20 and 30 tokens: cores are made when a sequence comes or goes, and they are the right ones."""
    asks = [
        ask(prompt(9, i), id=str(i), sampling=replace(GREEDY, max_tokens=10 * i), adapter=TUCKA, scope=REQUEST)
        for i in (1, 2, 3)
    ]
    alone = [run(serve(folder), asked)[0] for asked in asks]
    made = []
    make = AdapterDelta._make_cores
    monkeypatch.setattr(AdapterDelta, "_make_cores", lambda *args: made.append(args) or make(*args))
    together = run(serve(folder), *asks)
    assert [answer.token_ids for (answer,) in together] == [answer.token_ids for (answer,) in alone]
    assert 3 <= len(made) <= 8, "of some 30 steps"


@pytest.mark.parametrize("key", ROUTED)
def test_the_prefix_scope_does_not_see_the_chunks(folder: Path, key: AdapterKey):
    """Also where the first chunk is smaller than what routes the prompt, or ends inside of it."""

    def outcome(**changes: Any) -> tuple[Answer, Any, list[Route | None]]:
        engine = serve(folder, **changes)
        recorder = Recorder(engine)
        others = [ask(prompt(9), prompt(5), id="other", sampling=FEW, adapter=key)] if changes else []
        answer = run(engine, *others, ask(prompt(30), id="it", sampling=FEW, adapter=key, scope=PREFIX))[-1][0]
        return answer, recorder.of("it"), recorder.routes["it", 0]

    whole, logits, (route, *_) = outcome()
    for chunk in (5, 7, 8, 16, 22):
        answer, rows, routes = outcome(max_num_batched_tokens=chunk, max_num_seqs=5, block_size=3)
        assert answer.token_ids == whole.token_ids
        assert len(set(routes)) == 1
        assert routes[0].group == route.group
        assert routes[0].weights == pytest.approx(route.weights, abs=1e-6)
        assert relative(rows, logits) < 1e-4


def test_only_what_routes_a_prompt_goes_through_the_model_twice(folder: Path):
    """And not even that where a prompt with the same first tokens was routed before."""
    engine = serve(folder, max_num_batched_tokens=5, max_num_seqs=2)

    def computed(ids: Sequence[int]) -> int:
        engine.add(ask(ids, sampling=replace(GREEDY, max_tokens=1), adapter=INNER, scope=PREFIX))
        tokens = 0
        while engine.busy:
            _, stats = engine.step()
            tokens += stats.prefill_tokens
        return tokens

    first = prompt(FIRST)
    assert computed((*first, *prompt(21, 1))) == FIRST + 29
    assert computed((*first, *prompt(21, 2))) == 29 - FIRST
    assert computed((*first[:-1], first[0], *prompt(21, 2))) == FIRST + 29


@pytest.mark.parametrize(
    ("training", "tokens"),
    [
        (None, ROUTE_PREFIX_TOKENS),
        ("{}", ROUTE_PREFIX_TOKENS),
        ('{"route_prefix_tokens": 16}', 16),
        ('{"route_prefix_tokens": 1000000000000}', 10**12),
        ('{"route_prefix_tokens": 1000000000000000000000000}', ROUTE_PREFIX_TOKENS),  # no message carries the file
        ('{"route_prefix_tokens": 0}', ROUTE_PREFIX_TOKENS),
        ('{"route_prefix_tokens": -16}', ROUTE_PREFIX_TOKENS),
        ('{"route_prefix_tokens": true}', ROUTE_PREFIX_TOKENS),
        ('{"route_prefix_tokens": 16.0}', ROUTE_PREFIX_TOKENS),
        ('{"route_prefix_tokens": "16"}', ROUTE_PREFIX_TOKENS),
    ],
)
def test_an_adapter_says_how_many_tokens_route_a_prompt(tmp_path: Path, folder: Path, training: str, tokens: int):
    engine = build(folder / "model")
    save_tucka(tmp_path, engine.layout)
    if training is not None:
        (tmp_path / "training.json").write_text(training)
    info = engine.load_adapter(TUCKA, tmp_path)
    assert info.route_prefix_tokens == tokens
    route = table_route(engine.adapters[TUCKA], prompt(100)[:tokens])
    assert one(engine, prompt(100), TUCKA).route.route == route


def test_an_adapter_trained_for_the_scope_says_so(tmp_path: Path, folder: Path):
    engine = build(folder / "model")
    save_tucka(tmp_path, engine.layout)
    for scope in ("batch", "request", "prefix", "pinned", "nonsense"):
        (tmp_path / "training.json").write_text(json.dumps({"route": scope}))
        info = engine.load_adapter(AdapterKey(scope, 1), tmp_path)
        assert info.scope == (scope if scope in ("batch", "request", "prefix") else None)
    pinned = engine.load_adapter(AdapterKey("fixed", 1), tmp_path, Route(0, (0.5, 0.5)))
    assert (pinned.scope, pinned.route_prefix_tokens) == (RouteScope.PINNED, None)
    assert engine.load_adapter(LORA, folder / "lora1").route_prefix_tokens is None


def test_only_what_is_routed_has_a_scope(folder: Path):
    engine = serve(folder)
    for scope in (BATCH, REQUEST, PREFIX):
        for key in (None, *ALL):
            engine.add(ask(prompt(3), id="one", adapter=key, scope=scope))
            assert engine.requests["one"][0].scope == (scope if key in ROUTED else None)
            engine.abort("one")


# ---- reuse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ROUTED)
@pytest.mark.parametrize("first", [FIRST, FIRST + 5])
def test_turns_of_a_conversation_reuse_as_a_lora_adapters_do(folder: Path, key: AdapterKey, first: int):
    """From the first turn on where its prompt is as long as what routes it; every answer is that of a cold run."""
    engine, cold = serve(folder), serve(folder)
    found: dict[AdapterKey, list[int]] = {key: [], LORA: []}
    for who, hits in found.items():
        text = prompt(first)
        for turn in range(5):
            answer = one(engine, text, who)
            assert answer.token_ids == one(cold, text, who, salt=f"{who} {turn}").token_ids
            hits.append(answer.last.cached_tokens)
            text = (*text, *answer.token_ids, *prompt(4, turn + 1))
    assert found[key] == found[LORA]
    assert all(found[key][1:])


@pytest.mark.parametrize("key", ROUTED)
def test_a_prompt_that_grows_past_what_routes_it_starts_anew(folder: Path, key: AdapterKey):
    """Its route is another one then, and KV of before does not fit."""
    engine = serve(folder)
    short, longer = prompt(6), prompt(12)
    assert short != longer[:6]
    assert cached(engine, longer[:6], key) == 0
    assert cached(engine, longer[:7], key) == 0
    assert cached(engine, longer, key) == 0
    assert cached(engine, (*longer, *prompt(4)), key) == 12


@pytest.mark.parametrize("key", ROUTED)
def test_under_the_scope_request_prompts_that_repeat_are_reused(folder: Path, key: AdapterKey):
    """Whole ones, and what was computed of their answers; a longer prompt has another route."""
    engine = serve(folder)
    once = one(engine, prompt(21), key, REQUEST)
    again = one(engine, prompt(21), key, REQUEST)
    assert (once.last.cached_tokens, again.last.cached_tokens) == (0, 20)
    assert again.token_ids == once.token_ids
    assert again.route.route == once.route.route
    assert cached(engine, (*prompt(21), 5), key, REQUEST) == 0
    assert cached(engine, prompt(21)[:17], key, REQUEST) == 0


@pytest.mark.parametrize("key", ROUTED)
def test_the_two_scopes_share_where_their_route_is_the_same(folder: Path, key: AdapterKey):
    engine = serve(folder)
    assert cached(engine, prompt(FIRST), key, REQUEST) == 0
    assert cached(engine, prompt(FIRST), key, PREFIX) == 4
    assert cached(engine, prompt(FIRST), key, BATCH) == 0


@pytest.mark.parametrize("scope", [REQUEST, PREFIX])
@pytest.mark.parametrize("key", ROUTED)
def test_siblings_in_flight_share_pages(folder: Path, key: AdapterKey, scope: RouteScope):
    engine = serve(folder, max_num_seqs=2)
    answers = run(engine, ask(prompt(21), sampling=FEW, n=4, adapter=key, scope=scope))[0]
    assert [a.last.cached_tokens for a in answers] == [0, 0, 20, 20]
    assert len({tuple(a.token_ids) for a in answers}) == 1


@pytest.mark.parametrize("scope", [REQUEST, PREFIX])
@pytest.mark.parametrize("key", ROUTED)
def test_pages_are_never_shared_between(folder: Path, key: AdapterKey, scope: RouteScope):
    """Tenants, adapters, generations of one name, and other scopes, whatever the tokens."""
    engine = serve(folder)
    for other in (AdapterKey(key.name, 2), AdapterKey("twin", 1)):
        engine.load_adapter(other, folder / f"{key.name}1")
    one(engine, prompt(20), key, scope)
    for changes in (
        {"salt": "tenant"},
        {"key": AdapterKey(key.name, 2)},
        {"key": AdapterKey("twin", 1)},
        {"scope": BATCH},
        {"scope": PREFIX if scope is REQUEST else REQUEST},
        {"key": LORA},
    ):
        assert cached(engine, prompt(20), **{"key": key, "scope": scope, **changes}) == 0
    assert cached(engine, prompt(20), key, scope) == 16


@pytest.mark.parametrize("key", ROUTED)
def test_equal_pages_under_another_route_are_computed_anew(folder: Path, key: AdapterKey):
    """The first page is the same, and the last token that counts is not."""
    engine = serve(folder)
    recorder = Recorder(engine)
    one(engine, prompt(20), key)
    other = list(prompt(20))
    other[FIRST - 1] = other[FIRST - 1] % 90 + 3
    assert cached(engine, other, key) == 0
    assert cached(engine, other, key, id="again") == 16
    for position, row in recorder.logits["again", 0].items():
        assert relative(row, recorder.logits["r", 0][position]) < 1e-4
    other = list(prompt(20))
    other[FIRST] = other[FIRST] % 90 + 3
    assert cached(engine, other, key) == FIRST


def test_a_route_is_found_by_its_tokens_owner_and_where_positions_stretch_its_length():
    def sequence(length: int = 30, key: AdapterKey = TUCKA, salt: str = "", first: int = FIRST) -> EngineSequence:
        return EngineSequence(ask(prompt(30)[:length], adapter=key, salt=salt), 0, PREFIX, 0, 0.0, first)

    routes = RouteCache(3, rope_limit=24)
    seq = sequence()
    seq.route = Route(1, (0.4, 0.6))
    routes.keep(seq)
    assert routes.find(sequence()) == seq.route
    for other in (sequence(25), sequence(20), sequence(key=INNER), sequence(salt="b"), sequence(first=9)):
        assert routes.find(other) is None
    short = sequence(20)
    short.route = Route(2, (0.3, 0.7))
    routes.keep(short)
    assert routes.find(sequence(10)) == short.route
    first_stays = sequence()
    first_stays.route = Route(0, (0.5, 0.5))
    routes.keep(first_stays)
    assert routes.find(sequence()) == seq.route
    for i in range(2):
        other = sequence(salt=str(i))
        other.route = seq.route
        routes.keep(other)
    assert routes.find(short) is None, "the one that was not asked for longest is gone"
    assert routes.find(sequence()) == seq.route


# ---- random conversations ------------------------------------------------------------------------------------------


CONTEXT = 64


class Cold:
    """What a prompt is answered alone, by an engine that reuses nothing; each asked once."""

    def __init__(self, folder: Path):
        self.folder, self.engines, self.known = folder, {}, {}

    def __call__(self, request: Request, generation: int) -> list[Answer]:
        content = 1 + generation % 2
        if content not in self.engines:
            self.engines[content] = build(self.folder / "model", max_model_len=CONTEXT)
            for key in ALL:
                self.engines[content].load_adapter(key, self.folder / f"{key.name}{content}")
        key = replace(request.adapter, generation=1)
        own = replace(request, id="cold", adapter=key, cache_salt="")
        if (content, own) not in self.known:
            salted = replace(own, cache_salt=str(len(self.known)))
            (self.known[content, own],) = run(self.engines[content], salted)
        return self.known[content, own]


@pytest.fixture(scope="module")
def cold(folder: Path) -> Cold:
    return Cold(folder)


turns = st.fixed_dictionaries(
    {
        "talk": st.integers(0, 2),
        "adapter": st.sampled_from(["tucka", "tucka", "inner", "inner", "lora"]),
        "scope": st.sampled_from([PREFIX, PREFIX, REQUEST]),
        "salt": st.sampled_from(["", "", "b"]),
        "more": st.integers(1, 12),
        "n": st.sampled_from([1, 1, 3]),
        "max_tokens": st.integers(1, 9),
        "abort": st.sampled_from([None, None, None, 1, 3]),
        "wait": st.sampled_from([0, 0, 1, 2, 8]),
        "reload": st.sampled_from([False, False, False, True]),
    }
)


@settings(
    max_examples=50,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    said=st.lists(turns, min_size=2, max_size=12),
    block_size=st.sampled_from([1, 3, 4, 8, 16]),
    pool=st.sampled_from([CONTEXT, 90, 400]),
    chunk=st.sampled_from([5, 9, 16, 200]),
    seats=st.sampled_from([1, 2, 5]),
    overlap=st.booleans(),
    drafts=st.booleans(),
)
def test_answers_are_those_of_a_cold_run(
    folder: Path,
    cold: Cold,
    said: list[dict[str, Any]],
    block_size: int,
    pool: int,
    chunk: int,
    seats: int,
    overlap: bool,
    drafts: bool,
):
    """Conversations that grow, branch and share their beginning, whose adapters are replaced while they are answered,
    which are aborted, preempted, and drafted, right and wrong: whatever the cache gives, every token is that of a run
    without one."""
    engine = build(
        folder / "model",
        max_model_len=CONTEXT,
        kv_cache_tokens=pool,
        block_size=block_size,
        max_num_batched_tokens=max(chunk, seats),
        max_num_seqs=seats,
        speculate="ngram" if drafts else "none",
    )
    engine.overlap = overlap
    generation = {"tucka": 0, "inner": 0, "lora": 0}
    for name in generation:
        engine.load_adapter(AdapterKey(name, 0), folder / f"{name}1")
    texts = {talk: (*prompt(6), *prompt(1 + talk, talk)) for talk in range(3)}
    answers: Answers = {}
    asked: list[tuple[Request, int]] = []
    aborted: set[str] = set()

    def steps(count: int) -> None:
        for _ in range(count):
            for out in engine.step()[0]:
                answers[out.request_id, out.index].take(out)
            engine.check_integrity()

    for i, turn in enumerate(said):
        name = turn["adapter"]
        if turn["reload"]:
            old, generation[name] = generation[name], generation[name] + 1
            new = AdapterKey(name, generation[name])
            engine.load_adapter(new, folder / f"{name}{1 + generation[name] % 2}")
            engine.unload_adapter(AdapterKey(name, old))
        text = (*texts[turn["talk"]], *prompt(turn["more"], i))
        if len(text) + turn["max_tokens"] > CONTEXT:
            continue
        texts[turn["talk"]] = text
        request = ask(
            text,
            id=f"r{i}",
            sampling=replace(GREEDY, max_tokens=turn["max_tokens"]),
            n=turn["n"],
            adapter=AdapterKey(name, generation[name]),
            scope=turn["scope"],
            salt=turn["salt"],
        )
        answers |= {(request.id, index): Answer() for index in range(request.n)}
        asked.append((request, generation[name]))
        engine.add(request)
        for seq in engine.requests[request.id] if drafts else ():
            seq.ngrams = Drafts(seq.num_prompt, cold(request, generation[name])[seq.index].token_ids, i)
        steps(turn["wait"] if turn["abort"] is None else turn["abort"])
        if turn["abort"] is not None:
            for out in engine.abort(request.id):
                answers[out.request_id, out.index].take(out)
                aborted.add(request.id)
    drain(engine, answers)
    check_idle(engine)
    last = [answer.last for answer in answers.values() if answer.last is not None]
    event(f"preempted: {engine.scheduler.num_preemptions > 0}")
    event(f"KV of routed adapters was reused: {any(out.route and out.cached_tokens for out in last)}")
    for request, number in asked:
        for index, alone in enumerate(cold(request, number)):
            answer = answers[request.id, index]
            assert answer.token_ids == alone.token_ids[: len(answer.token_ids)]
            if answer.finish_reason is FinishReason.ABORT:
                assert request.id in aborted
            else:
                assert answer.token_ids == alone.token_ids
