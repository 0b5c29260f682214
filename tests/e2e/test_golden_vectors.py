"""The engine reproduces what the authors' TuckA code computed (tests/golden/README.md): routes, scores, cores, logits
at all positions, greedy generations; each recording solo or batched as it was made."""

import itertools
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support import GOLDEN
from tests.support.driving import GREEDY, Answer, Recorder, ask, build, drain, relative, route_of, routed_cores, run
from tucka_runtime.engine.adapters.fold import locate
from tucka_runtime.engine.engine import Engine
from tucka_runtime.errors import InvalidAdapterError
from tucka_runtime.messages import AdapterKey, Route, RouteScope

LATE = "llama-routername-late-k1"
TOLERANCE = 1e-4  # absolute on scores and weights, relative L2 on rows of logits and on cores
KEY = AdapterKey("golden", 1)

CASES = sorted(p.parent.name for p in GOLDEN.glob("*/expected.json") if not p.parent.name.startswith("train-"))
SERVED = [name for name in CASES if name != LATE]


@dataclass
class Case:
    folder: Path
    meta: dict[str, Any]
    data: dict[str, Tensor]
    engine: Engine
    recorder: Recorder

    def rows(self, name: str) -> list[list[int]]:
        return self.data[f"{name}.input_ids"].tolist()


@cache
def served(name: str) -> Case:
    folder = GOLDEN / name
    meta = json.loads((folder / "expected.json").read_text())
    # At most as many tokens in a pass as the largest recording has: nothing of it may be cut.
    engine = build(folder / meta["base"], dtype="float32", block_size=5)
    engine.load_adapter(KEY, folder / "adapter")
    return Case(folder, meta, load_file(folder / "expected.safetensors"), engine, Recorder(engine))


def names(case: str, kind: str) -> list[str]:
    meta = json.loads((GOLDEN / case / "expected.json").read_text())
    return [entry["name"] for entry in meta[kind]]


def recordings(kind: str) -> list[tuple[str, str]]:
    """(case, name) of every recording but the padded ones, which have tests of their own."""
    return [(case, name) for case in SERVED for name in names(case, kind) if name != "padded"]


PADDED = [name for name in SERVED if "padded" in names(name, "forwards")]


def scores_of(case: Case, logits: Tensor) -> Tensor:
    """All k·t scores from a router's logits."""
    z = logits.view(-1, case.meta["t"])
    return torch.sigmoid(z / torch.linalg.vector_norm(z, dim=1, keepdim=True)).view(-1)


def check_route(route: Route | None, group: Tensor, weights: Tensor) -> None:
    assert route is not None
    assert route.group == int(group)
    assert torch.allclose(torch.tensor(route.weights), weights, rtol=0, atol=TOLERANCE)


def check_cores(case: Case, name: str, route: Route) -> None:
    """The routed core M of every adapted module, from the folded adapter as it is served."""
    cores = routed_cores(case.engine.adapters[KEY], route)
    where = locate(case.engine.runner.arch)
    paths = [key.removeprefix(f"{name}.M.") for key in case.data if key.startswith(f"{name}.M.")]
    assert sorted(paths) == sorted(case.meta["adapted_modules"])
    for path in paths:
        assert relative(cores[where[path]].flatten(), case.data[f"{name}.M.{path}"].flatten()) < TOLERANCE


def test_every_public_vector_is_here():
    assert len(CASES) == 13
    assert len(recordings("forwards")) == 96
    assert len(recordings("generations")) == 60
    assert len(PADDED) == 2


def scoped() -> list[tuple[str, str, RouteScope]]:
    """Of a prompt alone both scopes make the same; several were recorded under one route for all."""
    found = recordings("forwards")
    both = [(case, name, RouteScope.REQUEST) for case, name in found if name != "batch3"]
    return [(case, name, RouteScope.BATCH) for case, name in found] + both


@pytest.mark.parametrize(("name", "forward", "scope"), scoped())
def test_forward(name: str, forward: str, scope: RouteScope):
    case = served(name)
    prompts = case.rows(f"fwd.{forward}")
    sampling = replace(GREEDY, max_tokens=0, prompt_logprobs=2)
    id = f"{forward}-{scope}"
    case.recorder.router_means.clear()
    (answers,) = run(case.engine, ask(*prompts, id=id, sampling=sampling, adapter=KEY, scope=scope))
    data = {key.removeprefix(f"fwd.{forward}."): value for key, value in case.data.items()}
    for i, answer in enumerate(answers):
        assert relative(case.recorder.of(id, i), data["logits"][i]) < TOLERANCE
        check_scores(answer, prompts[i], data["logits"][i])
        (route,) = case.recorder.routes[id, i]
        check_route(route, data["group"], data["weights"])
        assert answer.route is not None
        assert answer.route.route == route and answer.route.changes == 0
    check_cores(case, f"fwd.{forward}", route)
    routed = case.engine.adapters[KEY].routed
    if routed.router.table is not None:  # routed from token ids: the mean is never formed
        assert not case.recorder.router_means
        scores = scores_of(case, routed.router.table[torch.tensor(prompts).flatten()].mean(dim=0))
    else:
        (mean,) = case.recorder.router_means
        assert relative(mean, data["router_mean"]) < TOLERANCE
        scores = scores_of(case, routed.router.centroids @ mean)
    assert torch.allclose(scores, data["scores"], rtol=0, atol=TOLERANCE)


def check_scores(answer: Answer, prompt: list[int], logits: Tensor) -> None:
    """Log-probabilities of the prompt's tokens, as the HTTP door gives them with echo."""
    assert answer.prompt_logprobs is not None
    assert answer.prompt_logprobs[0] is None
    expected = torch.log_softmax(logits, dim=-1)
    for i, entry in enumerate(answer.prompt_logprobs[1:]):
        assert entry is not None
        assert entry.token_id == prompt[i + 1]
        assert entry.logprob == pytest.approx(float(expected[i, prompt[i + 1]]), abs=1e-3)
        best = expected[i].topk(2).values.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best, abs=1e-3)
    assert len(answer.prompt_logprobs) == len(prompt)


@pytest.mark.parametrize(("name", "generation"), recordings("generations"))
def test_generation(name: str, generation: str):
    """Every step's route, its weights and scores' winner, the logits that chose the token, and the token."""
    case = served(name)
    data = {key.removeprefix(f"gen.{generation}."): value for key, value in case.data.items()}
    prompts = data["input_ids"].tolist()
    id, steps = f"gen-{generation}", data["tokens"].shape[1]
    sampling = replace(GREEDY, max_tokens=steps)
    (answers,) = run(case.engine, ask(*prompts, id=id, sampling=sampling, adapter=KEY))
    groups = data["groups"].tolist()
    for i, answer in enumerate(answers):
        assert answer.token_ids == data["tokens"][i].tolist()
        chosen = case.recorder.of(id, i)[len(prompts[i]) - 1 :]
        assert relative(chosen, data["logits"][:, i]) < TOLERANCE
        routes = case.recorder.routes[id, i]
        assert len(routes) == steps
        for route, group, weights in zip(routes, groups, data["weights"], strict=True):
            check_route(route, group, weights)
        assert answer.route is not None
        assert answer.route.route == routes[0]
        assert answer.route.changes == sum(a != b for a, b in itertools.pairwise(groups))


@pytest.mark.parametrize("name", CASES)
def test_base_alone(name: str):
    """Without the adapter, though it is loaded and another row of the same pass uses it."""
    meta = json.loads((GOLDEN / name / "expected.json").read_text())
    if name == LATE:
        engine = build(GOLDEN / name / meta["base"], dtype="float32")
        data, recorder = load_file(GOLDEN / name / "expected.safetensors"), Recorder(engine)
        companions = []
    else:
        case = served(name)
        engine, data, recorder = case.engine, case.data, case.recorder
        companions = [
            ask(case.rows("fwd.batch3")[0], id="adapted", sampling=replace(GREEDY, max_tokens=1), adapter=KEY)
        ]
    ids = data["fwd.single.input_ids"].tolist()
    base = ask(*ids, id="base", sampling=replace(GREEDY, max_tokens=1))
    run(engine, base, *companions)
    assert relative(recorder.of("base"), data["base.single.logits"].view(len(ids[0]), -1)) < TOLERANCE


@pytest.mark.parametrize("name", PADDED)
def test_padded_rows(name: str, tmp_path: Path):
    """The recording's mean counts pads, ours never does. With pads counted the scores are the recorded ones; under that
    route the real tokens' logits are too; and our own route is that of the real tokens alone."""
    case = served(name)
    data = {key.removeprefix("fwd.padded."): v for key, v in case.data.items() if key.startswith("fwd.padded.")}
    ids, mask = data["input_ids"], data["attention_mask"].bool()
    routed = case.engine.adapters[KEY].routed
    assert routed is not None
    scores = scores_of(case, routed.router.centroids @ data["router_mean"])
    assert torch.allclose(scores, data["scores"], rtol=0, atol=TOLERANCE)
    if routed.router.table is not None:
        logits = routed.router.table[ids.flatten()].mean(dim=0)
        assert torch.allclose(scores_of(case, logits), data["scores"], rtol=0, atol=TOLERANCE)
        check_route(route_of(logits, routed.router.t), data["group"], data["weights"])
    pinned = AdapterKey("pinned", 1)
    engine = build(case.folder / case.meta["base"], dtype="float32")
    engine.load_adapter(pinned, case.folder / "adapter", Route(int(data["group"]), tuple(data["weights"].tolist())))
    recorder = Recorder(engine)
    prompts = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    run(engine, ask(*prompts, sampling=replace(GREEDY, max_tokens=0), adapter=pinned))
    for i, keep in enumerate(mask):
        assert relative(recorder.of("r", i), data["logits"][i][keep]) < TOLERANCE
    own = [ask(*prompts, id="unpadded", sampling=replace(GREEDY, max_tokens=1), adapter=KEY)]
    run(case.engine, *own)
    (route,) = set(case.recorder.routes["unpadded", 0])
    if routed.router.table is not None:
        real = route_of(routed.router.table[ids[mask]].mean(dim=0), routed.router.t)
        check_route(route, torch.tensor(real.group), torch.tensor(real.weights))
        assert route.weights != pytest.approx(data["weights"].tolist(), abs=TOLERANCE)


def test_a_router_that_runs_late_is_refused(golden: Path):
    meta = json.loads((golden / LATE / "expected.json").read_text())
    engine = build(golden / LATE / meta["base"])
    with pytest.raises(InvalidAdapterError, match="runs after another module"):
        engine.load_adapter(KEY, golden / LATE / "adapter")
    assert not engine.adapters.loaded


@pytest.mark.parametrize("name", SERVED)
def test_one_pass_holds_what_was_recorded_together(name: str):
    """A list of prompts is routed as one batch even where a running request leaves too little room for all of them."""
    case = served(name)
    engine = build(case.folder / case.meta["base"], dtype="float32", max_num_batched_tokens=36, max_num_seqs=8)
    engine.load_adapter(KEY, case.folder / "adapter")
    recorder = Recorder(engine)
    prompts = case.rows("fwd.batch3")
    answers = {("other", 0): Answer(), **{("batch", i): Answer() for i in range(len(prompts))}}
    engine.add(ask(prompts[0] + prompts[1], id="other", sampling=replace(GREEDY, max_tokens=12)))
    engine.add(ask(*prompts, id="batch", sampling=replace(GREEDY, max_tokens=0), adapter=KEY))
    drain(engine, answers)
    for i in range(len(prompts)):
        (route,) = recorder.routes["batch", i]
        check_route(route, case.data["fwd.batch3.group"], case.data["fwd.batch3.weights"])
        assert relative(recorder.of("batch", i), case.data["fwd.batch3.logits"][i]) < TOLERANCE
