"""The paper's claims at our scale, printed and drawn: `python -m tucka_runtime.trainer.experiments.paper CLAIM`.

a  trainable parameters by formula, against LoRA, and their growth with the number of experts
b  expert load and centroids under Kaiming and data-aware initialisation: three seeds
c  accuracy against trainable parameters for TuckA and LoRA: three budgets, three seeds
d  accuracy over rank and number of experts
routes  what becomes of accuracy when serving routes another way than training did

All but a train on the embedded base with the trainer's own loop.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tucka_runtime.embedded import FOLDER

BASE = FOLDER / "base"
ROUTER_WIDTHS = {"DeBERTa-v3-base": 768, "Llama-2-7B": 4096}


@dataclass(frozen=True)
class Setting:
    """A model's adapted layers as (d_in, d_out, how many)."""

    name: str
    layers: tuple[tuple[int, int, int], ...]


# DeBERTa-v3-base: 12 layers of width 768, inner width 3072. Llama-2-7B: 32 layers of width 4096, inner width 11008.
SETTINGS = (
    Setting("DeBERTa-v3-base", ((768, 768, 12 * 4), (768, 3072, 12), (3072, 768, 12))),
    Setting("Llama-2-7B", ((4096, 4096, 32 * 4), (4096, 11008, 32 * 2), (11008, 4096, 32))),
)


def tucka_parameters(layers: tuple[tuple[int, int, int], ...], router: int, r: int, k: int, t: int, p: int) -> int:
    """Σ over adapted linears of (k·p·r² + t·p + d_in·r), plus k·t·d of the router."""
    return sum(n * (k * p * r * r + t * p + d_in * r) for d_in, _, n in layers) + k * t * router


def lora_parameters(layers: tuple[tuple[int, int, int], ...], r: int) -> int:
    """Σ over adapted linears of r·(d_in + d_out)."""
    return sum(n * r * (d_in + d_out) for d_in, d_out, n in layers)


def experts_parameters(layers: tuple[tuple[int, int, int], ...], router: int, r: int, experts: int) -> int:
    """A mixture of separate LoRA experts with one router: what the paper's Figure 1b compares with."""
    return experts * lora_parameters(layers, r) + experts * router


def claim_a(images: Path) -> None:
    print("Trainable parameters (all linear layers of the blocks)\n")
    print(f"{'model':<18}{'method':<34}{'parameters':>14}")
    for setting in SETTINGS:
        router = ROUTER_WIDTHS[setting.name]
        for r in (4, 8, 16):
            print(f"{setting.name:<18}{f'LoRA r={r}':<34}{lora_parameters(setting.layers, r):>14,}")
        for r, k, t, p in ((8, 3, 3, 2), (16, 3, 3, 2), (16, 4, 4, 2)):
            count = tucka_parameters(setting.layers, router, r, k, t, p)
            print(f"{setting.name:<18}{f'TuckA r={r} k={k} t={t} p={p} ({k * t} experts)':<34}{count:>14,}")
    print("\nGrowth with the number of experts (Llama-2-7B, r=8, t=4, p=2)\n")
    print(f"{'experts':>8}{'TuckA':>14}{'LoRA experts':>16}")
    counts = [4, 8, 16, 32, 64]
    layers, router = SETTINGS[1].layers, ROUTER_WIDTHS["Llama-2-7B"]
    ours = [tucka_parameters(layers, router, 8, e // 4, 4, 2) for e in counts]
    theirs = [experts_parameters(layers, router, 8, e) for e in counts]
    for e, a, b in zip(counts, ours, theirs, strict=True):
        print(f"{e:>8}{a:>14,}{b:>16,}")
    plt = _pyplot()
    fig, ax = plt.subplots(figsize=(6, 4), constrained_layout=True)
    ax.plot(counts, ours, "o-", label="TuckA r=8, t=4, p=2")
    ax.plot(counts, theirs, "s-", label="one LoRA r=8 per expert")
    ax.set(xlabel="experts", ylabel="trainable parameters", xscale="log", yscale="log", title="Llama-2-7B")
    ax.legend()
    _save(fig, images / "paper-a.png")


def claim_b(images: Path, steps: int) -> None:
    from tucka_runtime.trainer.adapter import AdapterSettings
    from tucka_runtime.trainer.model import centroids
    from tucka_runtime.trainer.routing import centroid_spread

    plt = _pyplot()
    kinds, seeds, k = ("kaiming", "data"), (0, 1, 2), 4
    fig, axes = plt.subplots(len(kinds), 3, figsize=(14, 8), constrained_layout=True)
    print(f"Expert load over {steps} steps on the task `formats`, one route a batch (a batch holds one sub-task)\n")
    print(
        f"{'centroids':<12}{'seed':>4}  {'shares, largest first':<26}{'groups used':>12}{'spread':>9}{'held out':>10}"
    )
    for row, kind in zip(axes, kinds, strict=True):
        settings = AdapterSettings(r=8, k=k, t=2, p=2, alpha=64, centroids=kind)
        runs = [train("formats", settings, steps, seed, route="batch") for seed in seeds]
        shares = [sorted((float(c / run.router.counts.sum()) for c in run.router.counts), reverse=True) for run in runs]
        for seed, run, own in zip(seeds, runs, shares, strict=True):
            each = " ".join(f"{share:.3f}" for share in own)
            used, spread = int((run.router.counts > 0).sum()), centroid_spread(centroids(run.model, "default"))
            print(f"{kind:<12}{seed:>4}  {each:<26}{used:>12}{spread:>9.3f}{run.exact:>10.3f}", flush=True)
        means, ends = zip(*map(_mean_and_deviation, zip(*shares, strict=True)), strict=True)
        exact = _mean_and_deviation([run.exact for run in runs])
        print(f"{kind:<12} all  largest {means[0]:.3f} ± {ends[0]:.3f}, held out {exact[0]:.3f} ± {exact[1]:.3f}")
        _draw_load(row[0], runs[0].load, steps, f"expert load, {kind}, seed 0")
        row[1].bar(range(1, k + 1), means, yerr=ends, capsize=4)
        row[1].set(title=f"shares of {len(seeds)} seeds, {kind}", xlabel="group, largest first", ylim=(0, 1))
        _draw_centroids(row[2], runs[0], f"{kind}, seed 0")
    _save(fig, images / "paper-b.png")


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values)


def _draw_load(ax: Any, load: list[list[int]], steps: int, title: str) -> None:
    """The groups' shares over the steps, of a twenty-fifth of them together."""
    width, k = max(1, steps // 25), len(load[0])
    counts = [[sum(row[g] for row in load[i : i + width]) for g in range(k)] for i in range(0, steps, width)]
    shares = [[row[g] / max(1, sum(row)) for row in counts] for g in range(k)]
    ax.stackplot(range(0, steps, width), shares, labels=[f"group {g}" for g in range(k)])
    ax.set(title=title, xlabel="step", ylim=(0, 1))
    ax.legend(loc="lower right")


def _draw_centroids(ax: Any, run: Any, title: str) -> None:
    """Centroids and the prompts' mean router inputs on the two main axes of the inputs (paper, Figure 3)."""
    import torch

    from tucka_runtime.trainer.model import centroids

    means = {task: torch.stack(rows) for task, rows in run.prompt_means().items()}
    everything = torch.cat(list(means.values()))
    center = everything.mean(dim=0)
    _, _, axes = torch.linalg.svd(everything - center, full_matrices=False)
    for task, rows in means.items():
        x = (rows - center) @ axes[:2].T
        ax.plot(x[:, 0], x[:, 1], ".", alpha=0.5, label=task)
    x = (centroids(run.model, "default") - center) @ axes[:2].T
    ax.plot(x[:, 0], x[:, 1], "k*", markersize=10, label="centroids")
    ax.set(title=f"centroids and prompts, {title}")
    ax.legend(fontsize=7)


def claim_c(images: Path, steps: int) -> None:
    from tucka_runtime.trainer.adapter import AdapterSettings

    budgets = {
        "TuckA": [AdapterSettings(r=r, k=4, t=2, p=2, alpha=64) for r in (2, 4, 8)],
        "LoRA": [AdapterSettings(method="lora", r=r, alpha=2 * r) for r in (1, 2, 5)],
    }
    print(f"Exact match against trainable parameters, task `formats`, {steps} steps, seeds 0 1 2\n")
    print(f"{'method':<8}{'r':>4}{'parameters':>12}  exact match of each seed     mean     std")
    plt = _pyplot()
    fig, ax = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for method, all_settings in budgets.items():
        points = []
        for settings in all_settings:
            runs = [train("formats", settings, steps, seed) for seed in (0, 1, 2)]
            exact = [run.exact for run in runs]
            mean, std = statistics.mean(exact), statistics.stdev(exact)
            points.append((runs[0].parameters, mean, std))
            listed = " ".join(f"{e:.3f}" for e in exact)
            print(
                f"{method:<8}{settings.r:>4}{runs[0].parameters:>12,}  {listed:<27}{mean:>7.3f}{std:>8.3f}", flush=True
            )
        x, y, error = zip(*points, strict=True)
        ax.errorbar(x, y, error, fmt="o-", capsize=3, label=method)
    ax.set(xlabel="trainable parameters", ylabel="exact match, held out", xscale="log", ylim=(0, 1.05))
    ax.legend(loc="lower right")
    _save(fig, images / "paper-c.png")


def claim_d(images: Path, steps: int) -> None:
    from tucka_runtime.trainer.adapter import AdapterSettings

    ranks, groups = (2, 4, 8), (1, 2, 4)
    print(f"Exact match over rank and number of expert groups (t=2, p=2), task `formats`, {steps} steps, seed 0\n")
    print(f"{'':>6}" + "".join(f"{f'k={k}':>9}" for k in groups))
    plt = _pyplot()
    fig, ax = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for r in ranks:
        row = [train("formats", AdapterSettings(r=r, k=k, t=2, p=2, alpha=64), steps, 0).exact for k in groups]
        print(f"{f'r={r}':>6}" + "".join(f"{v:>9.3f}" for v in row), flush=True)
        ax.plot([2 * k for k in groups], row, "o-", label=f"r={r}")
    ax.set(xlabel="experts (k·t)", ylabel="exact match, held out", ylim=(0, 1.05))
    ax.legend(loc="lower right")
    _save(fig, images / "paper-d.png")


def claim_routes(images: Path, steps: int) -> None:
    from tucka_runtime.trainer.adapter import AdapterSettings
    from tucka_runtime.trainer.experiments.together import serving_scopes

    print(f"Exact match on `formats` by training route and serving scope, {steps} steps, seed 0\n")
    print(f"{'--route-batch':<15}{'request':>9}{'batch, alone':>14}{'batch, 16 mixed':>17}")
    for route in ("batch", "per-sample", "mixed"):
        run = train("formats", AdapterSettings(r=8, k=4, t=2, p=2, alpha=64, balance=0.01), steps, 0, route)
        exact, _ = serving_scopes(run.model, run.router, run.held, pad=0, eos=run.model.config.eos_token_id)
        print(f"{route:<15}{exact['request']:>9.3f}{exact['batch_alone']:>14.3f}{exact['batch_16']:>17.3f}", flush=True)


@dataclass
class Trained:
    """A trained adapter and what the figures need of it; `groups` says how many held-out prompts of each sub-task took
    each group."""

    model: Any
    router: Any
    held: list[Any]
    load: list[list[int]]
    exact: float
    parameters: int
    groups: dict[str, list[int]]

    def prompt_means(self) -> dict[str, list[Any]]:
        """Mean router input of every held-out prompt, by sub-task."""
        import torch

        seen: list[Any] = []
        router = self.model.get_submodule(f"base_model.model.{self.router.module}")
        hook = router.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        out: dict[str, list[Any]] = {}
        with torch.no_grad():
            for example in self.held[:120]:
                self.model(input_ids=torch.tensor([example.ids[: example.start]]))
                out.setdefault(example.task, []).append(seen.pop().mean(dim=(0, 1)))
        hook.remove()
        return out


def train(task: str, settings: Any, steps: int, seed: int, route: str = "per-sample", loop_kind: Any = None) -> Trained:
    """An adapter for a task of the project, on the embedded base; `loop_kind` is another loop than the trainer's."""
    import torch

    from tucka_runtime.trainer.adapter import attach, router_of, seed_all, trainable_parameters
    from tucka_runtime.trainer.base_model import load_base
    from tucka_runtime.trainer.data import encode
    from tucka_runtime.trainer.experiments.tasks import TASKS
    from tucka_runtime.trainer.loop import Loop, LoopConfig

    base, tokenizer, device = load_base(BASE, "float32", "cpu")

    def examples(evaluation: bool, count: int) -> list[Any]:
        records = islice(TASKS[task].records(int(evaluation), evaluation), count)
        return [
            encode({"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}], "task": s},
                   tokenizer, 1024)
            for p, a, s in records
        ]  # fmt: skip

    model = attach(base, settings, seed)
    router = router_of(model)
    seed_all(seed)
    held = examples(True, 200)
    config = LoopConfig(steps=steps, batch_size=32, lr=5e-3, route_batch=route, seed=seed)
    loop = (loop_kind or Loop)(
        model, examples(False, 6000), held, config, pad=0, device=torch.device(device), router=router
    )
    history = loop.run()
    result = loop.evaluate()
    exact = result.figures["exact_match"]
    return Trained(model.eval(), router, held, history.load, exact, trainable_parameters(model), result.groups)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(fig: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    print(f"\nfigure: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tucka_runtime.trainer.experiments.paper", description=__doc__)
    parser.add_argument("claim", choices=("a", "b", "c", "d", "routes"))
    parser.add_argument("--images", type=Path, default=Path("docs/img"))
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    if args.claim == "a":
        claim_a(args.images)
        return
    import torch

    torch.set_num_threads(1)
    {"b": claim_b, "c": claim_c, "d": claim_d, "routes": claim_routes}[args.claim](args.images, args.steps)


if __name__ == "__main__":
    main()
