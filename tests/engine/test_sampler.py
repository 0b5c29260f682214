"""Sampling against a plain float64 implementation, one row at a time, one token after the other."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.driving import GREEDY, VOCAB, ask, prompt
from tucka_runtime.engine.sampler import Sampler, logprobs
from tucka_runtime.engine.sequence import Sequence
from tucka_runtime.kernels.reference.backend import OPS
from tucka_runtime.messages import SamplingParams, TokenLogprob

EOS = frozenset({2, 40})
HOT = SamplingParams(temperature=1.0)


def sequence(
    sampling: SamplingParams, generated: tuple[int, ...] = (), length: int = 5, seed: int = 1, id: str = "r"
) -> Sequence:
    seq = Sequence(ask(prompt(length), id=id, sampling=sampling), 0, None, seed, 0.0)
    seq.tokens += generated
    return seq


def logits_of(seed: int, rows: int = 1) -> Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def pick(sampler: Sampler, logits: Tensor, seqs: list[Sequence]) -> tuple[list[int], list[TokenLogprob | None]]:
    """Tokens and log-probabilities at once."""
    choice = sampler.choose(logits, seqs)
    tokens = choice.tokens.tolist()
    return tokens, sampler.entries(choice, tokens, seqs)


class Recorded(Sampler):
    """Keeps the logits and temperatures from which it last chose."""

    def __init__(self) -> None:
        def recorded(logits: Tensor, temperature: Tensor, *rest: Any) -> Tensor:
            self.final = torch.softmax(logits.double() / temperature.double().clamp_min(1e-30)[:, None], dim=-1)
            return OPS.sample(logits, temperature, *rest)

        ops = replace(OPS, sample=recorded)
        super().__init__(ops, VOCAB, EOS, torch.device("cpu"), None)


def plain(logits: Tensor, seq: Sequence) -> list[float]:
    """The probabilities to choose from, from the definitions: repetition penalty (prompt and answer), frequency and
    presence penalty (answer), bias, no end before min_tokens, no bad word, temperature,
    top-k, top-p, min-p."""
    p = seq.sampling
    x = logits.double().tolist()
    generated = seq.tokens[seq.num_prompt :]
    for token in range(VOCAB):
        if token in seq.tokens:
            x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        if token in generated:
            x[token] -= p.frequency_penalty * generated.count(token) + p.presence_penalty
    for token, bias in p.logit_bias:
        x[token] += bias
    if len(generated) < p.min_tokens:
        for token in set(p.stop_token_ids) | (set() if p.ignore_eos else EOS):
            x[token] = -math.inf
    for *before, last in p.bad_words:
        if generated[len(generated) - len(before) :] == before:
            x[last] = -math.inf
    if p.temperature == 0:
        best = max(range(VOCAB), key=lambda i: (x[i], -i))
        return [float(i == best) for i in range(VOCAB)]
    x = [v / p.temperature for v in x]
    order = sorted(range(VOCAB), key=lambda i: -x[i])
    kept = order[: p.top_k or VOCAB]
    weight = {i: math.exp(x[i] - x[order[0]]) for i in kept}
    total = math.fsum(weight.values())
    before, nucleus = 0.0, []
    for i in kept:
        if before < p.top_p or not nucleus:
            nucleus.append(i)
        before += weight[i] / total
    kept = [i for i in nucleus if weight[i] >= p.min_p * weight[order[0]]]
    total = math.fsum(weight[i] for i in kept)
    return [weight[i] / total if i in kept else 0.0 for i in range(VOCAB)]


samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from((0.0, 0.3, 1.0, 2.0)),
    top_p=st.sampled_from((1.0, 0.95, 0.5, 0.01)),
    top_k=st.sampled_from((0, 1, 2, 10, VOCAB, 10**6)),
    min_p=st.sampled_from((0.0, 0.01, 0.3, 1.0)),
    repetition_penalty=st.sampled_from((1.0, 1.2, 0.7)),
    presence_penalty=st.sampled_from((0.0, 1.5, -2.0)),
    frequency_penalty=st.sampled_from((0.0, 0.4, -0.3)),
    logit_bias=st.sampled_from(((), ((3, 100.0), (4, -100.0)), ((2, 1.5),))),
    min_tokens=st.integers(0, 3),
    stop_token_ids=st.sampled_from(((), (7, 8))),
    bad_words=st.sampled_from(((), ((3,), (4, 5), (1, 2, 3), (9, 9, 9, 9, 9, 9)))),
    ignore_eos=st.booleans(),
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    rows=st.lists(st.tuples(samplings, st.lists(st.integers(0, 12), max_size=5).map(tuple)), min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
)
def test_probabilities_are_the_plain_ones(rows: list[tuple[SamplingParams, tuple[int, ...]]], seed: int):
    """Rows of all kinds in one call; each is as it would be alone."""
    sampler = Recorded()
    logits = logits_of(seed, len(rows))
    seqs = [sequence(sampling, generated, seed=i, id=str(i)) for i, (sampling, generated) in enumerate(rows)]
    expected = [plain(row, seq) for row, seq in zip(logits, seqs, strict=True)]
    tokens, scores = pick(sampler, logits.clone(), seqs)
    assert scores == [None] * len(rows)
    for i, (token, p, seq) in enumerate(zip(tokens, expected, seqs, strict=True)):
        assert p[token] > 0, "a token was chosen that cannot be"
        if seq.sampling.temperature:
            assert sampler.final[i].tolist() == pytest.approx(p, abs=1e-5)
        alone, _ = pick(Recorded(), logits[i : i + 1].clone(), [seq])
        assert alone == [token]


def test_penalties_follow_a_sequence_from_step_to_step():
    """Counts are kept between calls; a sequence that ended is forgotten, its name can be taken again."""
    sampler = Recorded()
    sampling = replace(HOT, frequency_penalty=0.5, presence_penalty=0.3, repetition_penalty=1.4)
    seq = sequence(sampling)
    for step in range(12):
        logits = logits_of(step % 2)  # the same few tokens again and again
        expected = plain(logits[0], seq)
        ((token,), _) = pick(sampler, logits, [seq])
        assert sampler.final[0].tolist() == pytest.approx(expected, abs=1e-5)
        seq.tokens.append(token)
    assert len(set(seq.tokens[5:])) < 12, "choose other seeds: nothing was repeated"
    assert sampler.counts
    sampler.forget(seq)
    assert not sampler.counts
    again = sequence(sampling, length=9)
    expected = plain(logits_of(3)[0], again)
    pick(sampler, logits_of(3), [again])
    assert sampler.final[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_no_one_pays_for_penalties_they_did_not_ask_for():
    sampler = Recorded()
    pick(sampler, logits_of(0, 2), [sequence(GREEDY, id="a"), sequence(HOT, id="b")])
    assert not sampler.counts


def test_the_choice_follows_the_probabilities():
    """Frequencies over many seeds, within five standard deviations; and over positions of one seed."""
    count = 20_000
    logits = logits_of(5)
    p = torch.softmax(logits[0].double() / 0.8, dim=-1)
    sampling = replace(HOT, temperature=0.8)
    by_seed = [sequence(sampling, seed=i * 0x9E3779B97F4A7C15 & 0x7FFFFFFFFFFFFFFF) for i in range(count)]
    sampler = Sampler(OPS, VOCAB, EOS, torch.device("cpu"), None)
    tokens, _ = pick(sampler, logits.expand(count, -1).clone(), by_seed)
    positions = OPS.sample(
        logits.expand(count, -1),
        torch.full((count,), 0.8),
        torch.full((count,), 9),
        torch.arange(count),
    )
    for chosen in (torch.tensor(tokens), positions):
        frequency = torch.bincount(chosen, minlength=VOCAB).double() / count
        often = p > 1e-3  # below, five standard deviations are less than one hit; those tokens are counted together
        for found, exact in ((frequency[often], p[often]), (frequency[~often].sum(), p[~often].sum())):
            assert ((found - exact).abs() <= 5 * (exact * (1 - exact) / count).sqrt()).all()


def test_a_seed_and_a_position_decide_alone():
    """Not the row, not the neighbours, not the batch's size."""
    sampler = Recorded()
    logits = logits_of(1)
    seq = sequence(HOT, (5, 6), seed=77)
    ((token,), _) = pick(sampler, logits.clone(), [seq])
    crowd = [sequence(HOT, seed=i, id=str(i)) for i in range(6)]
    for place in range(7):
        seqs = [*crowd[:place], seq, *crowd[place:]]
        tokens, _ = pick(sampler, torch.cat([logits_of(2, place), logits, logits_of(3, 6 - place)]), seqs)
        assert tokens[place] == token
    flat = torch.zeros(1, VOCAB)
    choices = {
        (seed, len(more)): pick(sampler, flat.clone(), [sequence(HOT, more, seed=seed)])[0][0]
        for seed in (0, 1, 2**32, 2**62)
        for more in ((), (5,), (5, 5))
    }
    assert len(set(choices.values())) > 8, "seeds and positions differ"


@pytest.mark.parametrize("temperature", [1e-6, 1e-30])
def test_a_temperature_next_to_zero_is_greedy(temperature: float):
    logits = logits_of(4)
    tokens, _ = pick(Recorded(), logits.clone(), [sequence(replace(HOT, temperature=temperature))])
    assert tokens == [int(logits.argmax())]


def test_the_lowest_of_equals_is_greedy():
    logits = torch.zeros(2, VOCAB)
    logits[:, [9, 30, 60]] = 4.0
    tokens, _ = pick(Recorded(), logits, [sequence(GREEDY, id="a"), sequence(replace(HOT, top_k=1), seed=3, id="b")])
    assert tokens[0] == 9
    assert tokens[1] in (9, 30, 60)
    assert pick(Recorded(), logits[:1], [sequence(GREEDY)])[0] == [9]


def test_logprobs_are_the_models_own():
    """Before bias, penalties, filters and temperature; beside rows that ask for none."""
    logits = logits_of(6, 3)
    table = torch.log_softmax(logits.double(), dim=-1)
    biased = replace(GREEDY, logit_bias=((20, 100.0),), logprobs=3, repetition_penalty=2.0)
    seqs = [
        sequence(biased, (20,), id="a"),
        sequence(GREEDY, id="b"),
        sequence(replace(HOT, logprobs=0, temperature=0.5, top_k=3), id="c"),
    ]
    tokens, scores = pick(Recorded(), logits.clone(), seqs)
    assert tokens[0] == 20
    assert scores[1] is None
    for i, tops in ((0, 3), (2, 0)):
        entry = scores[i]
        assert entry is not None
        assert entry.token_id == tokens[i]
        assert entry.logprob == pytest.approx(float(table[i, tokens[i]]), abs=1e-5)
        assert entry.rank == 1 + int((table[i] > table[i, tokens[i]]).sum())
        best = table[i].topk(tops)
        assert [t for t, _ in entry.top] == best.indices.tolist()
        assert [v for _, v in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_ranks_of_equals_are_the_same():
    (a, b, c) = logprobs(torch.tensor([[1.0, 1.0, 0.0]] * 3), [0, 1, 2], [0, 0, 3])
    assert (a.rank, b.rank, c.rank) == (1, 1, 3)
    assert a.top == ()
    assert len(c.top) == 3


def test_what_ends_a_sequence():
    sampler = Recorded()
    assert sampler.stops(sequence(GREEDY)) == frozenset()
    assert sampler.stops(sequence(replace(GREEDY, stop_token_ids=(5,)))) == {5}
    assert sampler.stops(sequence(replace(HOT, stop_token_ids=(5, 2)))) == {2, 5, 40}
    assert sampler.stops(sequence(replace(HOT, stop_token_ids=(5,), end_token_ids=(7,)))) == {2, 5, 7, 40}
    assert sampler.stops(sequence(replace(GREEDY, end_token_ids=(7,)))) == frozenset()


def test_a_bad_word_is_let_through_where_nothing_else_may_follow():
    sampling = replace(GREEDY, allowed_token_ids=(7, 8), bad_words=((7,), (8, 8)))
    for generated, expected in (((), 8), ((8,), None), ((8, 7), 8)):
        tokens, _ = pick(Recorded(), logits_of(6), [sequence(sampling, generated)])
        assert tokens[0] in (7, 8) if expected is None else tokens == [expected]


def test_a_ban_on_ending_that_leaves_one_token():
    stops = tuple(i for i in range(VOCAB) if i != 33)
    for sampling in (GREEDY, HOT, replace(HOT, top_p=0.1), replace(HOT, top_k=5, min_p=0.5)):
        seq = sequence(replace(sampling, min_tokens=1, stop_token_ids=stops))
        assert pick(Recorded(), logits_of(7), [seq])[0] == [33]
