"""What the paper leaves open about routes, over three seeds: `python -m tucka_runtime.trainer.experiments.routing`.

Each variant trains the task `triage`, whose sub-tasks use the same letters, on the embedded base, and is asked 200
held-out prompts under the scope `request`. Beside exact match stands how much of a prompt's sub-task its group tells:
mutual information over the entropy of the sub-tasks, 0 for nothing and 1 for all.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from tucka_runtime.trainer.adapter import AdapterSettings
from tucka_runtime.trainer.experiments.paper import BASE, train
from tucka_runtime.trainer.loop import Loop, Work

COMMON: dict[str, Any] = {"r": 8, "k": 4, "t": 2, "p": 2, "alpha": 64}


class Balancing(Loop):
    """The trainer's loop, with the balancing bias kept to the end. Serving has no bias, so figures are without it."""

    def begin(self) -> Work:
        work = super().begin()
        self.router.bias_scale = 1.0
        return work


class HoldingLogits(Loop):
    """The trainer's loop, with the router z-loss of ST-MoE (arXiv 2202.08906, eq. 5) on the logits before they are
    normalised: the mean square of their logsumexp."""

    WEIGHT = 1e-3  # that paper's

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._held: Any = None
        self.model.base_model.model.get_submodule(self.router.module).register_forward_hook(self._hold)

    def _hold(self, layer: Any, args: tuple[Any, ...], output: Any) -> None:
        logits = self.router._means(args[0].detach()) @ layer.tucka_ec["default"].T
        self._held = logits.logsumexp(-1).square().mean()

    def learn(self, work: Work, logits: Any, batch: Any) -> Any:
        return super().learn(work, logits, batch) + self.WEIGHT * self._held


def late_layers() -> tuple[str, ...]:
    """All linears of the upper half of the layers: the first of them routes, by hidden states that have seen their
    context."""
    layers = json.loads((BASE / "config.json").read_text())["num_hidden_layers"]
    linears = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    return tuple(f"layers.{layer}.{linear}" for layer in range(layers // 2, layers) for linear in linears)


VARIANTS: dict[str, tuple[AdapterSettings, Any]] = {
    "balance fades (as shipped)": (AdapterSettings(**COMMON, balance=0.01), Loop),
    "no balance": (AdapterSettings(**COMMON), Loop),
    "balance stays": (AdapterSettings(**COMMON, balance=0.01), Balancing),
    "z-loss": (AdapterSettings(**COMMON, balance=0.01), HoldingLogits),
    "8 groups": (AdapterSettings(**COMMON | {"k": 8}, balance=0.01), Loop),
    "routes from hidden states": (AdapterSettings(**COMMON, balance=0.01, target_modules=late_layers()), Loop),
}


def told(groups: dict[str, list[int]]) -> float:
    """How much of the sub-task the group tells, from counts of groups by sub-task."""
    rows = list(groups.values())
    total = sum(map(sum, rows))
    columns = [sum(row[g] for row in rows) for g in range(len(rows[0]))]

    def entropy(counts: Sequence[int]) -> float:
        return -sum(n / total * math.log(n / total) for n in counts if n)

    together = entropy([n for row in rows for n in row])
    return (entropy([sum(row) for row in rows]) + entropy(columns) - together) / entropy([sum(row) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tucka_runtime.trainer.experiments.routing", description=__doc__)
    parser.add_argument("--task", default="triage")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    print(f"task {args.task}, {args.steps} steps, seeds 0 to {args.seeds - 1}: exact match, and what groups tell\n")
    for name in args.variants:
        settings, kind = VARIANTS[name]
        runs = [train(args.task, settings, args.steps, seed, loop_kind=kind) for seed in range(args.seeds)]
        exact, of_task = [run.exact for run in runs], [told(run.groups) for run in runs]
        used = [sum(any(row[g] for row in run.groups.values()) for g in range(settings.k)) for run in runs]
        print(
            f"{name:<28} exact {_spread(exact)}   told {_spread(of_task)}   groups used "
            f"{' '.join(map(str, used))}   parameters {runs[0].parameters:,}", flush=True,
        )  # fmt: skip


def _spread(values: Sequence[float]) -> str:
    each = " ".join(f"{value:.3f}" for value in values)
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f} ({each})"


if __name__ == "__main__":
    main()
