"""What several trainings came to, side by side: a table, JSON and a picture, from what each wrote of itself."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tucka_runtime.adapters.files import TRAINING_NAME
from tucka_runtime.terminal import aligned
from tucka_runtime.trainer.plot import plain


@dataclass(frozen=True)
class Outcome:
    """One training: its steps and last loss, the held-out figures where something was held out (of pairs their accuracy
    and margin), or why it failed."""

    name: str
    steps: int | None = None
    final_loss: float | None = None
    held_out_loss: float | None = None
    exact_match: float | None = None
    accuracy: float | None = None
    margin: float | None = None
    failed: str | None = None

    @property
    def right(self) -> float | None:
        """The share that was right, of what was held out."""
        return self.accuracy if self.exact_match is None else self.exact_match


def row(name: str, folder: Path, failed: str | None) -> Outcome:
    """The row of a training that has written into `folder`, or has failed."""
    if failed is not None:
        return Outcome(name, failed=failed)
    training: dict[str, Any] = json.loads((folder / TRAINING_NAME).read_text("utf-8"))
    held = training.get("eval", {})
    figures = (held.get(key) for key in ("loss", "exact_match", "accuracy", "margin"))
    return Outcome(name, training["steps"], training["final_loss"], *figures)


def best(rows: Sequence[Outcome]) -> Outcome | None:
    """The row with the highest held-out share of right ones, of several the one with the lowest held-out loss."""
    measured = [row for row in rows if row.right is not None]
    return max(measured, key=lambda row: (row.right or 0.0, -(row.held_out_loss or 0.0)), default=None)


def table(rows: Sequence[Outcome]) -> str:
    """The rows in columns; the best one is marked, and a failed one says why."""
    first = best(rows)
    shares = ["exact_match"] if any(row.exact_match is not None for row in rows) or first is None else []
    shares += ["accuracy", "margin"] if any(row.accuracy is not None for row in rows) else []
    lines = [["job", "steps", "loss", "held-out loss", *(name.replace("_", " ") for name in shares), ""]]
    for row in rows:
        figures = [_figure(value, 4) for value in (row.final_loss, row.held_out_loss)]
        figures += [_figure(getattr(row, name), 3) for name in shares]
        said = f"failed: {row.failed.splitlines()[0]}" if row.failed else "best" if row is first else ""
        lines.append([row.name, str(row.steps or "-"), *figures, said])
    return aligned(lines)


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def write(folder: Path, rows: Sequence[Outcome]) -> None:
    """report.json and report.png. Raises OSError."""
    first = best(rows)
    report = {"best": first and first.name, "rows": [asdict(row) for row in rows]}
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    _picture(rows, folder / "report.png")


def _picture(rows: Sequence[Outcome], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (11, 1 + 0.4 * len(rows))
    fig, (exact, loss) = plt.subplots(1, 2, figsize=size, sharey=True, constrained_layout=True)
    names = [plain(row.name) + (" (failed)" if row.failed else "") for row in rows]
    exact.bar_label(exact.barh(names, [row.right or 0.0 for row in rows]), fmt="%.3f", padding=4)
    pairs = any(row.accuracy is not None for row in rows)
    exact.set(xlabel="accuracy of pairs, held out" if pairs else "exact match, held out", xlim=(0, 1.15))
    held = loss.barh(names, [row.held_out_loss or 0.0 for row in rows], color="tab:orange")
    loss.bar_label(held, fmt="%.4f", padding=4)
    loss.set(xlabel="loss of a pair, held out" if pairs else "loss of a completion token, held out")
    loss.margins(x=0.15)
    exact.invert_yaxis()
    fig.savefig(path, dpi=110)
    plt.close(fig)
