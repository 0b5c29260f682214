"""How right answers are, and the report of it: a table, JSON, a picture, and the wrong answers."""

import json
import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tucka_runtime.evals.asking import Reply
from tucka_runtime.evals.questions import Question, final
from tucka_runtime.terminal import aligned
from tucka_runtime.trainer.plot import plain

_ARTICLES = re.compile(r"\b(a|an|the)\b")
MOST_TASKS = 6  # columns of sub-tasks in the table


@dataclass(frozen=True)
class Score:
    """What one model scored. `error` is the standard error of `exact_match`; `cut` counts answers that had no end."""

    model: str
    route: str | None
    records: int
    exact_match: float
    error: float
    f1: float
    by_task: dict[str, float]
    cut: int


def score(questions: Sequence[Question], answers: Sequence[Reply], model: str, route: str | None) -> Score:
    """The row of a model's answers."""
    right: dict[str, list[bool]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        right[question.task].append(final(answer.text) == question.expected)
    exact = sum(map(sum, right.values())) / len(questions)
    overlaps = [f1(final(a.text), q.expected) for q, a in zip(questions, answers, strict=True)]
    return Score(
        model, route, len(questions), exact, math.sqrt(exact * (1 - exact) / len(questions)),
        sum(overlaps) / len(questions), {task: sum(own) / len(own) for task, own in sorted(right.items())},
        sum(answer.cut for answer in answers),
    )  # fmt: skip


def f1(said: str, expected: str) -> float:
    """The overlap of two texts' words, as SQuAD's evaluation has it: without case, punctuation and articles."""
    left, right = _words(said), _words(expected)
    if not left or not right:
        return float(left == right)
    common = sum((Counter(left) & Counter(right)).values())
    return 2 * common / (len(left) + len(right))


def table(rows: Sequence[Score]) -> str:
    """The rows in columns, with the sub-tasks where there are a few."""
    tasks = list(rows[0].by_task)
    tasks = tasks if 1 < len(tasks) <= MOST_TASKS else []
    lines = [["model", "route", "records", "exact match", "F1", *tasks]]
    for row in rows:
        exact = f"{row.exact_match:.3f} ± {row.error:.3f}"
        own = [f"{row.by_task[task]:.3f}" for task in tasks]
        lines.append([row.model, row.route or "-", str(row.records), exact, f"{row.f1:.3f}", *own])
    return aligned(lines)


def wrong(questions: Sequence[Question], answers: Sequence[Reply], row: Score) -> list[dict[str, Any]]:
    """The answers that are not what was expected, with what was asked."""
    return [
        {
            "model": row.model, "route": row.route, "task": question.task, "asked": question.asked,
            "expected": question.expected, "said": final(answer.text), "cut": answer.cut,
        }
        for question, answer in zip(questions, answers, strict=True)
        if final(answer.text) != question.expected
    ]  # fmt: skip


def write(folder: Path, rows: Sequence[Score], mistakes: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """report.json, wrong.jsonl and report.png. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    report = about | {"rows": [asdict(row) for row in rows]}
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    lines = "".join(json.dumps(mistake, ensure_ascii=False) + "\n" for mistake in mistakes)
    (folder / "wrong.jsonl").write_text(lines, "utf-8")
    _picture(rows, folder / "report.png")


def _picture(rows: Sequence[Score], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(8, 1 + 0.5 * len(rows)), constrained_layout=True)
    names = [plain(row.model) + (f" ({row.route})" if row.route else "") for row in rows]
    bars = axis.barh(names, [row.exact_match for row in rows], xerr=[row.error for row in rows], capsize=3)
    axis.bar_label(bars, fmt="%.3f", padding=4)
    axis.set(xlabel=f"exact match of {rows[0].records} records, with its standard error", xlim=(0, 1.1))
    axis.invert_yaxis()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return _ARTICLES.sub(" ", plain).split()
