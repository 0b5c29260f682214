"""The demo's tasks, budgets and table. `tests/e2e/try_smollm2.py` tries the base itself."""

import json
import re
import sqlite3
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tucka_runtime.trainer.experiments.assistant_tasks import TASKS
from tucka_runtime.trainer.experiments.paper import lora_parameters, tucka_parameters
from tucka_runtime.trainer.experiments.smollm2 import METHODS, show, summary

# SmolLM2-135M: 30 layers; q and o, k and v, gate and up, down.
LAYERS = ((576, 576, 60), (576, 192, 60), (576, 1536, 60), (1536, 576, 30))
COUNT = 300


def check_extract(prompt: str, answer: str) -> None:
    keys = re.findall(r"\w+", prompt.partition(" with ")[2].partition(".")[0])
    found = json.loads(answer)
    assert list(found) == keys
    message = prompt.partition("\n\n")[2]
    for key, value in found.items():
        shown = (
            f"{value / 100:.2f}" if key == "cents" else str(value).removeprefix("0") if key == "time" else str(value)
        )
        assert shown in message or shown in message.replace(",", ".")


def check_sql(prompt: str, answer: str) -> None:
    """SQLite takes it, on the very table that the prompt shows."""
    table = re.search(r"Table: (\w+)\((.*)\)", prompt)
    assert table is not None
    with sqlite3.connect(":memory:") as database:
        database.execute(f"CREATE TABLE {table[1]}({table[2]})")
        database.execute(answer)
    assert set(re.findall(r"\d+", answer)) <= set(re.findall(r"\d+", prompt))


def check_steps(prompt: str, answer: str) -> None:
    *sums, last = answer.split("\n")
    for line in sums:
        made, _, result = line.partition(" = ")
        left, how, right = made.split()
        a, b = int(left), int(right)
        assert {"*": a * b, "+": a + b, "-": a - b, "/": a / b}[how] == int(result)
    assert last == f"Answer: {sums[-1].rpartition(' ')[2]}"
    assert set(re.findall(r"\d+", prompt)) <= set(re.findall(r"\d+", answer))


CHECKS: dict[str, Callable[[str, str], None]] = {"extract": check_extract, "sql": check_sql, "steps": check_steps}


@pytest.mark.parametrize("name", list(TASKS))
def test_every_answer_is_right_and_no_prompt_is_on_both_sides(name: str, tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        TASKS[name].write(folder, 0, COUNT, COUNT)
    prompts: list[set[str]] = []
    for file in (f"{name}.jsonl", f"{name}.held.jsonl"):
        text = (tmp_path / "a" / file).read_text()
        assert text == (tmp_path / "b" / file).read_text()
        pairs = [[m["content"] for m in json.loads(line)["messages"]] for line in text.splitlines()]
        for prompt, answer in pairs:
            CHECKS[name](prompt, answer)
        prompts.append({prompt for prompt, _ in pairs})
    assert [len(own) for own in prompts] == [COUNT, COUNT]
    assert not prompts[0] & prompts[1]
    assert len({task for _, _, task in islice(TASKS[name].records(0, False), COUNT)}) == len(TASKS[name].draw)


def test_both_methods_have_as_many_parameters() -> None:
    tucka, lora = METHODS["tucka"], METHODS["lora"]
    ours = tucka_parameters(LAYERS, 576, tucka["r"], tucka["k"], tucka["t"], tucka["p"])
    theirs = lora_parameters(LAYERS, lora["r"])
    assert abs(ours - theirs) < 0.01 * theirs


def test_the_table_has_means_and_deviations_over_seeds() -> None:
    def row(model: str, route: str | None, exact: float) -> dict[str, Any]:
        return {"model": model, "route": route, "exact_match": exact}

    rows = [row("base", None, 0.1)]
    rows += [row(f"sql-lora-{seed}", None, exact) for seed, exact in enumerate((0.5, 0.7))]
    rows += [row(f"sql-tucka-{seed}", "batch", exact) for seed, exact in enumerate((0.6, 0.6))]
    assert show(summary("sql", rows), 10).splitlines() == [
        "exact match  base   lora           tucka batch",
        "sql          0.100  0.600 ± 0.141  0.600 ± 0.000",
        "(10 held-out records a task; mean ± standard deviation of 2 seeds)",
    ]
    assert "±" not in show(summary("sql", rows[:2]), 10).splitlines()[1]
