"""Drives an engine from a test: tiny random models and adapters, requests to the end, every row's logits.

Every engine that `build` makes has NaN in all of its KV slots, so that a read of one that was never written shows.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tucka_runtime.adapters.format import LoRASpec, TuckASpec, write_adapter
from tucka_runtime.config import EngineConfig
from tucka_runtime.engine.adapters.folded import FoldedAdapter, Where
from tucka_runtime.engine.engine import Engine
from tucka_runtime.kernels.reference.core import core
from tucka_runtime.kernels.reference.route import select
from tucka_runtime.kernels.tables.blocks import scales
from tucka_runtime.kernels.tables.routes import RoutePlan
from tucka_runtime.messages import (
    AdapterKey,
    BaseLayout,
    FinishReason,
    Pooling,
    Request,
    Route,
    RouteReport,
    RouteScope,
    SamplingParams,
    SequenceOutput,
    TokenLogprob,
)

VOCAB = 97  # no multiple of anything
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)

_ROTARY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_model(folder: Path, kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any):
    """Writes a random model of a family and returns it, in fp32 and with all of its parameters away from their fresh
    values: norms are not 1, biases not 0."""
    shard = changes.pop("max_shard_size", "1GB")
    config = CONFIG_MAPPING[kind](**{**(_GPT2 if kind == "gpt2" else _ROTARY), **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return model.float()


def build(folder: Path, **settings: Any) -> Engine:
    """An engine whose steps do not depend on how fast the machine is."""
    fixed = {"model": str(folder), "kv_cache_tokens": 1024, "device": "cpu", "decode_stretch": 0}
    engine = Engine(EngineConfig(**{**fixed, **settings}))
    poison(engine)
    return engine


def poison(engine: Engine) -> None:
    for pair in engine.runner.caches:
        for cache in pair:
            (scales(cache) if cache.dtype == torch.int8 else cache).fill_(float("nan"))


@dataclass
class Answer:
    """All that came out for one sequence."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    last: SequenceOutput | None = None

    @property
    def route(self) -> RouteReport | None:
        assert self.last is not None
        return self.last.route

    def take(self, out: SequenceOutput) -> None:
        assert self.finish_reason is None, "an output came after the last one"
        self.token_ids += out.token_ids
        self.logprobs += out.logprobs or []
        if out.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "the prompt's log-probabilities came twice"
            self.prompt_logprobs = out.prompt_logprobs
        self.finish_reason, self.last = out.finish.reason if out.finish else None, out


Answers = dict[tuple[str, int], Answer]


def drain(engine: Engine, answers: Answers, steps: int = 10_000) -> None:
    """Steps until nothing is left; the books are checked after every step."""
    for _ in range(steps):
        if not engine.busy:
            break
        outputs, _ = engine.step()
        engine.check_integrity()
        for out in outputs:
            answers[out.request_id, out.index].take(out)
    else:
        raise AssertionError("the engine did not come to an end")
    check_idle(engine)


def check_idle(engine: Engine) -> None:
    """Nothing may be left of requests that ended."""
    engine.check_integrity()
    assert not engine.busy
    assert not engine.requests
    assert not engine.runner.pooler.sums
    assert not engine.runner.sampler.counts and not engine.runner.sampler.grammars.matchers
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert not engine.adapters.leases()


def run(engine: Engine, *requests: Request, known: list[list[Answer]] | None = None) -> list[list[Answer]]:
    """All requests at once, to the end: per request its sequences. With the answers `known`, these are drafted."""
    answers: Answers = {(r.id, i): Answer() for r in requests for i in range(r.num_sequences)}
    for request in requests:
        engine.add(request)
    for request, own in zip(requests, known or (), strict=False):
        for seq in engine.requests[request.id]:
            seq.ngrams = Drafts(seq.num_prompt, own[seq.index].token_ids, seq.index, engine.info.vocab_size)
    drain(engine, answers)
    assert all(answer.finish_reason is not None for answer in answers.values())
    return [[answers[r.id, i] for i in range(r.num_sequences)] for r in requests]


def ask(
    *prompts: Iterable[int],
    id: str = "r",
    sampling: SamplingParams = GREEDY,
    n: int = 1,
    adapter: AdapterKey | None = None,
    scope: RouteScope = RouteScope.BATCH,
    salt: str = "",
    pooling: Pooling | None = None,
) -> Request:
    return Request(id, tuple(tuple(p) for p in prompts), sampling, n, adapter, scope, salt, pooling)


class Drafts:
    """Drafts from what a sequence will say, of which every so manyth token is made wrong: stands in for its
    NgramIndex."""

    def __init__(self, num_prompt: int, answer: Sequence[int], seed: int, vocab: int = VOCAB):
        self.num_prompt, self.answer, self.vocab = num_prompt, answer, vocab
        self.random = random.Random(seed)
        self.given: list[tuple[int, int]] = []
        """How many tokens were drafted, and were right, each time."""

    def draft(self, text: list[int], most: int) -> list[int]:
        done = len(text) - self.num_prompt
        assert text[self.num_prompt :] == list(self.answer[:done])
        drafted = list(self.answer[done : done + min(self.random.randrange(8), max(most, 0))])
        return [t if self.random.random() < 0.8 else self.random.randrange(3, self.vocab) for t in drafted]

    def verified(self, drafted: int, right: int) -> None:
        self.given.append((drafted, right))


class Recorder:
    """The logits of every row that an engine computes, and the route of every chunk.

    `logits[request id, index][position]` (vocab,) is what predicts position + 1; `routes` likewise has one entry per
    forward pass.
    """

    def __init__(self, engine: Engine):
        self.logits: dict[tuple[str, int], dict[int, Tensor]] = {}
        self.routes: dict[tuple[str, int], list[Route | None]] = {}
        self.router_means: list[Tensor] = []
        runner = engine.runner
        launch, collect = runner.launch, runner.collect
        forward, route_hidden = runner.model.forward, runner.ops.route_hidden
        rows: list[Tensor] = []

        def recorded_forward(*args: Any) -> Tensor:
            hidden = forward(*args)
            rows.append(runner.model.logits(hidden, torch.arange(len(hidden)), args[-1]))
            return hidden

        def recorded_launch(chunks: Any) -> Any:
            launched = launch(chunks)
            launched.recorded = rows.pop()
            launched.rows = {chunk.seq.key: chunk.count for chunk in chunks}  # those of drafts that were wrong too
            launched.routing = {id(chunk) for chunk in launched.chunks if chunk.seq.routing}
            return launched

        def recorded_collect(launched: Any) -> Any:
            results, stages = collect(launched)
            first, logits, routing = 0, launched.recorded, launched.routing
            for chunk, result in results:
                own = logits[first : first + chunk.count].clone()
                first += launched.rows[chunk.seq.key]
                if id(chunk) not in routing:
                    self.logits.setdefault(chunk.seq.key, {}).update(enumerate(own, chunk.start))
                    self.routes.setdefault(chunk.seq.key, []).append(result.route)
            return results, stages

        def recorded_route(x: Tensor, *rest: Any) -> Any:
            self.router_means.append(x.mean(dim=0).clone())
            return route_hidden(x, *rest)

        runner.launch, runner.collect, runner.model.forward = recorded_launch, recorded_collect, recorded_forward
        runner.ops = runner.batches.ops = replace(runner.ops, route_hidden=recorded_route)

    def of(self, id: str, index: int = 0) -> Tensor:
        """(positions, vocab)."""
        rows = self.logits[id, index]
        assert sorted(rows) == list(range(len(rows)))
        return torch.stack([rows[i] for i in range(len(rows))])


def routed_cores(folded: FoldedAdapter, route: Route) -> dict[Where, Tensor]:
    """The core M of every linear that a TuckA adapter adapts, under a route. Factors and cores have one order."""
    routed = folded.routed
    assert routed is not None
    r = routed.g.shape[-1]
    out = torch.zeros(1, int(routed.linears.max()) + 1, r, r)
    known = [(route.group, route.weights)]
    core(RoutePlan.build([routed.parts], [0], [None], known, out.device), out)
    return dict(zip(folded.factors, out[0, routed.linears], strict=True))


def route_of(logits: Tensor, t: int) -> Route:
    """The route that router logits (k·t,) lead to."""
    groups, weights = select(logits[None], t)
    return Route(int(groups), tuple(weights[0].tolist()))


def table_route(folded: FoldedAdapter, ids: Sequence[int]) -> Route:
    """The route of some tokens together, where it is a function of their ids; equal to one with the same group whose
    weights are the same up to the rounding of another order of sums."""
    assert folded.routed is not None
    router = folded.routed.router
    assert router.table is not None
    found = route_of(router.table[torch.tensor(ids)].double().mean(dim=0).float(), router.t)
    return replace(found, weights=pytest.approx(found.weights, abs=1e-6))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest of all rows' relative L2 errors; NaN counts as infinite, a row of zeros must be met exactly."""
    ours, theirs = ours.double(), theirs.double()
    error = torch.linalg.vector_norm(ours - theirs, dim=-1) / torch.linalg.vector_norm(theirs, dim=-1)
    return float(error.nan_to_num(float("inf")).where((ours != theirs).any(dim=-1), 0.0).max())


def matching(base: BaseLayout, targets: Sequence[str], layers: Sequence[int] | None = None) -> list[str]:
    """Paths of the linears that an adapter with these targets adapts."""
    found = [path for path in base.linears if path.endswith(tuple(targets))]
    if layers is None:
        return found
    return [path for path in found if any(f".{i}." in path for i in layers)]


def save_tucka(
    folder: Path,
    base: BaseLayout,
    seed: int = 0,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    r: int = 4,
    k: int = 3,
    t: int = 2,
    p: int = 2,
    alpha: float = 24.0,
    layers: Sequence[int] | None = None,
    saved: dict[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """A random TuckA adapter whose groups differ and are all taken by some prompt."""
    make = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = dict(saved or {})
    paths = matching(base, targets, layers)
    tensors[f"{paths[0]}.tucka_ec"] = torch.randn(k * t, base.linears[paths[0]][0], generator=make)
    for path in paths:
        tensors[f"{path}.tucka_g"] = torch.randn(k, p, r, r, generator=make)
        tensors[f"{path}.tucka_c"] = torch.randn(t, p, generator=make)
        tensors[f"{path}.tucka_u"] = torch.randn(base.linears[path][0], r, generator=make)
    write_adapter(folder, TuckASpec(**tucka_settings(r, k, t, p, alpha, targets, layers, **config)), tensors)
    return folder


def tucka_settings(
    r: int, k: int, t: int, p: int, alpha: float, targets: Sequence[str], layers: Sequence[int] | None, **more: Any
) -> dict[str, Any]:
    own = {"r": r, "k": k, "t": t, "p": p, "alpha": alpha, "target_modules": list(targets)}
    if layers is not None:
        own["layers_to_transform"] = list(layers)
    return {**own, **more}


def save_lora(
    folder: Path,
    base: BaseLayout,
    seed: int = 0,
    targets: Sequence[str] = ("q_proj", "down_proj"),
    r: int = 3,
    dora: bool = False,
) -> Path:
    make = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in matching(base, targets):
        d_in, d_out = base.linears[path]
        tensors[f"{path}.lora_A.weight"] = torch.randn(r, d_in, generator=make) / d_in**0.5
        tensors[f"{path}.lora_B.weight"] = torch.randn(d_out, r, generator=make) / r**0.5
        if dora:
            tensors[f"{path}.lora_magnitude_vector"] = 2 * torch.rand(d_out, generator=make) + 0.5
    write_adapter(folder, LoRASpec(r=r, lora_alpha=2.0 * r, target_modules=list(targets), use_dora=dora), tensors)
    return folder


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random tokens, none of them special."""
    make = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(3, VOCAB, (length,), generator=make).tolist())


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
