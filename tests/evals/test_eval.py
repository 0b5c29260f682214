"""`tucka eval`: what counts as right, and that a folder and a server of the same adapters score the same."""

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import make_workplace, train
from tucka_runtime.cli import eval as cli
from tucka_runtime.client import Client
from tucka_runtime.evals.asking import Reply
from tucka_runtime.evals.questions import questions
from tucka_runtime.evals.report import f1, score, table, wrong
from tucka_runtime.tokenizer import Tokenizer


def evaluate(*arguments: Any) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a TuckA and a LoRA adapter that are right some of the time."""
    folder = make_workplace(tmp_path_factory.mktemp("eval"))
    assert train(folder, "--steps", "30", "--lr", "1e-2", "--eval-fraction", "0.4", "--route-batch", "per-sample") == 0
    (folder / "out").rename(folder / "tucka")
    assert train(folder, "--steps", "8", "--lr", "1e-2", "--method", "lora") == 0
    (folder / "out").rename(folder / "lora")
    return folder


@pytest.fixture(scope="module")
def strict_base(workplace: Path) -> Path:
    """A base whose chat template knows no system message."""
    folder = workplace / "strict"
    shutil.copytree(workplace / "base", folder)
    for file in folder.glob("chat_template*"):
        file.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "<|user|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_scores_are_those_that_training_measured(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = [json.loads(line) for line in (workplace / "tucka" / "predictions.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer.load(workplace / "base")
    assert tokenizer is not None
    end = tokenizer.token(tokenizer.ends[0]) or ""
    assert end
    lines = [  # some records spell the token that ends them
        {"prompt": row["prompt"], "completion": row["expected"] + end * (i % 2), "task": row["task"]}
        for i, row in enumerate(held)
    ]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = [f"{name}={workplace / name}" for name in ("tucka", "lora")]
    command = (tmp_path / "held.jsonl", "--model", workplace / "base", "--adapter", *named, "--max-tokens", 8)
    assert evaluate(*command, "--route", "request", "batch", "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    sha256 = hashlib.sha256((tmp_path / "held.jsonl").read_bytes()).hexdigest()
    assert report["data"] == {"file": "held.jsonl", "sha256": sha256}
    assert [(row["model"], row["route"]) for row in report["rows"]] == [
        ("base", None), ("tucka", "request"), ("tucka", "batch"), ("lora", None),
    ]  # fmt: skip
    measured = json.loads((workplace / "tucka" / "training.json").read_text())["eval"]
    scored = report["rows"][1]
    assert scored["exact_match"] == pytest.approx(measured["exact_match"]) and scored["exact_match"] > 0
    assert scored["by_task"] == pytest.approx(measured["by_task"], abs=1e-4)
    mistakes = [json.loads(line) for line in (tmp_path / "out" / "wrong.jsonl").read_text().splitlines()]
    assert len(mistakes) == sum(round(row["records"] * (1 - row["exact_match"])) for row in report["rows"])
    assert (tmp_path / "out" / "report.png").stat().st_size > 1000
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[:3] == ["model", "route", "records"] and len(said) == 6


CARDS = {
    "data": [
        {"id": "b", "parent": None},
        {"id": "a", "parent": "b", "tucka": {"router": "q"}},
        {"id": "l", "parent": "b"},
    ]
}


def test_a_server_is_asked_as_clients_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def post(self: Client, path: str, body: dict[str, Any]) -> bytes:
        asked.append((path, body))
        if path == "/v1/completions":
            return b'{"choices": [{"text": " x\\n", "finish_reason": "length"}]}'
        return b'{"choices": [{"message": {"content": "y"}, "finish_reason": "stop"}]}'

    known: dict[str, dict[str, Any]] = {"/v1/models": CARDS, "/tokenizer_info": {"eos_token": "</s>"}}
    monkeypatch.setattr(Client, "get", lambda self, path: json.dumps(known[path]).encode())
    monkeypatch.setattr(Client, "post", post)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"n": 1}}}]}
    talk = [{"role": "user", "content": "q"}, call, {"role": "tool", "content": "1"}]
    lines = [
        {"prompt": "p", "completion": "x </s>"}, {"messages": talk[:2]}, {"text": "t"},
        {"messages": [*talk, {"role": "assistant", "content": "<think>so</think> y"}], "tools": [{"name": "f"}]},
    ]  # fmt: skip
    (tmp_path / "d").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluate(tmp_path / "d", "--url", "http://there", "--route", "request", "--adapter", "a") == 0
    said = capsys.readouterr()
    assert "left out: 2 records" in said.err and "after --max-tokens 256: 1 of b, 1 of a." in said.err
    assert said.out.splitlines()[2].split() == ["a", "request", "2", "1.000", "±", "0.000", "1.000"]
    bodies = [body for path, body in asked if path == "/v1/chat/completions"]
    assert [body.get("route") for body in bodies] == [None, "request"]
    assert bodies[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"n": 1}'
    assert bodies[0]["tools"] == [{"type": "function", "function": {"name": "f"}}]
    assert evaluate(tmp_path / "d", "--url", "http://there", "--adapter", "none") == 2
    assert "Loaded are: a, l" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--adapter", "a"), "NAME=DIR"),
        (("--url", "x", "--adapter", "a=b"), "name adapters alone"),
        (("--url", "127.0.0.1:9"), "No answer from"),
        (("--limit", "0"), "--limit must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str
) -> None:
    (tmp_path / "d").write_text('{"prompt": "a", "completion": "b"}\n')
    assert evaluate(tmp_path / "d", *flags) == 2
    assert words in capsys.readouterr().err


TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [{"role": "system", "content": "s"}, *TALK["messages"]]}, "line 2: the base's chat template"),
        ({"prompt": "x" * 5000, "completion": "y"}, "line 2: the prompt's 5000 tokens leave no room"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(
    strict_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], record: dict[str, Any], words: str
) -> None:
    (tmp_path / "d").write_text(f"{json.dumps(TALK)}\n{json.dumps(record)}\n")
    assert evaluate(tmp_path / "d", "--model", strict_base, "--max-tokens", 4) == 2
    assert f"tucka eval: d, {words}" in capsys.readouterr().err


def test_of_a_conversation_the_last_prompt_alone_is_needed(strict_base: Path, tmp_path: Path) -> None:
    """What its earlier turns would be learnt as is not asked: here the template has no place for a thought."""
    first, said = TALK["messages"]
    record = {"messages": [first, said | {"reasoning_content": "hm"}, *TALK["messages"]]}
    (tmp_path / "d").write_text(json.dumps(record) + "\n")
    assert evaluate(tmp_path / "d", "--model", strict_base, "--max-tokens", 4) == 0


def test_f1_is_squads() -> None:
    assert f1("The cat sat.", "a cat sat down") == pytest.approx(0.8)
    assert f1("", "the") == 1.0 and f1("x", "") == 0.0


def test_wrong_answers_are_kept_with_what_was_asked(tmp_path: Path) -> None:
    (tmp_path / "d").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    wanted, _, _ = questions(tmp_path / "d", 4)
    answers = [Reply("b", False), Reply(" b\n", False), Reply("c", False), Reply("b", True)]
    row = score(wanted, answers, "m", None)
    assert (row.exact_match, row.cut) == (0.75, 1) and row.error == pytest.approx(0.2165, abs=1e-4)
    assert [(m["asked"], m["said"]) for m in wrong(wanted, answers, row)] == [("a", "c")]
    assert "0.750 ± 0.217" in table([row])
