"""The engine under load: whatever runs beside a sequence, however it is cut, preempted or cached, its tokens are those
of a run alone; every sequence has one end, and nothing is left behind."""

import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.support.driving import (
    GREEDY,
    VOCAB,
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
from tucka_runtime.engine.engine import Engine
from tucka_runtime.errors import InvalidRequestError, ModelNotFoundError
from tucka_runtime.messages import AdapterKey, Finish, FinishReason, Request, Route, RouteScope, SamplingParams

BATCH, REQUEST, PREFIX = RouteScope.BATCH, RouteScope.REQUEST, RouteScope.PREFIX
TUCKA, INNER, LORA, HEAD = (AdapterKey(name, 1) for name in ("tucka", "inner", "lora", "head"))
CONTEXT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model; a TuckA adapter routed by token ids, one routed inside the model, a LoRA, and one with its own head. The
    first two have a short route prefix."""
    folder = tmp_path_factory.mktemp("engine")
    model = save_model(folder / "model")
    layout = build(folder / "model").layout
    save_tucka(folder / "tucka", layout)
    save_tucka(folder / "inner", layout, 1, ("o_proj", "down_proj"), r=3, k=4)
    for key in (TUCKA, INNER):
        (folder / key.name / "training.json").write_text('{"route_prefix_tokens": 8}')
    save_lora(folder / "lora", layout)
    head = model.lm_head.weight.detach().roll(5, 0).contiguous()
    save_tucka(folder / "head", layout, 2, r=5, saved={"lm_head.weight": head}, modules_to_save=["lm_head"])
    return folder


def serve(folder: Path, **settings: Any) -> Engine:
    engine = build(folder / "model", **settings)
    for key in (TUCKA, INNER, LORA, HEAD):
        engine.load_adapter(key, folder / key.name)
    return engine


# ---- random traffic ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    step: int
    abort: int | None
    lengths: tuple[int, ...]
    n: int
    adapter: AdapterKey | None
    scope: RouteScope
    seed: int
    shared_prefix: int
    sampling: SamplingParams

    def request(self, id: str) -> Request:
        start = prompt(self.shared_prefix, 99)  # so that prefixes are found in the cache
        prompts = [(start + prompt(length, self.seed + i))[:length] for i, length in enumerate(self.lengths)]
        return ask(*prompts, id=id, sampling=self.sampling, n=self.n, adapter=self.adapter, scope=self.scope)


SAMPLINGS = (
    GREEDY,
    replace(GREEDY, repetition_penalty=1.3, frequency_penalty=0.2, logprobs=1),
    replace(GREEDY, ignore_eos=False, stop_token_ids=tuple(range(3, 12)), min_tokens=2),
    SamplingParams(temperature=0.9, seed=11, top_k=20, ignore_eos=True),
    SamplingParams(
        temperature=1.3, seed=5, top_p=0.9, min_p=0.02, ignore_eos=True, bad_words=((9,), (30, 31), (7, 8, 9))
    ),
    SamplingParams(temperature=0.7, seed=2, presence_penalty=0.4, logprobs=2, stop_token_ids=(20, 21), min_tokens=3),
    replace(GREEDY, prompt_logprobs=1),
)

arrivals = st.builds(
    Arrival,
    step=st.integers(0, 12),
    abort=st.none() | st.integers(0, 25),
    lengths=st.lists(st.integers(1, 26), min_size=1, max_size=3).map(tuple),
    n=st.sampled_from((1, 1, 1, 2, 3)),
    adapter=st.sampled_from((None, TUCKA, INNER, LORA, HEAD)),
    scope=st.sampled_from((BATCH, REQUEST, PREFIX)),
    seed=st.integers(0, 3),
    shared_prefix=st.sampled_from((0, 9, 20)),
    sampling=st.builds(
        lambda base, count: replace(base, max_tokens=count), st.sampled_from(SAMPLINGS), st.integers(0, 14)
    ),
)

pools = st.fixed_dictionaries(
    {
        "block_size": st.integers(1, 16),
        "kv_cache_tokens": st.integers(CONTEXT, 2 * CONTEXT),
        "max_num_batched_tokens": st.sampled_from((4, 7, 16, 40, 200)),
        "max_num_seqs": st.integers(1, 4),
    }
)


class Solo:
    """What a request gives alone, in a roomy engine; each asked once."""

    def __init__(self, folder: Path):
        self.engine = serve(folder, max_model_len=CONTEXT, block_size=16)
        self.known: dict[Any, list[Answer]] = {}

    def __call__(self, request: Request, index: int) -> Answer:
        """Every prompt of a request is asked for on its own."""
        own = Request("solo", (request.prompts[index // request.n],), request.sampling, request.n, request.adapter)
        own = replace(own, route_scope=request.route_scope)
        seeds_agree = len(request.prompts) == 1 or request.sampling.temperature == 0
        if not seeds_agree:  # an answer's seed depends on its index in the request
            own, place = replace(request, id="solo"), index
        else:
            place = index % request.n
        if own not in self.known:
            self.engine.blocks.forget_all()
            (self.known[own],) = run(self.engine, own)
        return self.known[own][place]


@pytest.fixture(scope="module")
def solo(folder: Path) -> Solo:
    return Solo(folder)


def independent(request: Request) -> bool:
    """Whether its tokens may not depend on what else runs."""
    return request.adapter in (None, LORA) or request.route_scope is not BATCH


@settings(
    max_examples=80,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(pool=pools, traffic=st.lists(arrivals, min_size=1, max_size=7), overlap=st.booleans(), drafts=st.booleans())
def test_tokens_are_those_of_a_run_alone(
    folder: Path, solo: Solo, pool: dict[str, int], traffic: list[Arrival], overlap: bool, drafts: bool
):
    """With `overlap` each step is scheduled before the tokens of the last one are known, as on a GPU. With `drafts`,
    whatever they are, several tokens come of a step."""
    engine = serve(folder, max_model_len=CONTEXT, speculate="ngram" if drafts else "none", **pool)
    engine.overlap = overlap
    requests = [arrival.request(f"r{i}") for i, arrival in enumerate(traffic)]
    answers: Answers = {}
    aborted = set()
    given: dict[tuple[str, int], Drafts] = {}
    drafted = right = step = 0
    while engine.busy or any(arrival.step >= step for arrival in traffic):
        for arrival, request in zip(traffic, requests, strict=True):
            if arrival.step == step:
                answers |= {(request.id, i): Answer() for i in range(request.num_sequences)}
                engine.add(request)
                for seq in engine.requests[request.id]:
                    assert (seq.ngrams is not None) == (drafts and seq.scope is not BATCH)
                    if seq.ngrams is not None:
                        alone = solo(request, seq.index).token_ids
                        given[request.id, seq.index] = seq.ngrams = Drafts(seq.num_prompt, alone, seq.index)
        outputs, stats = engine.step()
        if stats is not None:
            drafted, right = drafted + stats.draft_tokens, right + stats.accepted_tokens
            assert stats.prefill_tokens + stats.decode_tokens <= pool["max_num_batched_tokens"]
            assert engine.load.running <= pool["max_num_seqs"]
        for arrival, request in zip(traffic, requests, strict=True):
            if arrival.abort is not None and arrival.step + arrival.abort == step:
                outputs += engine.abort(request.id)
                aborted.add(request.id)
        engine.check_integrity()
        for out in outputs:
            answers[out.request_id, out.index].take(out)
        step += 1
        assert step < 3000
    check_idle(engine)
    verified = [pair for own in given.values() for pair in own.given]
    assert (drafted, right) == (sum(d for d, _ in verified), sum(r for _, r in verified))
    event(f"drafts were right: {right > 0}, and wrong: {right < drafted}")
    event(f"preemptions: {min(engine.scheduler.num_preemptions, 3)}")
    event(f"displacements: {min(engine.scheduler.num_displacements, 3)}")
    last = [answer.last for answer in answers.values() if answer.last is not None]
    event(f"KV of routed adapters was reused: {any(out.route and out.cached_tokens for out in last)}")
    for request in requests:
        for index in range(request.num_sequences):
            answer = answers[request.id, index]
            assert answer.finish_reason is not None
            assert answer.finish_reason is not FinishReason.ABORT or request.id in aborted
            assert answer.last is not None
            assert answer.last.cached_tokens < len(request.prompts[index // request.n])
            if not independent(request):
                continue
            alone = solo(request, index)
            count = len(answer.token_ids)
            assert answer.token_ids == alone.token_ids[:count]
            if answer.finish_reason is not FinishReason.ABORT:
                assert answer.token_ids == alone.token_ids
                assert answer.finish_reason is alone.finish_reason
                assert answer.last.finish == alone.last.finish
                compare_scores(answer, alone)
                assert (answer.route is None) == (alone.route is None)
                if answer.route is not None:
                    assert answer.route.route.group == alone.route.route.group
                    assert answer.route.route.weights == pytest.approx(alone.route.route.weights, abs=1e-5)
                    assert answer.route.changes == 0


def compare_scores(answer: Answer, alone: Answer) -> None:
    pairs = [(answer.logprobs, alone.logprobs)]
    assert (answer.prompt_logprobs is None) == (alone.prompt_logprobs is None)
    if answer.prompt_logprobs is not None:
        assert answer.prompt_logprobs[0] is None
        pairs.append((answer.prompt_logprobs[1:], alone.prompt_logprobs[1:]))
    for ours, theirs in pairs:
        assert [entry.token_id for entry in ours] == [entry.token_id for entry in theirs]
        assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], abs=1e-4)


# ---- routes --------------------------------------------------------------------------------------------------------


def golden_engine(golden: Path, case: str, **settings: Any) -> tuple[Engine, AdapterKey]:
    meta = json.loads((golden / case / "expected.json").read_text())
    engine = build(golden / case / meta["base"], dtype="float32", **settings)
    key = AdapterKey(case, 1)
    engine.load_adapter(key, golden / case / "adapter")
    return engine, key


@pytest.mark.parametrize("company", [False, True])
@pytest.mark.parametrize(
    "case",
    ["llama-odown-r6k3t2p3", "llama-odown-r8k1t1", "llama-layers13-r8k3t2", "gpt2-all-r8k2t2", "llama-all7-r4k2t2"],
)
def test_request_scope_does_not_see_the_chunks(golden: Path, case: str, company: bool):
    """Also where the router reads hidden states, so that the prompt is routed before it is computed; also where only
    another prompt's share of the budget cuts it."""
    sampling = replace(GREEDY, max_tokens=8, prompt_logprobs=0)
    ids = prompt(23)

    def outcome(**settings: Any) -> tuple[Answer, torch.Tensor, Route]:
        engine, key = golden_engine(golden, case, **settings)
        recorder = Recorder(engine)
        requests = [ask(ids, id="it", sampling=sampling, adapter=key, scope=REQUEST)]
        if company:
            other = ask(prompt(9), prompt(5), id="other", sampling=replace(GREEDY, max_tokens=9), adapter=key)
            requests.insert(0, other)
        answer = run(engine, *requests)[-1][0]
        routes = recorder.routes["it", 0]
        assert len(set(routes)) == 1
        return answer, recorder.of("it"), routes[0]

    whole, logits, route = outcome()
    for chunk in (5, 22, 27):
        answer, rows, own = outcome(max_num_batched_tokens=chunk, max_num_seqs=5, block_size=3)
        assert answer.token_ids == whole.token_ids
        assert own.group == route.group
        assert own.weights == pytest.approx(route.weights, abs=1e-6)
        assert relative(rows, logits) < 1e-4
        compare_scores(answer, whole)
        assert answer.route.route == own


def test_batch_scope_is_one_route_for_all_of_an_adapters_tokens(folder: Path):
    """The mean is over the rows of that adapter alone, whoever else is in the pass."""
    engine = serve(folder)
    recorder = Recorder(engine)
    once = replace(GREEDY, max_tokens=0)
    requests = [
        ask(prompt(5), id="a", sampling=once, adapter=TUCKA),
        ask(prompt(9), id="base", sampling=once),
        ask(prompt(14), id="b", sampling=once, adapter=TUCKA),
        ask(prompt(6), id="apart", sampling=once, adapter=TUCKA, scope=REQUEST),
        ask(prompt(7), id="head", sampling=once, adapter=HEAD),
        ask(prompt(7), id="lora", sampling=once, adapter=LORA),
    ]
    run(engine, *requests)
    both = [*prompt(5), *prompt(14)]
    tucka, head = (engine.adapters[key] for key in (TUCKA, HEAD))
    assert recorder.routes["a", 0] == recorder.routes["b", 0] == [table_route(tucka, both)]
    assert recorder.routes["apart", 0] == [table_route(tucka, prompt(6))]
    assert recorder.routes["head", 0] == [table_route(head, prompt(7))]
    assert recorder.routes["base", 0] == recorder.routes["lora", 0] == [None]


def test_route_reports(folder: Path):
    """The route of the pass that finished the prompt, and how often the group changed afterwards."""
    engine = serve(folder)
    recorder = Recorder(engine)
    sampling = replace(GREEDY, max_tokens=20)
    requests = [
        ask(prompt(12), id="batch", sampling=sampling, adapter=TUCKA),
        ask(prompt(12), id="request", sampling=sampling, adapter=INNER, scope=REQUEST),
        ask(prompt(12), id="lora", sampling=sampling, adapter=LORA),
        ask(prompt(12), id="base", sampling=sampling),
    ]
    batch, request, lora, base = (answers[0] for answers in run(engine, *requests))
    routes = recorder.routes["batch", 0]
    changes = sum(a.group != b.group for a, b in itertools.pairwise(routes))
    assert changes > 0, "choose another seed: this one shows nothing"
    assert batch.route.route == routes[0]
    assert batch.route.changes == changes
    assert request.route.route == recorder.routes["request", 0][0]
    assert request.route.changes == 0
    assert lora.route is None
    assert base.route is None


def test_a_pinned_route_is_a_fixed_delta(folder: Path):
    """Equal to the routed adapter under that very route, in any company; no route is computed or reported."""
    route = None
    engine = serve(folder)
    recorder = Recorder(engine)
    sampling = replace(GREEDY, max_tokens=10)
    ((routed,),) = run(engine, ask(prompt(9), id="routed", sampling=sampling, adapter=INNER, scope=REQUEST))
    route = routed.route.route
    key = AdapterKey("pinned", 1)
    info = engine.load_adapter(key, folder / "inner", route)
    assert info.scope is RouteScope.PINNED
    requests = [
        ask(prompt(9), id="pinned", sampling=sampling, adapter=key),
        ask(prompt(9), id="beside", sampling=sampling, adapter=TUCKA),
    ]
    (pinned,), _ = run(engine, *requests)
    assert pinned.token_ids == routed.token_ids
    assert relative(recorder.of("pinned"), recorder.of("routed")) < 1e-4
    assert pinned.route is None
    assert recorder.routes["pinned", 0] == [None] * 10


# ---- one batch, many adapters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5])
def test_adapters_in_one_batch_do_not_touch_each_other(folder: Path, count: int):
    """Logits of every row, in small batches (dense path) and with prompts beyond its limit of rows (by segment)."""
    keys = (None, TUCKA, INNER, LORA, HEAD)
    sampling = replace(GREEDY, max_tokens=5)
    requests = [
        ask(prompt(3 + 7 * i + j, i), id=f"{key and key.name}{j}", sampling=sampling, adapter=key, scope=REQUEST)
        for i, key in enumerate(keys)
        for j in range(count)
    ]
    together = Recorder(engine := serve(folder))
    answers = run(engine, *requests)
    apart = Recorder(engine := serve(folder))
    for request, (answer,) in zip(requests, answers, strict=True):
        ((alone,),) = run(engine, request)
        assert answer.token_ids == alone.token_ids
        assert relative(together.of(request.id), apart.of(request.id)) < 1e-4


def test_a_replaced_head_is_its_adapters_alone(folder: Path):
    """`modules_to_save`: the adapter's head is the base's turned by five rows, and so are its logits."""
    engine = serve(folder)
    headless = AdapterKey("headless", 1)
    bare = folder / "headless"
    save_tucka(bare, engine.layout, 2, r=5)
    engine.load_adapter(headless, bare)
    recorder = Recorder(engine)
    sampling = replace(GREEDY, max_tokens=0, prompt_logprobs=0)
    requests = [
        ask(prompt(9), id=name, sampling=sampling, adapter=key, scope=REQUEST)
        for name, key in (("own", HEAD), ("bare", headless), ("base", None))
    ]
    run(engine, *requests)
    assert relative(recorder.of("own"), recorder.of("bare").roll(5, -1)) < 1e-4
    assert relative(recorder.of("base"), recorder.of("bare")) > 0.01


# ---- prefix cache --------------------------------------------------------------------------------------------------


def ask_twice(engine: Engine, first: Request, second: Request) -> tuple[int, list[int]]:
    """What the cache gave the second of two requests, and its tokens."""
    run(engine, first)
    ((answer,),) = run(engine, second)
    assert answer.last is not None
    return answer.last.cached_tokens, answer.token_ids


FEW = replace(GREEDY, max_tokens=6)


@pytest.mark.parametrize("key", [None, LORA])
@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (22, 20)])
def test_a_prefix_is_reused_and_changes_nothing(folder: Path, key: AdapterKey | None, length: int, cached: int):
    """Full pages, but never the whole prompt: its last token has to be computed."""
    ids = prompt(length)
    engine = serve(folder, block_size=4)
    recorder = Recorder(engine)
    once, again = (ask(ids, id=id, sampling=FEW, adapter=key) for id in ("once", "again"))
    found, tokens = ask_twice(engine, once, again)
    assert found == cached
    ((alone,),) = run(serve(folder, block_size=4), once)
    assert tokens == alone.token_ids
    for position, row in recorder.logits["again", 0].items():
        assert position >= cached
        assert relative(row, recorder.logits["once", 0][position]) < 1e-4


def test_a_longer_prompt_takes_what_it_shares(folder: Path):
    """Also what was generated: a conversation goes on where it was."""
    engine = serve(folder, block_size=4)
    ((answer,),) = run(engine, ask(prompt(10), id="first", sampling=FEW))
    longer = (*prompt(10), *answer.token_ids, *prompt(5, 1))
    ((second,),) = run(engine, ask(longer, id="second", sampling=FEW))
    assert second.last.cached_tokens == 12
    ((alone,),) = run(serve(folder, block_size=4), ask(longer, sampling=FEW))
    assert second.token_ids == alone.token_ids
    other = (*prompt(10)[:6], *prompt(9, 2))
    ((third,),) = run(engine, ask(other, id="third", sampling=FEW))
    assert third.last.cached_tokens == 4


def test_siblings_in_flight_share_pages(folder: Path):
    engine = serve(folder, block_size=4, max_num_seqs=2)
    answers = run(engine, ask(prompt(21), sampling=FEW, n=4))[0]
    assert [a.last.cached_tokens for a in answers] == [0, 0, 20, 20]
    assert len({tuple(a.token_ids) for a in answers}) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"salt": "tenant"}),
        ({"salt": "a"}, {"salt": "b"}),
        ({}, {"adapter": LORA}),
        ({"adapter": LORA}, {}),
        ({"adapter": LORA}, {"adapter": AdapterKey("lora", 2)}),
        ({"adapter": LORA}, {"adapter": AdapterKey("lora2", 1)}),
        ({"adapter": TUCKA}, {"adapter": TUCKA}),
        ({"adapter": TUCKA}, {}),
        ({}, {"adapter": TUCKA}),
    ],
    ids=str,
)
def test_pages_are_never_shared_between(folder: Path, first: dict[str, Any], second: dict[str, Any]):
    """Tenants, adapters, generations; and never under a route that its batch decides."""
    engine = serve(folder, block_size=4)
    for key in (AdapterKey("lora", 2), AdapterKey("lora2", 1)):
        engine.load_adapter(key, folder / "lora")
    found, tokens = ask_twice(
        engine, ask(prompt(20), id="1", sampling=FEW, **first), ask(prompt(20), id="2", sampling=FEW, **second)
    )
    assert found == 0
    fresh = serve(folder, block_size=4)
    if second.get("adapter", LORA) in fresh.adapters.loaded:
        ((alone,),) = run(fresh, ask(prompt(20), sampling=FEW, **second))
        assert tokens == alone.token_ids


def test_pinned_adapters_share_within_a_generation_only(folder: Path):
    engine = serve(folder, block_size=4)
    route = Route(0, (0.5, 0.6))
    for generation in (1, 2):
        engine.load_adapter(AdapterKey("p", generation), folder / "tucka", route)
    requests = [
        ask(prompt(20), id=str(i), sampling=FEW, adapter=AdapterKey("p", g)) for i, g in enumerate((1, 1, 2, 2))
    ]
    found = [run(engine, request)[0][0].last.cached_tokens for request in requests]
    assert found == [0, 16, 0, 16]


def test_scored_prompts_are_computed_whole(folder: Path):
    engine = serve(folder, block_size=4)
    scored = replace(FEW, prompt_logprobs=1)
    assert ask_twice(engine, ask(prompt(20), id="1", sampling=FEW), ask(prompt(20), id="2", sampling=scored))[0] == 0


def test_eviction_takes_the_tail_of_the_oldest_first(folder: Path):
    """A full pool of finished prompts gives way; what was used last is found last."""
    engine = serve(folder, block_size=4, max_model_len=28, kv_cache_tokens=48)
    for i in range(6):
        run(engine, ask(prompt(20, i), id=str(i), sampling=replace(GREEDY, max_tokens=1)))
    found, _ = ask_twice(
        engine,
        ask(prompt(20, 5), id="newest", sampling=replace(GREEDY, max_tokens=1)),
        ask(prompt(20, 0), id="oldest", sampling=replace(GREEDY, max_tokens=1)),
    )
    assert found == 0
    assert run(engine, ask(prompt(20, 5), id="again", sampling=FEW))[0][0].last.cached_tokens == 16


# ---- one sequence --------------------------------------------------------------------------------------------------


def test_stop_tokens(folder: Path):
    engine = serve(folder)
    ((free,),) = run(engine, ask(prompt(6), sampling=replace(GREEDY, max_tokens=12)))
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)
    sampling = replace(GREEDY, max_tokens=12, stop_token_ids=(stop, 96))
    ((answer,),) = run(engine, ask(prompt(6), sampling=sampling))
    assert answer.token_ids == free.token_ids[: first + 1]
    assert answer.finish_reason is FinishReason.STOP
    assert answer.last.finish == Finish(FinishReason.STOP, stop)
    ((later,),) = run(engine, ask(prompt(6), sampling=replace(sampling, min_tokens=first + 1)))
    assert later.token_ids[:first] == free.token_ids[:first]
    assert stop not in later.token_ids[: first + 1]
    assert len(later.token_ids) > first + 1


def test_eos_and_ignore_eos(folder: Path):
    """Biased so that the end is certain."""
    engine = serve(folder)
    sampling = SamplingParams(temperature=0.0, max_tokens=5, logit_bias=((2, 100.0),))
    ((answer,),) = run(engine, ask(prompt(6), sampling=sampling))
    assert answer.token_ids == [2]
    assert answer.last.finish == Finish(FinishReason.STOP, 2)
    ((answer,),) = run(engine, ask(prompt(6), sampling=replace(sampling, ignore_eos=True)))
    assert answer.token_ids == [2] * 5
    assert answer.last.finish == Finish(FinishReason.LENGTH)
    ((answer,),) = run(engine, ask(prompt(6), sampling=replace(sampling, min_tokens=3)))
    assert len(answer.token_ids) == 4
    assert answer.token_ids.index(2) == 3


def test_max_tokens_and_the_context_end_a_sequence(folder: Path):
    engine = serve(folder, max_model_len=20)
    for length, count in ((19, 1), (1, 19), (20, 0)):
        ((answer,),) = run(engine, ask(prompt(length), sampling=replace(GREEDY, max_tokens=count)))
        assert len(answer.token_ids) == count
        assert answer.finish_reason is FinishReason.LENGTH
        assert answer.last.timing is not None
        times = answer.last.timing
        assert times.arrived <= times.scheduled <= times.first_token <= times.finished


def test_what_can_never_run_is_refused_and_leaves_nothing(folder: Path):
    engine = serve(folder, max_model_len=20)
    for request, error in (
        (ask(prompt(20), sampling=replace(GREEDY, max_tokens=1)), InvalidRequestError),
        (ask((), sampling=FEW), InvalidRequestError),
        (ask(prompt(3), (), sampling=FEW, adapter=LORA), InvalidRequestError),
        (ask(prompt(3), sampling=FEW, adapter=AdapterKey("lora", 9)), ModelNotFoundError),
    ):
        with pytest.raises(error):
            engine.add(request)
        check_idle(engine)


def test_a_request_id_in_flight_cannot_be_taken_again(folder: Path):
    """Its outputs could not be told from the first one's."""
    engine = serve(folder)
    engine.add(ask(prompt(3), id="same", sampling=FEW, adapter=LORA))
    with pytest.raises(InvalidRequestError):
        engine.add(ask(prompt(4), id="same", sampling=FEW, adapter=LORA))
    answers = {("same", 0): Answer()}
    drain(engine, answers)
    assert len(answers["same", 0].token_ids) == 6
    run(engine, ask(prompt(4), id="same", sampling=FEW))


def test_abort_of_nothing_is_nothing(folder: Path):
    engine = serve(folder)
    assert engine.abort("never seen") == []
    run(engine, ask(prompt(3), id="done", sampling=FEW))
    assert engine.abort("done") == []
    engine.add(ask(prompt(3), prompt(4), id="now", sampling=FEW, n=2, adapter=TUCKA))
    outputs = engine.abort("now")
    assert [(o.index, o.finish) for o in outputs] == [(i, Finish(FinishReason.ABORT)) for i in range(4)]
    assert engine.abort("now") == []
    check_idle(engine)


@pytest.mark.parametrize("unload", ["waiting", "running"])
def test_an_adapter_in_use_outlives_its_name(folder: Path, unload: str):
    engine = serve(folder)
    ((alone,),) = run(engine, ask(prompt(7), sampling=FEW, adapter=LORA))
    engine.add(ask(prompt(7), sampling=FEW, adapter=LORA))
    answers = {("r", 0): Answer()}
    if unload == "running":
        for out in engine.step()[0]:
            answers["r", 0].take(out)
    engine.unload_adapter(LORA)
    assert LORA in engine.adapters.loaded
    with pytest.raises(ModelNotFoundError):
        engine.add(ask(prompt(7), id="late", sampling=FEW, adapter=LORA))
    drain(engine, answers)
    assert answers["r", 0].token_ids == alone.token_ids
    assert LORA not in engine.adapters.loaded
    assert not any(LORA in members for members in engine.adapters.active)


def test_an_abort_overtakes_a_route_that_is_being_summed_up(folder: Path):
    """The last chunk of a prompt that is being routed is in flight when its request and its adapter go."""
    engine = build(folder / "model", max_num_batched_tokens=8, max_num_seqs=4)
    engine.overlap = True
    other = AdapterKey("inner", 2)
    for key in (INNER, other):
        engine.load_adapter(key, folder / "inner")
    engine.add(ask(prompt(9), id="first", adapter=INNER, scope=REQUEST))
    engine.add(ask(prompt(12), id="gone", adapter=other, scope=REQUEST))
    (gone,) = engine.requests["gone"]
    while not (engine.in_flight and any(c.seq is gone and c.last for c in engine.in_flight.chunks)):
        engine.step()
    engine.abort("gone")
    engine.unload_adapter(other)
    assert other not in engine.adapters.loaded
    drain(engine, {("first", 0): Answer()})


# ---- sampling through the engine -----------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_in_any_company(folder: Path):
    sampling = SamplingParams(temperature=1.0, seed=1234, max_tokens=16, ignore_eos=True)
    mine = ask(prompt(9), id="mine", sampling=sampling, n=3)
    ((*alone,),) = run(serve(folder), mine)
    others = [
        ask(prompt(5, i), id=f"o{i}", sampling=replace(sampling, seed=i), adapter=key)
        for i, key in enumerate((None, TUCKA, LORA))
    ]
    crowded = serve(
        folder, max_num_batched_tokens=11, max_num_seqs=5, block_size=2, max_model_len=40, kv_cache_tokens=60
    )
    together = run(crowded, *others, mine)[-1]
    assert crowded.scheduler.num_preemptions > 0
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert len({tuple(a.token_ids) for a in alone}) == 3, "the answers of one request differ"
    ((*other,),) = run(serve(folder), ask(prompt(9), sampling=replace(sampling, seed=1235), n=3))
    assert not {tuple(a.token_ids) for a in other} & {tuple(a.token_ids) for a in alone}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("loud", "scope"), [(LORA, BATCH), (TUCKA, REQUEST), (INNER, PREFIX), (None, BATCH)])
def test_who_gives_way_to_another_flow_says_the_same(
    folder: Path, loud: AdapterKey | None, scope: RouteScope, overlap: bool
):
    """One request holds every seat when three other flows come, one after the other."""
    sampling = SamplingParams(temperature=1.0, seed=7, max_tokens=16, ignore_eos=True, frequency_penalty=0.5)
    hog = ask(prompt(9), id="hog", sampling=sampling, n=8, adapter=loud, scope=scope)
    others = [
        ask(prompt(6, i), id=str(i), sampling=sampling, adapter=key, scope=REQUEST)
        for i, key in enumerate(key for key in (None, TUCKA, LORA, INNER) if key != loud)
    ]
    roomy = serve(folder)
    alone = {(r.id, i): a.token_ids for r in (hog, *others) for i, a in enumerate(run(roomy, r)[0])}
    engine = serve(folder, max_num_seqs=4, max_num_batched_tokens=40, block_size=4)
    engine.overlap = overlap
    answers: Answers = {key: Answer() for key in alone}
    engine.add(hog)
    for request in others:
        for _ in range(4):
            for out in engine.step()[0]:
                answers[out.request_id, out.index].take(out)
        engine.add(request)
    drain(engine, answers)
    assert engine.scheduler.num_displacements > 0 and not engine.scheduler.num_preemptions
    assert {key: answer.token_ids for key, answer in answers.items()} == alone


def test_without_a_seed_texts_differ_but_the_engines_seed_fixes_them(folder: Path):
    sampling = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True)

    def texts(seed: int) -> list[list[int]]:
        engine = serve(folder, seed=seed)
        return [run(engine, ask(prompt(9), id=str(i), sampling=sampling))[0][0].token_ids for i in range(2)]

    first, second = texts(0)
    assert first != second
    assert texts(0) == [first, second]
    assert texts(1) != [first, second]


@pytest.mark.parametrize("key", [None, LORA, INNER])
def test_scores_survive_chunks_and_preemption(folder: Path, key: AdapterKey | None):
    """Log-probabilities and ranks of prompt and answer are those of the logits, once each, in order."""
    sampling = replace(GREEDY, max_tokens=9, prompt_logprobs=3, logprobs=2, temperature=0.7, seed=3)
    requests = [
        ask(prompt(13 + i, i), id=f"r{i}", sampling=sampling, adapter=key, scope=REQUEST, n=2) for i in range(3)
    ]
    engine = serve(folder, max_num_batched_tokens=6, max_num_seqs=4, block_size=2, max_model_len=26, kv_cache_tokens=44)
    recorder = Recorder(engine)
    answers = run(engine, *requests)
    assert engine.scheduler.num_preemptions > 0
    for request, pair in zip(requests, answers, strict=True):
        for index, answer in enumerate(pair):
            table = torch.log_softmax(recorder.of(request.id, index).double(), dim=-1)
            text = [*request.prompts[0], *answer.token_ids]
            assert answer.prompt_logprobs[0] is None
            entries = answer.prompt_logprobs[1:] + answer.logprobs
            assert len(entries) == len(text) - 1 == len(table)
            for row, token, entry in zip(table, text[1:], entries, strict=True):
                assert entry.token_id == token
                assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
                assert entry.rank == 1 + int((row > row[token]).sum())
                best = row.topk(len(entry.top))
                assert [i for i, _ in entry.top] == best.indices.tolist()
                assert [v for _, v in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert {len(entry.top) for entry in answer.prompt_logprobs[1:]} == {3}
            assert {len(entry.top) for entry in answer.logprobs} == {2}


def test_scoring_alone_generates_nothing(folder: Path):
    engine = serve(folder, max_num_batched_tokens=5, max_num_seqs=2)
    recorder = Recorder(engine)
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=1, logprobs=1)
    ((first, second),) = run(engine, ask(prompt(17), prompt(1), sampling=sampling))
    assert first.token_ids == second.token_ids == []
    assert second.prompt_logprobs == [None]
    total = sum(entry.logprob for entry in first.prompt_logprobs[1:])
    table = torch.log_softmax(recorder.of("r", 0).double(), dim=-1)
    assert total == pytest.approx(sum(float(table[i, t]) for i, t in enumerate(prompt(17)[1:])), abs=1e-3)
    assert math.isfinite(total)


def test_every_token_of_the_vocabulary_can_be_asked_for(folder: Path):
    engine = serve(folder)
    sampling = replace(GREEDY, max_tokens=2, logprobs=VOCAB, prompt_logprobs=VOCAB + 5)
    ((answer,),) = run(engine, ask(prompt(4), sampling=sampling))
    for entry in (*answer.logprobs, *answer.prompt_logprobs[1:]):
        assert sorted(i for i, _ in entry.top) == list(range(VOCAB))
        assert math.fsum(math.exp(v) for _, v in entry.top) == pytest.approx(1.0, abs=1e-4)
        assert entry.top[entry.rank - 1][0] == entry.token_id
