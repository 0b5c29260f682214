"""The engine under load: whatever runs beside a sequence, however it is cut, preempted or cached, its tokens are those of
a run alone; every sequence has one end, and nothing is left behind."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import (
    GREEDY,
    VOCAB,
    Answer,
    Answers,
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
)
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tucka_runtime.engine import Engine
from tucka_runtime.errors import InvalidRequestError, ModelNotFoundError
from tucka_runtime.sequence import AdapterKey, FinishReason, Request, Route, RouteScope, SamplingParams

BATCH, REQUEST = RouteScope.BATCH, RouteScope.REQUEST
TUCKA, INNER, LORA, HEAD = (AdapterKey(name, 1) for name in ("tucka", "inner", "lora", "head"))
CONTEXT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model; a TuckA adapter routed by token ids, one routed inside the model, a LoRA, and one with its own head."""
    folder = tmp_path_factory.mktemp("engine")
    model = save_model(folder / "model")
    layout = build(folder / "model").layout
    save_tucka(folder / "tucka", layout)
    save_tucka(folder / "inner", layout, 1, ("o_proj", "down_proj"), r=3, k=4)
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
    SamplingParams(temperature=1.3, seed=5, top_p=0.9, min_p=0.02, ignore_eos=True),
    replace(GREEDY, prompt_logprobs=1),
)

arrivals = st.builds(
    Arrival,
    step=st.integers(0, 12),
    abort=st.none() | st.integers(0, 25),
    lengths=st.lists(st.integers(1, 26), min_size=1, max_size=3).map(tuple),
    n=st.sampled_from((1, 1, 1, 2, 3)),
    adapter=st.sampled_from((None, TUCKA, INNER, LORA, HEAD)),
    scope=st.sampled_from((BATCH, REQUEST)),
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
    return request.adapter in (None, LORA) or request.route_scope is REQUEST


@settings(
    max_examples=120,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(pool=pools, traffic=st.lists(arrivals, min_size=1, max_size=7))
def test_tokens_are_those_of_a_run_alone(folder: Path, solo: Solo, pool: dict[str, int], traffic: list[Arrival]):
    engine = serve(folder, max_model_len=CONTEXT, **pool)
    requests = [arrival.request(f"r{i}") for i, arrival in enumerate(traffic)]
    answers: Answers = {}
    aborted = set()
    step = 0
    while engine.busy or any(arrival.step >= step for arrival in traffic):
        for arrival, request in zip(traffic, requests, strict=True):
            if arrival.step == step:
                answers |= {(request.id, i): Answer() for i in range(request.num_sequences)}
                engine.add(request)
        outputs, stats = engine.step()
        assert stats.prefill_tokens + stats.decode_tokens <= pool["max_num_batched_tokens"]
        assert stats.running <= pool["max_num_seqs"]
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
    event(f"preemptions: {min(engine.scheduler.num_preemptions, 3)}")
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
                assert answer.last.stop_token_id == alone.last.stop_token_id
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
