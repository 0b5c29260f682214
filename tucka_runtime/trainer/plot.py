"""The picture at the end of a training: loss, expert load over time, final accuracy."""

from pathlib import Path
from typing import Any

from tucka_runtime.trainer.evaluate import HeldOut


def plain(text: str) -> str:
    """A text as Matplotlib is to show it: what stands between two dollar signs is no formula."""
    return text.replace("$", r"\$")


def _smooth(values: list[float], width: int) -> list[float]:
    out, window = [], 0.0
    for i, value in enumerate(values):
        window += value - (values[i - width] if i >= width else 0.0)
        out.append(window / min(i + 1, width))
    return out


def figure(history: Any, result: HeldOut | None, path: Path, title: str, loss_of: str, share_of: str) -> None:
    """Write the PNG; panels without data (no evaluation, LoRA's load) say so. `loss_of` and `share_of` are an
    objective's words for what it measures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (loss, load, accuracy) = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    fig.suptitle(plain(title))
    steps = range(1, len(history.loss) + 1)
    loss.plot(steps, history.loss, color="0.8", label="each step")
    loss.plot(steps, _smooth(history.loss, max(1, len(history.loss) // 50)), label="smoothed")
    if history.evals:
        loss.plot([e["step"] for e in history.evals], [e["loss"] for e in history.evals], "o-", label="held out")
    loss.set(xlabel="step", ylabel=loss_of, yscale="log")
    loss.legend()
    if history.load and history.load[0]:
        width = 3 * max(1, len(history.load) // 100)  # whole turns of `mixed`, whose scopes count differently
        totals = [max(1, sum(row)) for row in history.load]
        shares = [
            _smooth([row[g] / n for row, n in zip(history.load, totals, strict=True)], width)
            for g in range(len(history.load[0]))
        ]
        load.stackplot(steps, shares, labels=[f"group {g}" for g in range(len(shares))])
        load.set(xlabel="step", ylabel="share of routes", ylim=(0, 1))
        load.legend(loc="lower right")
    else:
        load.text(0.5, 0.5, "no experts", ha="center")
        load.set_axis_off()
    if result is not None and result.by_task:
        bars = accuracy.bar(list(map(plain, result.by_task)), list(result.by_task.values()))
        accuracy.bar_label(bars, fmt="%.2f")
        accuracy.set(ylabel=f"{share_of}, held out", ylim=(0, 1.1))
        accuracy.tick_params(axis="x", rotation=30)
    else:
        accuracy.text(0.5, 0.5, "nothing held out", ha="center")
        accuracy.set_axis_off()
    fig.savefig(path, dpi=110)
    plt.close(fig)
