"""The whole engine on the fused kernels, on a tiny model in fp32: on a GPU, or where there is none in Triton's
interpreter, which runs what a GPU would."""

import gc
from dataclasses import replace

import pytest
import torch

from tests.support.banks import save_bank
from tests.support.driving import VOCAB, ask, build, prompt, run, save_lora, save_model, save_tucka
from tucka_runtime.channel_messages import AdapterPart
from tucka_runtime.engine.bucket import Bucket
from tucka_runtime.engine.capture import rehearse
from tucka_runtime.engine.engine import Engine
from tucka_runtime.engine.filtered_choice import FilteredChoice
from tucka_runtime.engine.prompt_bucket import PromptBucket
from tucka_runtime.messages import AdapterKey, RouteScope, SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.interpreted
EARLY, LATE, PLAIN, DORA, BANK, BOTH = (
    AdapterKey(name, 1) for name in ("early", "late", "plain", "dora", "bank", "both")
)
SHORT = {"max_num_batched_tokens": 16}
"""Every row that fills up a step takes the interpreter its time."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_tokens_equal_the_reference_paths(tmp_path, kind):
    """Base, TuckA routed by token and inside the model, LoRA of another rank, DoRA, a bank's members, mixed in one
    batch; prefill in chunks. A second layer costs as much again, in the interpreter, and one family shows it."""
    save_model(
        tmp_path / "model", kind, **{"llama": {}, "gpt2": {"n_layer": 1}, "qwen3": {"num_hidden_layers": 1}}[kind]
    )
    attention = ("c_attn",) if kind == "gpt2" else ("q_proj", "v_proj")
    output = ("c_proj",) if kind == "gpt2" else ("o_proj", "down_proj")

    def answers(kernels: str) -> list[list[int]]:
        engine: Engine = build(
            tmp_path / "model", kernels=kernels, device=DEVICE, max_num_batched_tokens=24, max_num_seqs=6
        )
        engine.overlap = kernels == "fused"
        engine.rehearsal.warm_up()
        layout = engine.layout
        engine.load_adapter(EARLY, save_tucka(tmp_path / "early", layout, targets=attention))
        engine.load_adapter(LATE, save_tucka(tmp_path / "late", layout, seed=1, targets=output, r=6))
        engine.load_adapter(PLAIN, save_lora(tmp_path / "plain", layout, targets=attention + output, r=18))
        engine.load_adapter(DORA, save_lora(tmp_path / "dora", layout, targets=attention + output, dora=True))
        bank = save_bank(tmp_path / "banks" / "bank", layout, "full", targets=attention + output)
        engine.load_adapter(BANK, bank)
        greedy = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        drawn = SamplingParams(max_tokens=3, temperature=0.9, top_k=20, top_p=0.9, seed=5, ignore_eos=True)
        done = run(
            engine,
            ask(prompt(5), id="base", sampling=drawn),
            ask(prompt(7, 1), id="early", adapter=EARLY, sampling=greedy),
            ask(prompt(3, 2), id="early-request", adapter=EARLY, scope=RouteScope.REQUEST, sampling=drawn),
            ask(prompt(6, 3), id="late", adapter=LATE, sampling=greedy),
            ask(prompt(4, 4), id="plain", adapter=PLAIN, sampling=greedy),
            ask(prompt(5, 5), id="dora", adapter=DORA, sampling=greedy),
            replace(ask(prompt(4, 6), id="member 3", adapter=BANK, sampling=greedy), member=3),
            replace(ask(prompt(3, 7), id="member 1", adapter=BANK, sampling=greedy), member=1),
        )
        if engine.runner.graphs is not None:
            assert any(shape.affine for shape in engine.runner.graphs.buckets), "decoding went by the graphs' tables"
        return [answer.token_ids for sequences in done for answer in sequences]

    assert answers("fused") == answers("reference")


@pytest.mark.timeout(600)
def test_an_int8_cache_gives_the_reference_paths_tokens(tmp_path):
    """Decoding by graphs' tables, whose empty rows write nothing."""
    save_model(tmp_path / "model", sliding_window=8, kind="mistral", num_hidden_layers=1)
    found = []
    for kernels in ("fused", "reference"):
        engine: Engine = build(
            tmp_path / "model", kernels=kernels, device=DEVICE, max_num_seqs=2, kv_cache_dtype="int8"
        )
        engine.overlap = kernels == "fused"
        greedy = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        done = run(engine, *(ask(prompt(9 + i, i), id=f"{i}", sampling=greedy) for i in range(2)))
        found.append([answer.token_ids for sequences in done for answer in sequences])
    assert found[0] == found[1]


@pytest.mark.timeout(600)
def test_prompts_in_graphs_give_the_reference_paths_tokens(tmp_path, monkeypatch):
    """Prompts in chunks beside decoding rows: of the base, routed with their batch or by their own tokens, a bank's
    members, a combination of a routed adapter and a LoRA, a drawn token by a filter. What the graphs' tables cannot
    hold, a scored prompt here, runs without."""
    save_model(tmp_path / "model", num_hidden_layers=1)
    ran: list[tuple[int, int]] = []
    real = PromptBucket.run

    def counted(self):
        ran.append((self.rows, len(self.due)))
        real(self)

    monkeypatch.setattr(PromptBucket, "run", counted)

    def answers(kernels: str) -> list[list[int]]:
        engine: Engine = build(
            tmp_path / "model", kernels=kernels, device=DEVICE, max_num_batched_tokens=12, max_num_seqs=6
        )
        engine.overlap = kernels == "fused"
        engine.runner.warm_up()
        layout = engine.layout
        engine.load_adapter(EARLY, save_tucka(tmp_path / "early", layout, targets=("q_proj", "o_proj")))
        plain = save_lora(tmp_path / "plain", layout, targets=("q_proj", "down_proj"), r=5)
        parts = [AdapterPart(folder, None, None, None, 0.7) for folder in (tmp_path / "early", plain)]
        engine.add_adapter(engine.combine_adapters(BOTH, parts)[0])
        engine.load_adapter(BANK, save_bank(tmp_path / "banks" / "bank", layout, "full", targets=("q_proj",)))
        ran.clear()
        greedy = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        drawn = SamplingParams(max_tokens=3, temperature=0.9, top_k=20, top_p=0.9, seed=5, ignore_eos=True)
        done = run(
            engine,
            ask(prompt(14), id="base", sampling=drawn),
            ask(prompt(7, 1), id="early", adapter=EARLY, sampling=greedy),
            ask(prompt(9, 2), id="early-request", adapter=EARLY, scope=RouteScope.REQUEST, sampling=drawn),
            ask(prompt(6, 3), id="both", adapter=BOTH, sampling=greedy),
            replace(ask(prompt(4, 6), id="member 3", adapter=BANK, sampling=greedy), member=3),
            ask(prompt(4, 7), id="scored", sampling=replace(greedy, prompt_logprobs=1)),
        )
        return [answer.token_ids for sequences in done for answer in sequences]

    mine = answers("fused")
    assert {rows for rows, _ in ran} == {12} and 0 in {due for _, due in ran} and max(due for _, due in ran) > 2
    assert mine == answers("reference")


def test_an_idle_engine_makes_the_graphs_that_its_adapters_will_want(tmp_path):
    """One at a time; then no batch has to wait for one, whoever is in it."""
    save_model(tmp_path / "model", num_hidden_layers=1)
    engine: Engine = build(tmp_path / "model", kernels="fused", device=DEVICE, max_num_seqs=2, **SHORT)
    engine.overlap = True
    engine.rehearsal.warm_up()
    graphs = engine.runner.graphs
    assert graphs is not None and not engine.rehearsal.prepare()
    engine.load_adapter(EARLY, save_tucka(tmp_path / "early", engine.layout, targets=("q_proj",)))
    engine.load_adapter(PLAIN, save_lora(tmp_path / "plain", engine.layout, targets=("o_proj",), r=40))
    # Two sizes of graphs for batches of either adapter and of both, with ranks that warm_up did not know, and one for
    # steps with prompts; then prompts without.
    assert sum(iter(engine.rehearsal.prepare, False)) == 6 + 3 + 2
    ready = set(graphs.buckets)
    greedy = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    for who in ([EARLY], [PLAIN], [EARLY, PLAIN], [EARLY, None]):
        run(engine, *(ask(prompt(4, i), id=f"{i}", adapter=key, sampling=greedy) for i, key in enumerate(who)))
    assert set(graphs.buckets) == ready


def test_batches_take_the_smallest_graph_that_can_until_theirs_is_made(tmp_path):
    """Nothing is captured under requests that another graph can run, and a larger adapter leaves what there is."""
    save_model(tmp_path / "model", num_hidden_layers=1)
    engine: Engine = build(tmp_path / "model", kernels="fused", device=DEVICE, max_num_seqs=2, **SHORT)
    engine.overlap = True
    engine.rehearsal.warm_up()
    graphs = engine.runner.graphs
    assert graphs is not None
    first = dict(graphs.buckets)
    engine.load_adapter(EARLY, save_tucka(tmp_path / "early", engine.layout, targets=("q_proj",)))
    greedy = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)

    def answer():
        return run(engine, ask(prompt(4), adapter=EARLY, sampling=greedy))[0][0].token_ids

    by_more = answer()
    wanted = [(16, {0}, True), (1, {0}, False)]
    assert graphs.buckets == first and [(s.rows, s.kinds, s.prompts) for s in graphs.missed] == wanted
    while engine.rehearsal.prepare():
        pass
    own = next(b for s, b in graphs.buckets.items() if (s.rows, s.kinds, s.prompts) == (1, {0}, False))
    assert not graphs.missed and answer() == by_more
    engine.load_adapter(PLAIN, save_lora(tmp_path / "plain", engine.layout, targets=("q_proj",), r=40))
    while engine.rehearsal.prepare():
        pass
    active = engine.adapters.activate([EARLY])
    assert graphs.bucket(1, active) is own and all(graphs.buckets[s] is b for s, b in first.items())
    assert answer() == by_more


def test_a_graph_made_between_two_steps_leaves_the_chosen_tokens(tmp_path):
    """The next step starts from them; the rehearsal before a capture chooses tokens too."""
    save_model(tmp_path / "model")
    engine: Engine = build(tmp_path / "model", kernels="fused", device=DEVICE, max_num_seqs=4)
    graphs = engine.runner.graphs
    assert graphs is not None
    graphs.shared.chosen.tokens.fill_(VOCAB)
    with torch.inference_mode():
        rehearse(graphs.shared, graphs.bucket(4, None)._step)
    assert graphs.shared.chosen.tokens.tolist() == [VOCAB] * 4


def test_graphs_share_one_block_table_that_a_new_one_leaves_alone(tmp_path):
    """Else each would keep one as long as contexts can be. What the last batch's graph reads, and what of the next is
    being written, stays as it is while another is made."""
    save_model(tmp_path / "model", num_hidden_layers=1)
    engine: Engine = build(tmp_path / "model", kernels="fused", device=DEVICE, max_num_seqs=2)
    graphs = engine.runner.graphs
    assert graphs is not None
    blocks = graphs.shared.blocks
    blocks.on_device["table"].fill_(7)
    writing = blocks.on_host["table"].data_ptr()
    with torch.inference_mode():
        one, other = (graphs.bucket(rows, None) for rows in (1, 2))
    assert one.attention.block_table is other.attention.block_table is blocks.on_device["table"]
    assert one.fields.on_device.keys() == other.fields.on_device.keys() and "table" not in one.fields.on_device
    assert blocks.on_device["table"].eq(7).all() and blocks.on_host["table"].data_ptr() == writing


def test_filters_are_a_graph_behind_the_batchs_own(tmp_path, monkeypatch):
    """It runs where a row asks for one, and chooses for all rows what the sampler would; a batch that asks for none
    does not have it."""
    save_model(tmp_path / "model", num_hidden_layers=1)
    engine: Engine = build(tmp_path / "model", kernels="fused", device=DEVICE, max_num_seqs=4, **SHORT)
    engine.overlap = True
    engine.rehearsal.warm_up()
    graphs, sampler = engine.runner.graphs, engine.runner.sampler
    assert graphs is not None and sorted(graphs.filtered) == graphs.sizes
    seen: list[int] = []

    def checked(self, seqs):
        logits = self.shared.logits[: len(seqs)].clone()
        real(self, seqs)
        mine = self.shared.chosen.tokens[: len(seqs)].clone()
        assert torch.equal(mine, sampler.choose(logits, seqs).tokens)
        seen.append(self.rows)

    real = FilteredChoice.run
    monkeypatch.setattr(FilteredChoice, "run", checked)
    plain = [SamplingParams(max_tokens=3, temperature=t, seed=1, ignore_eos=True) for t in (0.0, 0.8)]
    run(engine, *(ask(prompt(4, i), id=f"{i}", sampling=own) for i, own in enumerate(plain)))
    assert not seen
    greedy = replace(plain[0], top_k=3)
    run(engine, ask(prompt(4), sampling=greedy))
    assert not seen, "the best is the best of any part"
    parts = [replace(plain[1], **own) for own in ({"top_k": 5}, {"top_p": 0.6, "temperature": 1.3}, {"min_p": 0.2})]
    for asked in ([*parts, plain[1]], [parts[0], greedy]):
        run(engine, *(ask(prompt(4, i), id=f"{i}", sampling=own) for i, own in enumerate(asked)))
    assert set(seen) == {4, 2}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_replay_is_the_same_launches_bit_for_bit(tmp_path, monkeypatch, kind):
    """Adapters, ranks, routes, lengths and company change after a graph was captured. GPT-2's are LoRAs: it adds
    positions to what routers read, so that a batch's route is found inside the model, which no graph does."""
    save_model(tmp_path / "model", kind)
    attention = ("c_attn",) if kind == "gpt2" else ("q_proj", "v_proj")
    engine: Engine = build(tmp_path / "model", device="cuda", dtype="bfloat16", max_num_seqs=6)
    for key, r, seed in ((EARLY, 4, 0), (LATE, 6, 1)):
        save = save_lora if kind == "gpt2" else save_tucka
        engine.load_adapter(key, save(tmp_path / key.name, engine.layout, targets=attention, r=r, seed=seed))
    engine.load_adapter(PLAIN, save_lora(tmp_path / "plain", engine.layout, targets=attention, r=18))
    replays = 0

    def both(bucket: Bucket) -> None:
        nonlocal replays
        chosen = bucket.shared.chosen.tokens
        before = chosen.clone()
        bucket._graph.replay()
        logits, tokens = bucket.logits.clone(), bucket.tokens.clone()
        chosen.copy_(before)
        bucket._step()
        real = len(bucket.due)
        assert torch.equal(bucket.logits[:real], logits[:real])
        assert torch.equal(bucket.tokens[:real], tokens[:real])
        replays += 1

    monkeypatch.setattr(Bucket, "run", both)
    for round in range(6):
        keys = [None, EARLY, LATE, PLAIN, EARLY, LATE][round:] + [PLAIN] * round
        sampling = SamplingParams(max_tokens=4 + round, temperature=0.7, seed=round, ignore_eos=True)
        run(
            engine,
            *(ask(prompt(3 + 5 * i, i), id=f"{round}-{i}", adapter=k, sampling=sampling) for i, k in enumerate(keys)),
        )
    assert replays > 20
    shapes = [shape for shape in engine.runner.graphs.buckets if not shape.prompts]
    assert len(shapes) <= 8, "graphs are per size of batch, not per membership"


def test_what_was_unloaded_is_not_kept_for_the_next_batch(tmp_path):
    """Its bytes stay booked as long as anything knows it: on a GPU as long as it takes memory."""
    save_model(tmp_path / "model", num_hidden_layers=1)
    engine: Engine = build(tmp_path / "model", kernels="fused", device=DEVICE, max_num_seqs=2)
    engine.overlap = True
    engine.load_adapter(PLAIN, save_lora(tmp_path / "plain", engine.layout, targets=("q_proj",), r=4))
    run(engine, ask(prompt(3), adapter=PLAIN))
    assert engine.runner.memory.taken
    engine.unload_adapter(PLAIN)
    gc.collect()
    assert not engine.runner.memory.taken
