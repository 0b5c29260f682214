"""`tucka eval --tasks`: lm-eval's tasks of a running server, where lm-eval is installed; else what to do."""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tucka_runtime.cli import eval as cli
from tucka_runtime.evals import harness
from tucka_runtime.evals.harness import TaskScore, table

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'lm-eval[api]'"
)
DATES = [("2024-03-05", "5 March 2024"), ("2023-11-17", "17 November 2023"), ("2020-01-30", "30 January 2020")]


def evaluate(*arguments: Any) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks over the same questions: an answer is to be said, or to be likelier than another date's.

    The `q` keeps the library `datasets` from making times of the dates.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"asked": f"q{asked}", "answer": answer, "choices": [answer, other], "gold": 0}
        for (asked, answer), (_, other) in zip(DATES, DATES[1:] + DATES[:1], strict=True)
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\ntest_split: test\n"
        "target_delimiter: ''\n"
    )
    said = (
        "output_type: generate_until\ndoc_to_target: answer\n"
        "generation_kwargs: {until: ['<|end|>'], max_gen_toks: 32, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    likelier = (
        "output_type: multiple_choice\ndoc_to_target: gold\ndoc_to_choice: choices\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    plain = "doc_to_text: '<|user|>{{asked[1:]}}<|assistant|>'\n"
    (folder / "dates.yaml").write_text(f"task: dates\n{common}{plain}{said}")
    (folder / "likelier_dates.yaml").write_text(f"task: likelier_dates\n{common}{plain}{likelier}")
    (folder / "chat_dates.yaml").write_text(f"task: chat_dates\n{common}doc_to_text: '{{{{asked[1:]}}}}'\n{said}")
    return folder


@needs_lm_eval
def test_the_base_stands_beside_adapters_and_scopes(
    embedded: tuple[str, Path], tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--url", embedded[0], "--adapter", "formats", "--include-path", tasks)
    scopes = ("--route", "request", "batch")
    assert evaluate("--tasks", "dates,likelier_dates", *asked, *scopes, "--out", tmp_path / "out") == 0
    head, *lines, _ = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "task" and "formats (request)  formats (batch)" in head and len(lines) == 2
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["tasks"], report["lm_eval"] > "") == (["dates", "likelier_dates"], True)
    values = {(row["task"], row["model"], row["route"]): row["value"] for row in report["rows"]}
    assert values["dates", "base", None] == 0.0 and values["dates", "formats", "request"] == 1.0
    assert values["likelier_dates", "formats", "request"] == 1.0
    assert {row["records"] for row in report["rows"]} == {3} and len(report["rows"]) == 6


@needs_lm_eval
def test_tasks_are_asked_as_chats(embedded: tuple[str, Path], tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--url", embedded[0], "--adapter", "formats", "--include-path", tasks, "--limit", "2")
    assert evaluate("--tasks", "chat_dates", "--apply-chat-template", *asked) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[2:4] == ["2", "0.000"]
    assert evaluate("--tasks", "likelier_dates", "--apply-chat-template", *asked) == 2
    assert "log-likelihoods by completions alone" in capsys.readouterr().err
    assert evaluate("--tasks", "dates", "none_such", *asked) == 2
    assert "lm-eval has no task none_such" in capsys.readouterr().err


def test_without_lm_eval_it_is_said_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "installed", lambda extra: False)
    assert evaluate("--tasks", "hellaswag", "--url", "127.0.0.1:9") == 2
    assert "not installed: in the checkout run `sh deploy/install.sh harness`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "one of the two"),
        (("d", "--tasks", "t", "--url", "u"), "one of the two"),
        (("--tasks", "t"), "give its --url"),
        (("d", "--num-fewshot", "0"), "belong to --tasks"),
        (("--tasks", "t", "--url", "u", "--include-path", "nowhere"), "nowhere does not exist"),
    ],
)
def test_what_does_not_go_together_is_said(
    flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(*flags) == 2
    assert words in capsys.readouterr().err


def test_the_table_has_a_column_for_each_model() -> None:
    rows = [
        TaskScore("base", None, "t", "acc", 0.25, 0.125, 12),
        TaskScore("a", "batch", "t", "acc", 0.5, None, 12),
        TaskScore("a", "batch", "t", "f1 (first)", 0.75, None, 12),
    ]
    head, *lines = [line.split("  ") for line in table(rows).splitlines()]
    assert [word.strip() for word in head if word] == ["task", "metric", "records", "base", "a (batch)"]
    assert [[word.strip() for word in line if word] for line in lines] == [
        ["t", "acc", "12", "0.250 ± 0.125", "0.500"], ["t", "f1 (first)", "12", "-", "0.750"],
    ]  # fmt: skip
