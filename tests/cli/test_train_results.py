"""What `tucka train` leaves: that it can be made again, what it says of itself, and figures on the way."""

import argparse
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import GPT2Config, GPT2LMHeadModel

from tests.support.training import make_workplace, train
from tucka_runtime.cli import train as cli
from tucka_runtime.cli.train_files import complete
from tucka_runtime.cli.train_flags import of_run
from tucka_runtime.trainer import routers


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    return make_workplace(tmp_path)


def test_training_json_makes_the_adapter_again(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(workplace, "--steps", "3", "--lr", "5e-3", "--seed", "7", "--k", "2") == 0
    weights = (workplace / "out/adapter_model.safetensors").read_bytes()
    training = json.loads((workplace / "out/training.json").read_text())
    assert set(training["versions"]) == {"tucka", "python", "torch", "transformers", "peft"}
    assert training["date"].endswith("+00:00") and training["threads"] == 1
    assert set(training["eval"]["base"]) == {"loss", "exact_match"}
    paths = {name: str(workplace / training["flags"][name]) for name in ("model", "data")}
    file = workplace / "run.yaml"
    file.write_text(yaml.safe_dump(training["flags"] | paths))
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    assert cli.run(parser.parse_args(["--config", str(file), "--out", str(workplace / "again")])) == 0
    assert (workplace / "again/adapter_model.safetensors").read_bytes() == weights
    assert "(base: loss " in capsys.readouterr().out


def test_a_base_on_the_hub_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of what lies here the name alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/base").mkdir(parents=True)
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    for named, told in {"org/name": "org/name", "org/name@main": "org/name@main", "mine/base": "base"}.items():
        args = complete(parser.parse_args(["--model", named, "--data", "mine/records.jsonl", "--out", "out"]))
        assert of_run(args)["model"] == told


def test_loras_options_are_in_the_adapter(workplace: Path) -> None:
    assert train(workplace, "--steps", "1", "--method", "lora", "--dropout", "0.25", "--rslora") == 0
    config = json.loads((workplace / "out/adapter_config.json").read_text())
    assert (config["lora_dropout"], config["use_rslora"]) == (0.25, True)


def test_figures_go_where_they_are_asked_for(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, Any]] = []
    wandb = ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    wandb.init = lambda **run: told.append(("init", run))  # type: ignore[attr-defined]
    wandb.log = lambda values, step: told.append(("log", (step, values)))  # type: ignore[attr-defined]
    wandb.finish = lambda: told.append(("finish", None))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train(workplace, "--steps", "2", "--eval-every", "2", "--report-to", "wandb", "tensorboard") == 0
    (first, run), *logs, last = told
    assert (first, last[0]) == ("init", "finish") and run["name"] == "out" and run["config"]["r"] == 4
    assert [step for _, (step, _) in logs] == [1, 2, 2]
    assert {"train/loss", "train/learning_rate", "experts/3"} < logs[0][1][1].keys()
    assert logs[2][1][1].keys() == {"eval/loss", "eval/exact_match"}
    events = EventAccumulator(str(workplace / "out" / "runs")).Reload()
    losses = [values["train/loss"] for _, (_, values) in logs[:2]]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)


def test_the_card_says_what_training_json_says(workplace: Path) -> None:
    assert train(workplace, "--steps", "2", "--eval-fraction", "0.4") == 0
    said = (workplace / "out/README.md").read_text()
    training = json.loads((workplace / "out/training.json").read_text())
    head = yaml.safe_load(said.split("---\n")[1])
    assert head["base_model"] == "base" and head["library_name"] == "peft" and "tucka" in head["tags"]
    for part in (
        "# out\n", "4 groups of 2 experts", f"{training['trainable_parameters']:,} parameters", "`request`",
        f"| with the adapter | {training['eval']['exact_match']:.3f} |", "--adapter out=FOLDER",
    ):  # fmt: skip
        assert part in said
    assert str(workplace) not in said


@pytest.mark.parametrize("flags", [("--method", "lora"), ("--route-batch", "per-sample")])
def test_predictions_are_what_exact_match_counts(workplace: Path, flags: tuple[str, ...]) -> None:
    """Decoded one token after the other, against teacher forcing."""
    more = ("--steps", "30", "--lr", "1e-2", "--eval-fraction", "0.4", "--target-modules", "all-linear")
    assert train(workplace, *more, *flags) == 0
    rows = [json.loads(line) for line in (workplace / "out/predictions.jsonl").read_text().splitlines()]
    training = json.loads((workplace / "out/training.json").read_text())
    assert len(rows) == training["data"]["held_out"] == 10
    assert all((row["said"] == row["expected"]) == row["right"] for row in rows)
    assert sum(row["right"] for row in rows) / len(rows) == training["eval"]["exact_match"] > 0
    assert rows[0]["prompt"].endswith(":")


def test_predictions_end_with_the_context_and_leave_texts_out(workplace: Path) -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 300, "n_positions": 40, "n_embd": 32, "n_layer": 1, "n_head": 2}
    no_dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    GPT2LMHeadModel(GPT2Config(**size, **no_dropout, eos_token_id=2)).save_pretrained(workplace / "base")
    lines = [{"prompt": "ask " * 3, "completion": "y" * 25}, {"text": "a text"}]
    (workplace / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--steps", "1", "--method", "lora", "--eval-data", str(workplace / "held.jsonl"))
    assert train(workplace, *flags, "--max-length", "40") == 0
    (row,) = (workplace / "out/predictions.jsonl").read_text().splitlines()
    assert json.loads(row)["expected"] == "y" * 25


@pytest.mark.parametrize("classify", [False, True], ids=["texts", "classifier"])
def test_the_card_s_lines_route_as_was_measured(workplace: Path, classify: bool) -> None:
    if classify:
        lines = [{"text": f"text {i}", "label": i % 2} for i in range(24)]
        (workplace / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--objective", "classify") if classify else ()
    assert train(workplace, "--steps", "1", "--route-batch", "prefix", "--route-prefix-tokens", "16", *flags) == 0
    code = (workplace / "out/README.md").read_text().split("```")[1].removeprefix("python\n")
    names: dict[str, Any] = {}
    exec(code.replace('"BASE"', repr(str(workplace / "base"))).replace('"FOLDER"', repr(str(workplace / "out"))), names)
    router = routers(names["model"])["default"]
    assert (router.scope, router.prefix_tokens, names["model"].training) == ("prefix", 16, False)


def test_names_with_dollar_signs_are_no_formulas(workplace: Path) -> None:
    lines = [{"prompt": f"p{i}", "completion": "a", "task": "$x_{ and $"} for i in range(6)]
    (workplace / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train(workplace, "--steps", "1", "--eval-fraction", "0.5") == 0
    assert (workplace / "out/training.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_likely_not_meant_is_said(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert train(workplace, "--steps", "1", "--r", "33") == 0
    said = capsys.readouterr().err
    training = json.loads((workplace / "out/training.json").read_text())
    for words in ("--r 33 is above the width", "a single record", "nothing is held out"):
        assert words in said
        assert any(words in warning for warning in training["warnings"])
