"""Who goes next: budgets, order, chunks, preemption, groups that are routed together. No model: policy only."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.driving import GREEDY, ask, prompt
from tucka_runtime.engine.block_manager import BlockManager
from tucka_runtime.engine.scheduler import Scheduler, cache_namespace
from tucka_runtime.engine.sequence import Sequence, Status
from tucka_runtime.messages import AdapterKey, Request, Route, RouteScope

KEY = AdapterKey("a", 1)
SCORED = replace(GREEDY, prompt_logprobs=0)  # shares nothing through the cache


def make(blocks: int = 100, size: int = 4, tokens: int = 16, seqs: int = 4) -> Scheduler:
    return Scheduler(BlockManager(blocks, size), tokens, seqs)


def sequences(request: Request, scope: RouteScope | None = None) -> list[Sequence]:
    return [Sequence(request, i, scope, 0, 0.0) for i in range(request.num_sequences)]


def add(scheduler: Scheduler, *lengths: int, scope: RouteScope | None = None, n: int = 1) -> list[Sequence]:
    """One request with a prompt of each length, to an adapter where there is a scope."""
    key = KEY if scope else None
    request = ask(*(prompt(n) for n in lengths), id=str(lengths), sampling=SCORED, n=n, adapter=key)
    made = sequences(request, scope)
    for seq in made:
        scheduler.add(seq)
    return made


def step(scheduler: Scheduler) -> list[tuple[Sequence, int, int]]:
    """One step as (sequence, start, count), carried out: every sequence whose tokens are all known gets a new one."""
    works = scheduler.schedule()
    scheduler.check_integrity()
    for work in works:
        pages = scheduler.blocks.blocks_for(work.start + work.count)
        assert len(work.seq.block_table) >= pages, "every computed token has a page"
        scheduler.computed(work)
        if work.start + work.count == len(work.seq):
            work.seq.tokens.append(7)
    return [(w.seq, w.start, w.count) for w in works]


def test_prompts_are_cut_to_the_budget_and_decodes_go_on_beside_them():
    scheduler = make(tokens=10)
    (short,), (long,) = add(scheduler, 3), add(scheduler, 20)
    assert step(scheduler) == [(short, 0, 3), (long, 0, 7)]
    assert step(scheduler) == [(short, 3, 1), (long, 7, 9)]
    assert step(scheduler) == [(short, 4, 1), (long, 16, 4)]
    assert step(scheduler) == [(short, 5, 1), (long, 20, 1)]


def test_admission_keeps_the_order_of_arrival():
    """A short prompt does not overtake a long one that has no room yet."""
    scheduler = make(blocks=6, size=4)
    (first,), (big,), (small,) = add(scheduler, 15), add(scheduler, 16), add(scheduler, 1)
    assert [s for s, _, _ in step(scheduler)] == [first]
    assert list(scheduler.waiting) == [big, small]
    scheduler.finish(first)
    assert [s for s, _, _ in step(scheduler)] == [big]


def test_no_more_than_max_seqs_run():
    scheduler = make(seqs=2)
    a, b, c = (add(scheduler, 2)[0] for _ in range(3))
    assert [s for s, _, _ in step(scheduler)] == [a, b]
    scheduler.finish(a)
    assert [s for s, _, _ in step(scheduler)] == [b, c]


def test_the_youngest_gives_way_and_comes_back_first():
    """Two sequences that cannot both grow: the second is computed again later, whole, before what waits."""
    scheduler = make(blocks=5, size=2)
    (old,), (young,), (waiting,) = add(scheduler, 4), add(scheduler, 4), add(scheduler, 4)
    step(scheduler)
    assert scheduler.running == [old, young]
    assert step(scheduler) == [(old, 4, 1)]
    assert scheduler.num_preemptions == 1
    assert young.status is Status.WAITING
    assert not young.block_table
    assert young.num_computed == 0
    assert list(scheduler.waiting) == [young, waiting]
    assert step(scheduler) == [(old, 5, 1)]
    scheduler.finish(old)
    assert step(scheduler)[0] == (young, 0, 5)


def test_a_sequence_can_preempt_itself():
    """The youngest needs a page and is the one to give way."""
    scheduler = make(blocks=3, size=2)
    (old,), (young,) = add(scheduler, 3), add(scheduler, 2)
    step(scheduler)
    assert step(scheduler) == [(old, 3, 1)]
    assert young.status is Status.WAITING
    assert scheduler.num_preemptions == 1


def test_a_preempted_sequence_finds_its_own_pages_but_reports_no_gift():
    scheduler = make(blocks=5, size=2)
    old, young = (sequences(ask(prompt(4, i), id=str(i)))[0] for i in range(2))
    scheduler.add(old)
    scheduler.add(young)
    step(scheduler)
    old.scheduled_at = young.scheduled_at = 1.0
    step(scheduler)
    assert young.status is Status.WAITING
    scheduler.finish(old)
    ((seq, start, count),) = step(scheduler)
    assert seq is young
    assert (start, count) == (4, 1), "both pages of its prompt were still there"
    assert young.cached_tokens == 0


def test_prompts_of_one_request_wait_for_a_step_of_their_own_to_be_routed_together():
    scheduler = make(tokens=16)
    (other,) = add(scheduler, 8)
    group = add(scheduler, 5, 5, 5, scope=RouteScope.BATCH)
    assert step(scheduler) == [(other, 0, 8)], "15 do not fit beside 8: they wait"
    assert step(scheduler) == [(other, 8, 1), *((s, 0, 5) for s in group)]


@pytest.mark.parametrize("scope", [RouteScope.REQUEST, None])
def test_others_are_not_held_back(scope: RouteScope | None):
    scheduler = make(tokens=16)
    (other,) = add(scheduler, 8)
    a, b, _ = add(scheduler, 5, 5, 5, scope=scope)
    assert step(scheduler) == [(other, 0, 8), (a, 0, 5), (b, 0, 3)]


@pytest.mark.parametrize(("blocks", "seqs"), [(100, 4), (7, 8)])
def test_a_group_waits_for_seats_and_pages_too(blocks: int, seqs: int):
    """2 of 4 seats, or 4 of 7 pages, are taken when a request of three prompts comes."""
    scheduler = make(blocks=blocks, size=4, seqs=seqs)
    taken = add(scheduler, 7) + add(scheduler, 7)
    step(scheduler)
    group = add(scheduler, 3, 4, 7, scope=RouteScope.BATCH)
    later = add(scheduler, 2, scope=RouteScope.BATCH)
    assert {s for s, _, _ in step(scheduler)} == set(taken)
    for seq in taken:
        scheduler.finish(seq)
    first = [s for s, _, _ in step(scheduler)]
    assert first[:3] == group and set(first) <= {*group, *later}


def test_a_group_is_torn_rather_than_hold_another_flow_up():
    scheduler = make(seqs=4)
    taken = add(scheduler, 7) + add(scheduler, 7)
    step(scheduler)
    group = add(scheduler, 1, 1, 1, scope=RouteScope.BATCH)
    assert [s for s, _, _ in step(scheduler)] == taken
    add(scheduler, 2)
    assert [s for s, _, _ in step(scheduler)] == [*taken, *group[:2]]


def test_a_group_beyond_the_budget_is_torn_rather_than_starved():
    scheduler = make(tokens=16)
    a, b, _ = add(scheduler, 9, 9, 9, scope=RouteScope.BATCH)
    assert step(scheduler) == [(a, 0, 9), (b, 0, 7)]


def test_a_group_beyond_max_seqs_is_torn_rather_than_starved():
    scheduler = make(tokens=16, seqs=2)
    a, b, _ = add(scheduler, 2, 2, 2, scope=RouteScope.BATCH)
    assert step(scheduler) == [(a, 0, 2), (b, 0, 2)]


def test_finish_takes_a_sequence_out_of_either_queue():
    scheduler = make(seqs=1)
    (a,), (b,) = add(scheduler, 3), add(scheduler, 3)
    step(scheduler)
    scheduler.finish(b)
    scheduler.finish(a)
    assert not scheduler.running and not scheduler.waiting
    assert a.status is b.status is Status.FINISHED
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def test_the_last_token_is_never_taken_from_the_cache():
    scheduler = make(size=4)
    for i in range(2):
        seq = sequences(ask(prompt(8), id=str(i)))[0]
        scheduler.add(seq)
        ((_, start, count),) = step(scheduler)
        assert (start, count) == ((0, 8), (4, 4))[i]
        scheduler.finish(seq)


def test_namespaces():
    """What may share KV has the same namespace; what is routed by its batch, not routed yet, or scored, has none."""
    key, later = AdapterKey("a", 1), AdapterKey("a", 2)
    lora, again = ask(prompt(9), adapter=key), ask(prompt(5), id="x", adapter=key)
    spaces = [
        cache_namespace(sequences(request)[0])
        for request in (
            ask(prompt(9)),
            ask(prompt(9), salt="t"),
            lora,
            replace(lora, cache_salt="t"),
            ask(prompt(9), adapter=later),
            ask(prompt(9), salt="('a', 1)"),
            ask(prompt(9), salt="\udcff"),
        )
    ]
    assert None not in spaces
    assert len(set(spaces)) == len(spaces)
    assert cache_namespace(sequences(again)[0]) == spaces[2]
    assert cache_namespace(sequences(lora, RouteScope.BATCH)[0]) is None
    routed = [sequences(lora, scope)[0] for scope in (RouteScope.REQUEST, RouteScope.PREFIX) for _ in range(2)]
    assert {cache_namespace(seq) for seq in routed} == {None}
    for seq, weight in zip(routed, (0.5, 0.5 + 2**-24, 0.5, 0.6), strict=True):
        seq.route = Route(1, (weight, 0.7))
    own = [cache_namespace(seq) for seq in routed]
    assert own[0] == own[2], "the route counts, not what it came from"
    assert len({*own, *spaces}) == 3 + len(spaces)
    assert cache_namespace(sequences(replace(lora, sampling=SCORED))[0]) is None
    short, long, longer = (cache_namespace(sequences(ask(prompt(n)))[0], 10) for n in (10, 11, 12))
    assert short == spaces[0]
    assert len({short, long, longer}) == 3


def test_a_token_is_due_with_a_sequences_last():
    """A token that is chosen and not known yet is its last; a prompt that is only being routed chooses nothing."""
    scheduler = Scheduler(BlockManager(8, 4), 4, 2)
    seq = sequences(ask(prompt(5)))[0]
    scheduler.add(seq)
    first, last = scheduler.schedule()[0], scheduler.schedule()[0]
    assert (first.start, first.count, first.due) == (0, 4, False)
    assert (last.start, last.count, last.due) == (4, 1, True)
    assert not scheduler.schedule(), "there is nothing left to compute"
    seq.pending = 1
    (ahead,) = scheduler.schedule()
    assert (ahead.start, ahead.count, ahead.due) == (5, 1, True)
    seq.routing = True
    assert not ahead.due


def test_what_ends_with_its_pending_token_is_not_scheduled_again():
    scheduler = Scheduler(BlockManager(8, 4), 8, 2)
    seq = sequences(ask(prompt(5), sampling=replace(GREEDY, max_tokens=2)))[0]
    scheduler.add(seq)
    scheduler.schedule()
    seq.pending = 1
    assert scheduler.schedule()
    seq.pending = 2
    assert not scheduler.schedule()


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=1, max_size=6),
    scopes=st.lists(
        st.sampled_from((None, RouteScope.BATCH, RouteScope.REQUEST, RouteScope.PREFIX)), min_size=6, max_size=6
    ),
    size=st.integers(1, 5),
    blocks=st.integers(0, 8),
    tokens=st.integers(4, 20),
    seqs=st.integers(1, 4),
    new=st.integers(0, 8),
)
def test_everything_is_computed_in_order_and_comes_to_an_end(
    lengths: list[list[int]],
    scopes: list[RouteScope | None],
    size: int,
    blocks: int,
    tokens: int,
    seqs: int,
    new: int,
):
    """No token is skipped or computed on top of a missing one, budgets hold, and the oldest always gets further."""
    least = -(-(12 + new) // size)
    scheduler = make(least + blocks, size, tokens, seqs)
    left = [s for own, scope in zip(lengths, scopes, strict=False) for s in add(scheduler, *own, scope=scope)]
    for _ in range(2000):
        if not left:
            break
        oldest = scheduler.running[0] if scheduler.running else scheduler.waiting.next().waiting[0]
        before = {id(s): s.num_computed for s in left}
        works = scheduler.schedule()
        scheduler.check_integrity()
        assert works and sum(w.count for w in works) <= tokens
        assert len({id(w.seq) for w in works}) == len(works)
        assert works[0].seq is oldest, "the oldest is served first"
        for work in works:
            assert work.count > 0
            assert work.start + work.count == work.seq.num_computed
            assert not work.start or before[id(work.seq)] in (0, work.start), "only the cache skips tokens"
            assert len(work.seq.block_table) * size >= work.start + work.count
            scheduler.computed(work)
            if work.due:
                if work.seq.num_generated == new:
                    scheduler.finish(work.seq)
                    left.remove(work.seq)
                else:
                    work.seq.tokens.append(50 + work.seq.num_generated)
    assert not left, "livelock"
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def beside_a_stream(*lengths: int, scope: RouteScope | None = None) -> tuple[Scheduler, Sequence]:
    """A sequence that decodes, and a request with prompts of these lengths waiting."""
    scheduler = make(tokens=64, seqs=8)
    (stream,) = add(scheduler, 5)
    scheduler.schedule()
    stream.tokens.append(7)
    add(scheduler, *lengths, scope=scope)
    return scheduler, stream


def test_prompts_beside_a_stream_take_what_they_are_given_first_come_first_served() -> None:
    scheduler, stream = beside_a_stream(10, 10)
    steps = []
    for _ in range(4):
        steps.append([chunk.count for chunk in scheduler.schedule(prompt_tokens=8)])
        stream.tokens.append(7)
    assert steps == [[1, 8], [1, 2, 6], [1, 4], [1]]


def test_a_step_may_be_the_streams_alone() -> None:
    scheduler, _ = beside_a_stream(10)
    assert [chunk.count for chunk in scheduler.schedule(prompt_tokens=0)] == [1]
    assert len(scheduler.waiting) == 1


def test_without_a_stream_prompts_take_the_whole_step() -> None:
    scheduler = make(tokens=64)
    add(scheduler, 40)
    assert [chunk.count for chunk in scheduler.schedule(prompt_tokens=8)] == [40]


def test_what_is_routed_with_its_batch_is_not_cut() -> None:
    scheduler, _ = beside_a_stream(10, 10, scope=RouteScope.BATCH)
    assert [chunk.count for chunk in scheduler.schedule(prompt_tokens=8)] == [1, 10, 10]
