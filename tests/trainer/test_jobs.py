"""Several adapters through one base in one pass: each comes out as it does alone."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.training import records, small_base
from tucka_runtime.errors import ConfigError
from tucka_runtime.tokenizer import Tokenizer
from tucka_runtime.trainer import base_model
from tucka_runtime.trainer.adapter import AdapterSettings, attach, router_of, seed_all
from tucka_runtime.trainer.data import encode
from tucka_runtime.trainer.experiments.base import build_tokenizer
from tucka_runtime.trainer.jobs import Job, Together, passes
from tucka_runtime.trainer.loop import Loop, LoopConfig
from tucka_runtime.trainer.shared import Carrier, Member, clone

TOKENIZER = Tokenizer(build_tokenizer())
TUCKA = AdapterSettings(r=4, alpha=16, balance=0.01)
LORA = AdapterSettings(method="lora", r=3, alpha=6)
CONFIG = LoopConfig(steps=3, batch_size=6, lr=1e-3, route_batch="mixed", eval_every=2)

# Adapter, loop, and how much longer each prompt is made.
MIX: dict[str, tuple[AdapterSettings, LoopConfig, int]] = {
    "tucka": (TUCKA, CONFIG, 0),
    "same shapes": (replace(TUCKA, alpha=8), replace(CONFIG, seed=1, lr=3e-4), 2),
    "paper's route": (TUCKA, replace(CONFIG, route_batch="batch"), 1),
    "few layers": (replace(TUCKA, r=2, target_modules=("q_proj", "down_proj")), replace(CONFIG, accumulate=2), 1),
    "packed": (TUCKA, replace(CONFIG, packing=True, route_batch="per-sample"), 3),
    "lora": (LORA, replace(CONFIG, steps=2), 3),
    "dropout": (replace(LORA, dropout=0.3), replace(CONFIG, seed=5, batch_size=4), 1),
    "long": (LORA, CONFIG, 40),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the command trains bases as narrow as this one alone; more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loop_of(base: Any, name: str) -> Loop:
    settings, config, longer = MIX[name]
    model = attach(base, settings, config.seed)
    seed_all(config.seed)
    found = [r | {"prompt": r["prompt"][:-1] + "x" * longer * (i % 3) + ":"} for i, r in enumerate(records())]
    examples = [encode(r, TOKENIZER, 128) for r in found]
    router = router_of(model)
    return Loop(model, examples[4:], examples[:4], config, pad=0, device=torch.device("cpu"), router=router)


def trained_together(base: Any, names: list[str]) -> dict[str, Loop]:
    jobs = [Job(name, loop_of(clone(base), name)) for name in names]
    order: list[str] = []
    Together(base, jobs, lambda job: order.append(job.name)).run()
    assert sorted(order) == sorted(names) and order[0] == ("lora" if "lora" in names else order[0])
    return {job.name: job.loop for job in jobs}


def assert_equal(together: Loop, alone: Loop) -> None:
    assert together.history.loss == pytest.approx(alone.history.loss, abs=1e-5)
    assert together.history.load == alone.history.load
    assert [e["loss"] for e in together.history.evals] == pytest.approx(
        [e["loss"] for e in alone.history.evals], abs=1e-5
    )
    for (name, p), (_, q) in zip(together.parameters, alone.parameters, strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0, msg=name)


def test_each_comes_out_as_alone() -> None:
    together = trained_together(small_base(), list(MIX))
    for name, loop in together.items():
        alone = loop_of(small_base(), name)
        start = [p.detach().clone() for _, p in alone.parameters]
        alone.run()
        assert_equal(loop, alone)
        moved = max(float((p.detach() - q).abs().max()) for (_, p), q in zip(alone.parameters, start, strict=True))
        assert moved >= 1e-4, name  # what is compared has been trained


def test_gradient_checkpointing_draws_the_same_dropout_again() -> None:
    base = small_base()
    base_model.prepare(base, packing=False, checkpointing=True)
    for name, loop in trained_together(base, ["dropout", "tucka"]).items():
        alone = loop_of(small_base(), name)
        alone.run()
        assert_equal(loop, alone)


def test_passes_hold_what_costs_little_padding() -> None:
    jobs = {name: Job(name, loop_of(small_base(), name)) for name in ("tucka", "lora", "long", "packed")}
    batches = [(job, job.loop.begin()) for job in jobs.values()]
    found = passes([(job, work, work.batches[0]) for job, work in batches])
    assert sorted(sorted(job.name for job, _, _ in together) for together in found) == [
        ["long"],
        ["lora", "tucka"],
        ["packed"],
    ]


def test_a_base_that_would_draw_otherwise_is_refused() -> None:
    base = small_base()
    member = Member(attach(clone(base), LORA, 0), None)
    base.config.attention_dropout = 0.1
    with pytest.raises(ConfigError, match="dropout of its own"):
        Carrier(base, [member])


def test_a_base_that_does_not_keep_rows_apart_is_refused() -> None:
    base = small_base()
    mlp = base.model.layers[0].mlp

    class Flat(type(mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat: torch.Tensor = super().forward(x.flatten(0, 1))
            return flat.view(x.shape)

    mlp.__class__ = Flat
    member = Member(attach(clone(base), LORA, 0), None)
    with pytest.raises(ConfigError, match=r"rows apart at model\.layers\.0\.mlp"):
        Carrier(base, [member])
